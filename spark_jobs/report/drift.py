"""How far a build has moved from the one before it: population stability indices of what both have counted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

KEPT = 200
"""Items that a build keeps for the next one, by popularity."""

COMPARED = 100
"""Most popular items of either build that are compared one by one, the others together; fewer than KEPT, so that an
item that has just left the first hundred is still known."""

Counts = Mapping[str, int]


def comparable(profile: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Whether both name their items alike: both were built by days, or neither was."""
    return bool(profile["days"]) is bool(previous["days"])


def drift(profile: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, float]:
    """The indices of items, rating levels and labels, and the relative change of the events (by days: of a day's).

    Args:
        profile: of this build: its ``events``, and how many of them the ``items`` (the KEPT most popular), ``levels``
            and ``labels`` have, and how many ``days`` it added.
        previous: of the one before.
    """
    names = {*_first(profile["items"]), *_first(previous["items"])}
    now, then = (_among(build["items"], names, build["events"]) for build in (profile, previous))
    return {
        "items": stability(now, then),
        "levels": stability(profile["levels"], previous["levels"]),
        "labels": stability(profile["labels"], previous["labels"]),
        "row_change": round(_per_day(profile) / _per_day(previous) - 1, 6),
    }


def _per_day(profile: Mapping[str, Any]) -> float:
    """Events of a day, or of all of a build that was not made by days."""
    events: int = profile["events"]
    return events / (profile["days"] or 1)


def stability(now: Counts, then: Counts) -> float:
    """Population stability index of two counts: sum of (p - q) log(p / q) over their keys.

    Half an event is added to each count, so that a key that only one of them has leaves the index finite.
    """
    keys = sorted({*now, *then})
    pairs = zip(_shares(now, keys), _shares(then, keys), strict=True)
    return round(math.fsum((p - q) * math.log(p / q) for p, q in pairs), 6)


def _shares(counts: Counts, keys: Sequence[str]) -> list[float]:
    whole = sum(counts.values()) + 0.5 * len(keys)
    return [(counts.get(key, 0) + 0.5) / whole for key in keys]


def _first(items: Counts) -> list[str]:
    return sorted(items, key=lambda name: (-items[name], name))[:COMPARED]


def _among(items: Counts, names: set[str], events: int) -> dict[str, int]:
    """The counts of ``names``, and of all other items together under a name that no item has."""
    found = {f"item {name}": items.get(name, 0) for name in names}
    return {**found, "others": events - sum(found.values())}
