"""The events dataset, step by step: judge, core, number, split, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from reclora_dist.config.schema import EventsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.storage import Folder
from spark_jobs.days import Before
from spark_jobs.parts import part_of, write_parts
from spark_jobs.privacy import Privacy
from spark_jobs.quality import DELETED, ITEM_WITHOUT_TITLE, check_share
from spark_jobs.sources.open import open_log
from spark_jobs.sources.raw import PLACE, RawLog
from spark_jobs.stage import Output, say
from spark_jobs.transforms import clean
from spark_jobs.transforms.core import k_core
from spark_jobs.transforms.fields import worded
from spark_jobs.transforms.positions import ordered, parted
from spark_jobs.transforms.private import private
from spark_jobs.transforms.profiles import Profiles
from spark_jobs.transforms.ranks import with_rank
from spark_jobs.transforms.running import sliced, unsliced
from spark_jobs.transforms.settle import joinable, settle
from spark_jobs.transforms.split import check_fractions, is_sample, split
from spark_jobs.transforms.state import forgotten, keep
from spark_jobs.transforms.statistics import with_statistics
from spark_jobs.transforms.tables import item_table, user_table, write_items, write_users
from spark_jobs.transforms.vocabulary import BASE, Vocabulary, continued, numbered

MAX_LEVELS = 64
"""Ratings of a log without a given scale, at most."""

_say = partial(say, "build_events")


@dataclass(frozen=True)
class Judged:
    """The tables of a raw log with a reason beside every bad row, and what was counted."""

    events: DataFrame
    items: DataFrame | None
    users: DataFrame | None
    quarantine: DataFrame
    counts: dict[str, int]
    reasons: dict[str, int]


def build(
    spark: SparkSession, config: EventsConfig, raw: Folder, out: Folder, privacy: Privacy, before: Before | None
) -> Output:
    """Write the tables events, items, users and quarantine; by days also state and vocabulary for the next day.

    Raises:
        ValueError: the log or the configuration cannot be used; nothing was written then.
    """
    check_fractions(config.fractions)
    log = private(open_log(spark, config.source, raw), privacy)
    text = worded(config.item_text, log.item_fields)
    judged = judge(log, config, privacy)
    counts = judged.counts
    events = k_core(_timed(judged.events, log.clock), config.k_core, partial(_count_core, counts))
    if not counts.get("k_core", counts["clean"]):
        raise ValueError("no event is left after cleaning and the k-core: lower k_core, or look at the quarantine")
    levels = rating_levels(events, config.rating_levels)
    users, items = numbered(events, before)
    cut = sliced(events, max(users.most, items.most))
    placed = settle(ordered(_named(cut, users, items, levels, config.like_at_least)))
    divided = split(placed, config)
    counted = unsliced(with_statistics(divided.events, config.split == "per_user"))
    final = settle(continued(counted, users, items) if before else counted.withColumn(BASE, F.lit(0)))
    counts |= split_counts(final, config)
    _say(", ".join(f"{name} {rows:,}" for name, rows in counts.items()))
    by_days = config.split == "dates"
    user_rows = user_table(users, judged.users, log.user_fields, by_days, before)
    item_rows = item_table(items, judged.items, log.item_fields, text, by_days, before)
    events_written = write_events(final, out, counts["events"])
    users_written, first_users = write_users(user_rows, out, dense=before is None)
    files = [*events_written, *users_written, *write_items(item_rows, final, out), *_write_quarantine(judged, out)]
    facts = {
        "rating_levels": levels,
        "level_likes": [int(np.float32(level) >= np.float32(config.like_at_least)) for level in levels],
        "user_fields": user_rows.values,
        "item_fields": item_rows.values,
        "counts": counts,
        "quarantine": judged.reasons,
        "split": config.split,
        "split_times": list(divided.times),
        "min_history": config.min_history,
        "users": users.total,
        "items": items.total,
        "first_users": first_users,
    }
    if not by_days:
        return Output(files, facts)
    profiles = Profiles(out, users_written, first_users, len(user_rows.values))
    gone = forgotten(spark, privacy, before)
    kept = keep(spark, config, out, events_written, profiles, users.fresh(), before, privacy, gone)
    return Output([*files, *kept.files], {**facts, **kept.facts})


def judge(log: RawLog, config: EventsConfig, privacy: Privacy) -> Judged:
    """Judge every row of the log, which is as ``privacy`` lets it be seen.

    Raises:
        ValueError: more events are bad than ``config.max_quarantined`` allows.
    """
    tables: dict[str, DataFrame] = {}
    for name, frame in (("items", log.items), ("users", log.users)):
        if frame is not None:
            tables[name] = settle(clean.judged_profiles(frame, f"{name[:-1]}_id", log.private))
    good = {name: clean.good(frame) for name, frame in tables.items()}
    events = clean.judged_events(log, good.get("items"), config.rating_levels)
    rows, reasons = count_reasons(events)
    deleted = reasons.pop(DELETED, 0)
    rows -= deleted
    bad = [clean.bad(frame, name) for name, frame in (("events", events), *tables.items())]
    if "items" in tables:
        bad.append(clean.untitled(tables["items"]))
    _say(f"{rows:,} event rows read")
    check_share(reasons, rows, config.max_quarantined)
    quarantine = settle(clean.counted(reduce(DataFrame.unionByName, bad)))
    found = {
        row[clean.REASON]: row["n"] for row in quarantine.groupBy(clean.REASON).agg(F.sum("rows").alias("n")).collect()
    }
    for reason, count in sorted(found.items()):
        _say(f"  {'warning' if reason == ITEM_WITHOUT_TITLE else 'quarantine'}: {reason} {count:,}")
    counts = {
        **({} if privacy.deleted is None else {"deleted": deleted}),
        "read": rows,
        "clean": rows - sum(reasons.values()),
    }
    return Judged(clean.good(events), good.get("items"), good.get("users"), quarantine, counts, found)


def count_reasons(events: DataFrame) -> tuple[int, dict[str, int]]:
    """All rows, and the bad ones per reason."""
    found = {row[clean.REASON]: row["count"] for row in events.groupBy(clean.REASON).count().collect()}
    return sum(found.values()), {reason: count for reason, count in found.items() if reason is not None}


def rating_levels(events: DataFrame, given: Sequence[float]) -> list[float]:
    """The rating scale, ascending: as given, else the distinct ratings.

    Raises:
        ValueError: there are more than MAX_LEVELS.
    """
    if given:
        return sorted(set(given))
    rows = events.select("rating").distinct().limit(MAX_LEVELS + 1).collect()
    if len(rows) > MAX_LEVELS:
        raise ValueError(
            f"the log has more than {MAX_LEVELS} distinct ratings, so they are no scale. "
            "Name the valid ones in rating_levels, or round the ratings first."
        )
    return sorted(row[0] for row in rows)


def split_counts(events: DataFrame, config: EventsConfig) -> dict[str, int]:
    """Events, and samples per split.

    Raises:
        ValueError: a split that should have samples has none, or those for training have one label only.
    """
    sample = is_sample(config.min_history)
    liked = F.count_if(sample & (F.col("label") == 1)).alias("liked")
    counted = (F.count("*").alias("events"), F.count_if(sample).alias("samples"), liked)
    rows = events.groupBy("split").agg(*counted).collect()
    found = {row["split"]: row["samples"] for row in rows}
    counts = {"events": sum(row["events"] for row in rows), **{name: found.get(name, 0) for name in schema.SPLITS}}
    if config.split == "dates":
        return counts  # days of one split, or of one label, are days like others
    for name, fraction in zip(schema.SPLITS, config.fractions, strict=True):
        if fraction > 0 and not found.get(name):
            raise ValueError(
                f"the {name} split has no sample (split = {config.split}, min_history = {config.min_history}, "
                f"samples: {found}). Use a longer log, another split, or other fractions."
            )
    _check_labels({row["split"]: row["liked"] for row in rows}, found, events, config)
    return counts


def _check_labels(
    liked: Mapping[str, int], samples: Mapping[str, int], events: DataFrame, config: EventsConfig
) -> None:
    train = schema.SPLITS[0]
    if 0 < liked[train] < samples[train]:
        return
    ratings = sorted(row[0] for row in events.select("rating").distinct().collect())
    raise ValueError(
        f"all {samples[train]:,} training samples have the label {int(liked[train] > 0)}, so nothing can be learnt: "
        f"like_at_least = {config.like_at_least:g}, and the ratings are {', '.join(f'{r:g}' for r in ratings)}. "
        "Set like_at_least so that it parts them, or use a log with likes and dislikes."
    )


def write_events(events: DataFrame, out: Folder, rows: int) -> list[FileEntry]:
    """Write the event table, sorted by user and order, in parts of equally many rows."""
    placed = parted(events, rows, F.col("order") - F.col(BASE))
    return write_parts(placed, out, "events/", schema.events, ["sample_id"])  # one number sorts fastest


def _timed(events: DataFrame, clock: bool) -> DataFrame:
    """Events with a time; without a clock it is the row's place in the log."""
    if clock:
        return events.drop(PLACE)
    return settle(with_rank(events.drop("time"), [PLACE], "time").frame.drop(PLACE))


def _count_core(counts: dict[str, int], turn: int, rows: int) -> None:
    counts["k_core"] = rows
    _say(f"  k-core round {turn}: {rows:,} events left")


def _named(
    events: DataFrame, users: Vocabulary, items: Vocabulary, levels: Sequence[float], like_at_least: float
) -> DataFrame:
    """Events with positions in place of ids, the rating's level and the label."""
    scale = F.array(*[F.lit(level).cast("float") for level in levels])
    return (
        events.join(joinable(users.frame.select("user_id", "user"), users.rows), "user_id")
        .join(joinable(items.frame.select("item_id", "item"), items.rows), "item_id")
        .withColumn("level", F.array_position(scale, F.col("rating")).cast("tinyint"))
        .withColumn("label", (F.col("rating") >= F.lit(like_at_least).cast("float")).cast("tinyint"))
        .drop("user_id", "item_id")
    )


def _write_quarantine(judged: Judged, out: Folder) -> list[FileEntry]:
    if not judged.reasons:
        return []
    placed = judged.quarantine.withColumn("part", part_of(clean.ROW, judged.quarantine.count()))
    return write_parts(placed, out, "quarantine/", schema.quarantine, ["part", *schema.quarantine.names])
