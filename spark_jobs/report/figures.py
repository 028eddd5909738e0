"""The figures of the report, from the manifests of a build and from what was counted in its tables."""

from collections.abc import Mapping
from typing import Any

from reclora_dist.contract.manifest import Manifest
from reclora_dist.contract.schema import SPLITS
from spark_jobs.days import added, midnight
from spark_jobs.report import histogram
from spark_jobs.report.histogram import share
from spark_jobs.report.periods import Periods
from spark_jobs.report.tally import SHORT_BITS, Count, Tally

STEPS = ("read", "clean", "k_core", "events")
"""Counts of the events manifest, in the order of the steps; a log without a k-core has no count of it."""

_NONE = Count(0, 0)


def figures(events: Manifest, shards: Manifest, tally: Tally) -> dict[str, Any]:
    """Everything that ``quality.json`` says of a build by itself."""
    facts, counts = events.facts, tally.counts
    return {
        "events": {step: facts["counts"][step] for step in STEPS if step in facts["counts"]},
        "users": facts["users"],
        "items": facts["items"],
        "samples": {split: _samples(counts, split) for split in _splits(facts)},
        "label_rate": _label_rate(counts),
        "quarantine": {"share": _bad(facts["counts"]), "rows": dict(sorted(facts["quarantine"].items()))},
        "activity": {f"{kind}s": _activity(tally.activity[kind]) for kind in ("user", "item")},
        "popularity": {"top_1_percent": histogram.top_share(tally.activity["item"], 1)},
        "levels": _levels(facts["rating_levels"], counts["level"]),
        "histories": {name: _lengths(counts.get(name, {}), shards.facts[name]) for name in ("long", "short")},
        "coverage": _coverage(counts),
        "periods": _periods(tally.periods),
    }


def profile(
    report: Mapping[str, Any], counts: Mapping[int, Count], items: Mapping[str, int], days: int
) -> dict[str, Any]:
    """What the next build is compared with (see ``drift``).

    Args:
        report: the figures of this build.
        counts: events per level.
        items: events of the most popular items by id; of a build by days by position.
        days: how many a build by days added; 0 for another.
    """
    likes = sum(count.likes for count in counts.values())
    events = report["events"]["events"]
    levels = {f"{level['rating']:g}": level["events"] for level in report["levels"]}
    return {
        "events": events,
        "levels": levels,
        "labels": {"like": likes, "other": events - likes},
        "items": dict(items),
        "days": days,
    }


def _splits(facts: Mapping[str, Any]) -> list[str]:
    """The splits that the build can have samples of: the days that one adds may all lie in the same."""
    days = added(facts)
    if not days:
        return list(SPLITS)
    places = {sum(midnight(day) >= cut for cut in facts["split_times"]) for day in days}
    return [SPLITS[place] for place in sorted(places)]


def _samples(counts: Mapping[str, Mapping[int, Count]], split: str) -> dict[str, Any]:
    crm, text = (counts.get(f"{kind}/{split}", {}).get(0, _NONE) for kind in ("crm", "text"))
    return {"crm": crm.rows, "text": text.rows, "label_rate": share(crm.likes, crm.rows)}


def _label_rate(counts: Mapping[str, Mapping[int, Count]]) -> float | None:
    """Share of likes among all samples."""
    found = [counts.get(f"crm/{split}", {}).get(0, _NONE) for split in SPLITS]
    return share(sum(count.likes for count in found), sum(count.rows for count in found))


def _bad(counts: Mapping[str, int]) -> float | None:
    return share(counts["read"] - counts["clean"], counts["read"])


def _activity(found: histogram.Histogram) -> dict[str, Any]:
    return {**histogram.spread(found), "buckets": histogram.doubling(found)}


def _levels(levels: list[float], counts: Mapping[int, Count]) -> list[dict[str, Any]]:
    total = sum(count.rows for count in counts.values())
    rows = [counts.get(place, _NONE).rows for place in range(1, len(levels) + 1)]
    return [{"rating": a, "events": n, "share": share(n, total)} for a, n in zip(levels, rows, strict=True)]


def _lengths(counts: Mapping[int, Count], most: int) -> dict[str, Any]:
    found = {length: count.rows for length, count in counts.items()}
    total = sum(found.values())
    return {
        "longest": most,
        **histogram.spread(found),
        "empty": share(found.get(0, 0), total),
        "full": share(found.get(most, 0), total),
        "buckets": histogram.even(found, most),
    }


def _coverage(counts: Mapping[str, Mapping[int, Count]]) -> dict[str, Any]:
    """How much of the short histories the long ones hold, and how many different items each has; of text samples."""
    means = {name: _mean(counts.get(name, {})) for name in ("distinct_long", "distinct_short")}
    cells = [(*divmod(key, 1 << SHORT_BITS), count.rows) for key, count in counts.get("covered", {}).items()]
    filled = [(held / length, rows) for length, held, rows in cells if length]
    samples = sum(rows for _, rows in filled)
    return {"samples": samples, "covered": share(sum(part * rows for part, rows in filled), samples), **means}


def _mean(counts: Mapping[int, Count]) -> float | None:
    return histogram.mean({value: count.rows for value, count in counts.items()})


def _periods(periods: Periods) -> dict[str, Any]:
    rows = [{"from": a, "events": n, "label_rate": share(likes, n)} for a, n, likes in periods.each()]
    return {"unit": periods.unit, "days": periods.width, "rows": rows}
