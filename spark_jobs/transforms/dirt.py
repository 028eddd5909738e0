"""Bad rows for a generated log, of every kind that typed or text columns can hold, each in a known number.

A bad row is a copy of a good one with one thing wrong, and comes on top: the good rows are those of the clean log.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs import quality
from spark_jobs.transforms import generator, plan
from spark_jobs.transforms.plan import Plan, portion

_MISSING = (None, "", "  ")

FAULTS: Mapping[str, tuple[str, tuple[str | None, ...]]] = {
    quality.MISSING_USER_ID: ("user_id", _MISSING),
    quality.MISSING_ITEM_ID: ("item_id", _MISSING),
    quality.MISSING_RATING: ("rating", _MISSING),
    quality.UNPARSEABLE_RATING: ("rating", ("NaN", "five", "Infinity", "4,5")),
    quality.RATING_NOT_IN_LEVELS: ("rating", ("0", "3.5", "11", "-1")),
    quality.MISSING_TIME: ("timestamp", _MISSING),
    quality.UNPARSEABLE_TIME: ("timestamp", ("yesterday", "2023-13-45", "14 Nov 2023")),
    quality.UNKNOWN_ITEM: ("item_id", ("withdrawn-1", "withdrawn-2")),
}
"""What is wrong in a bad event: the column, and what stands in it, in turn. A duplicate has nothing else wrong."""

TABLES = {
    "events": (*FAULTS, quality.DUPLICATE_EVENT),
    "items": (quality.DUPLICATE_ITEM, quality.ITEM_WITHOUT_TITLE),
    "users": (quality.DUPLICATE_USER,),
}
"""The kinds of bad rows of each table."""


def planned(log: Plan, table: str) -> dict[str, int]:
    """Bad rows of a table per reason, at least one of each; none at all in a clean log."""
    if not log.config.dirt:
        return {}
    rows = {"events": log.events, "items": log.config.items, "users": log.config.users}[table]
    return {reason: max(1, round(log.config.dirt * rows / len(TABLES[table]))) for reason in TABLES[table]}


def with_bad_events(log: Plan, good: pa.Table, piece: int) -> pa.Table:
    """The events of a piece, its bad rows behind them; ratings and times are text, as the bad ones are.

    Args:
        log: the plan of the log.
        good: the events with their ``day``; a row with a bad time falls on the first.
        piece: number of the piece.
    """
    rng = np.random.Generator(plan.stream(log.config, plan.BAD_EVENTS, piece))
    for name in ("rating", "timestamp"):
        good = _with(good, name, good[name].cast(pa.string()))
    tables = [good]
    for reason, rows in planned(log, "events").items():
        start, stop = portion(rows, piece, log.pieces)
        tables.append(_spoiled(_copies(rng, good, stop - start), reason, start, pc.min(good["day"])))
    return pa.concat_tables(tables)


def with_bad_items(log: Plan, good: pa.Table, part: int, parts: int) -> pa.Table:
    """A part of the item table, behind it duplicates, and items of no event that have no title."""
    rng = np.random.Generator(plan.stream(log.config, plan.BAD_ITEMS, part))
    (start, stop), (first, last) = (portion(rows, part, parts) for rows in planned(log, "items").values())
    untitled = _copies(rng, good, last - first)
    untitled = _with(untitled, "item_id", generator.item_ids(log.config.items + np.arange(first, last)))
    untitled = _with(untitled, "title", pa.nulls(last - first, pa.string()))
    return pa.concat_tables([good, _copies(rng, good, stop - start), untitled])


def with_bad_users(log: Plan, good: pa.Table, part: int, parts: int) -> pa.Table:
    """A part of the user table, behind it duplicates."""
    rng = np.random.Generator(plan.stream(log.config, plan.BAD_USERS, part))
    start, stop = portion(planned(log, "users")[quality.DUPLICATE_USER], part, parts)
    return pa.concat_tables([good, _copies(rng, good, stop - start)])


def _copies(rng: np.random.Generator, table: pa.Table, rows: int) -> pa.Table:
    return table.take(pa.array(rng.integers(0, len(table), rows)))


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def _spoiled(copies: pa.Table, reason: str, start: int, first_day: pa.Scalar) -> pa.Table:
    if reason not in FAULTS:
        return copies
    column, values = FAULTS[reason]
    turn = pa.array((start + np.arange(len(copies))) % len(values))
    spoiled = _with(copies, column, pa.array(values, pa.string()).take(turn))
    return _with(spoiled, "day", pa.repeat(first_day, len(copies))) if column == "timestamp" else spoiled
