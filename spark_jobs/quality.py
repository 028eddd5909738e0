"""Why a row of a raw log is put aside, and how many may be."""

from collections.abc import Mapping

MALFORMED_ROW = "malformed_row"
MISSING_USER_ID = "missing_user_id"
MISSING_ITEM_ID = "missing_item_id"
MISSING_RATING = "missing_rating"
UNPARSEABLE_RATING = "unparseable_rating"
"""Not a number, or NaN, or infinite."""
RATING_NOT_IN_LEVELS = "rating_not_in_levels"
MISSING_TIME = "missing_time"
UNPARSEABLE_TIME = "unparseable_time"
LATE_EVENT = "late_event"
"""Under source.days: its time does not lie on the day of the folder that it came in."""
UNKNOWN_ITEM = "unknown_item"
"""An event of an item that the item table lacks."""
DUPLICATE_EVENT = "duplicate_event"
"""Same user, item and time as an earlier row (without a clock: same user and item); the first in file order stays."""
DELETED = "deleted"
"""An event of a user on the delete list: no row of the quarantine, only a number."""
DUPLICATE_ITEM = "duplicate_item"
DUPLICATE_USER = "duplicate_user"
WELL_READ = (UNKNOWN_ITEM, DUPLICATE_EVENT, DUPLICATE_ITEM, DUPLICATE_USER)
"""Reasons of rows in whose columns lies what belongs there."""
ITEM_WITHOUT_TITLE = "item_without_title"
"""A warning: the item stays, with its id as title."""


def check_share(counts: Mapping[str, int], rows: int, limit: float) -> None:
    """Refuse a log with too many bad events.

    Args:
        counts: bad event rows per reason.
        rows: all event rows.
        limit: largest share of bad rows.

    Raises:
        ValueError: the share is larger, or there is no event at all.
    """
    if rows == 0:
        raise ValueError("the log has no event: look at source.path, source.events and privacy.delete")
    bad = sum(counts.values())
    if bad > limit * rows:
        most = sorted(counts.items(), key=lambda pair: -pair[1])
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in most)
        raise ValueError(
            f"{bad:,} of {rows:,} event rows ({bad / rows:.1%}) are bad, max_quarantined = {limit:g} ({reasons}). "
            "Correct the source's settings or the log, or raise max_quarantined."
        )
