"""Logs that come day by day: which days a build reads, and what the days before it left. Plain Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from reclora_dist.config.schema import EventsConfig
from reclora_dist.contract.manifest import ContractError, Manifest, digest, read_manifest
from reclora_dist.contract.runs import Run
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder
from spark_jobs.privacy import Privacy

RUNS = {"state": "user", "vocabulary": "key"}
"""Tables that are kept as sorted runs, and their keys."""

MS_PER_DAY = 86_400_000


def days_between(first: str, last: str, setting: str = "source.days") -> list[str]:
    """Every day from ``first`` to ``last`` (YYYY-MM-DD).

    Raises:
        ValueError: one is no date, or they are in the wrong order.
    """
    start, end = parsed(first, setting), parsed(last, setting)
    if end < start:
        raise ValueError(f"{setting} = [{first}, {last}] ends before it starts")
    return [str(start + timedelta(days=n)) for n in range((end - start).days + 1)]


def parsed(text: str, setting: str) -> date:
    """A day written as YYYY-MM-DD.

    Raises:
        ValueError: it is not.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{setting} names {text!r}, which is no day; write YYYY-MM-DD") from None


def added(facts: Mapping[str, Any]) -> list[str]:
    """The days that a build read itself, by the facts of its events; none if it was not built by days."""
    return days_between(*facts["added"]) if "added" in facts else []


def midnight(day: str) -> int:
    """The first millisecond of a day (UTC)."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1000


def check_days(config: EventsConfig) -> None:
    """Refuse settings that have no meaning day by day, or that need days and have none.

    Raises:
        ValueError: names the setting and the remedy.
    """
    given = any(config.source.days)
    if config.split != "dates":
        if given:
            raise ValueError(f"source.days = {list(config.source.days)} needs split=dates and cut_dates")
        return
    if not given:
        raise ValueError("split=dates needs source.days, the first and the last day of this build (YYYY-MM-DD)")
    days_between(*config.source.days)
    days_between(*config.cut_dates, "cut_dates")
    wrong = {
        "k_core": (config.k_core > 1, "a later day could bring a user or item back: set k_core=0"),
        "rating_levels": (not config.rating_levels, "a later day could bring a new level: name all of them"),
        "source.kind": (config.source.kind != "columns", "only `columns` logs come in folders date=YYYY-MM-DD"),
        "source.time": (not config.source.time, "name the column of the event time"),
    }
    for setting, (bad, remedy) in wrong.items():
        if bad:
            raise ValueError(f"split=dates does not go with this {setting}: {remedy}")


def lasting(config: EventsConfig, privacy: Privacy) -> str:
    """Digest of the settings, and of the key of user ids, that must stay as they are from day to day."""
    names = ("like_at_least", "rating_levels", "min_history", "split", "cut_dates", "keep", "item_text")
    fields = [list(config.source.item_fields), list(config.source.user_fields), privacy.mark or False]
    return digest([fields, *[getattr(config, name) for name in names]])


@dataclass(frozen=True)
class Before:
    """The days before a build: their last dataset, and the runs that hold what is known of every user."""

    folder: Folder
    manifest: Manifest
    runs: Mapping[str, Sequence[Run]]

    @classmethod
    def open(cls, folder: Folder, manifest: Manifest) -> "Before":
        """What the events dataset in ``folder`` and those that it names know, newest runs first.

        Raises:
            ContractError: it was not built by days, or a dataset that it names is not there or another one.
        """
        if "runs" not in manifest.facts:
            raise ContractError(f"{folder.uri!r} was not built by days: build the first days with split=dates")
        return cls(folder, manifest, {table: _runs(folder, manifest, table) for table in RUNS})

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the dataset of the day before."""
        return self.manifest.facts


def _runs(folder: Folder, manifest: Manifest, table: str) -> list[Run]:
    runs = [Run(folder, manifest.select(f"{table}/"), RUNS[table])]
    for older in manifest.facts["runs"][table]:
        place, found = _named(folder, older)
        runs.append(Run(place, found.select(f"{table}/"), RUNS[table]))
    return [run for run in runs if len(run)]


def _named(folder: Folder, older: Mapping[str, str]) -> tuple[Folder, Manifest]:
    """The dataset that one in ``folder`` names."""
    place = folder.resolve(older["folder"])
    found = read_manifest(place, EVENTS)
    if found.content_digest != older["digest"]:
        raise ContractError(
            f"{place.uri!r} is not the dataset that {folder.uri!r} was built on ({older['digest'][:12]}…, found "
            f"{found.content_digest[:12]}…). Restore it, or build again from there."
        )
    return place, found


def check_follows(config: EventsConfig, privacy: Privacy, previous: Before) -> None:
    """Refuse a build that does not go on where the days before it end.

    Raises:
        ValueError: a day is missing or there twice, or a lasting setting or the key of user ids has changed.
    """
    if config.split != "dates":
        raise ValueError("--previous needs split=dates: only builds by days go on from one another")
    last = previous.facts["days"][1]
    expected = str(date.fromisoformat(last) + timedelta(days=1))
    if config.source.days[0] != expected:
        raise ValueError(
            f"source.days starts with {config.source.days[0]}, but {previous.folder.uri!r} ends with {last}: the next "
            f"day is {expected}. Add the days in between first."
        )
    if previous.facts["lasting"] != lasting(config, privacy):
        raise ValueError(
            f"settings differ from those of {previous.folder.uri!r}: like_at_least, rating_levels, min_history, "
            "cut_dates, keep, item_text, fields, privacy.hash_users and its key must stay. Set them as they were, or "
            "build again from the first day."
        )


def previous_of(folder: Folder, manifest: Manifest) -> Before | None:
    """The days before those of the events dataset in ``folder``; None if there are none.

    Raises:
        ContractError: a dataset that it names is not there or another one.
    """
    named = manifest.facts.get("previous")
    return Before.open(*_named(folder, named)) if named else None


def named(older: Folder | Run, out: Folder) -> dict[str, str]:
    """How a dataset in ``out`` names an older one, or that of a run."""
    folder = older.folder if isinstance(older, Run) else older
    return {"folder": out.relative(folder), "digest": read_manifest(folder, EVENTS).content_digest}
