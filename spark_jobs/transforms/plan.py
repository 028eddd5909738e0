"""How a generated log is cut: into pieces, each drawn at once from a stream of its own, and parts, a task's work each.

All of it follows from the configuration, never from the number of cores.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reclora_dist.config.schema import SynthesiseConfig

DAY = 86_400

PIECE_EVENTS = 50_000
"""Mean events of a piece: what is held as arrays of numbers at a time."""

ITEMS, EVENTS, USERS, HEAVY, ACTIVITY, BAD_EVENTS, BAD_ITEMS, BAD_USERS = range(8)
"""What the streams of random numbers are for."""


def stream(config: SynthesiseConfig, purpose: int, index: int = 0) -> np.random.PCG64:
    """A stream of random numbers; ``advance`` leads to any place in it."""
    return np.random.PCG64([config.seed, purpose, index])


def activity(config: SynthesiseConfig, start: int, stop: int) -> NDArray[np.int64]:
    """Number of events of the users ``start`` to ``stop``, int64 [stop - start].

    At least a third of the mean, with a power-law tail; no user sees most items. A heavy user's events are laid out in
    pieces of their own, so it has none here.
    """
    uniform = np.random.Generator(stream(config, ACTIVITY).advance(start)).random(stop - start)
    least, exponent = config.events_per_user / 3, config.activity_exponent
    tail = (1 - uniform) ** (-1 / exponent) - 1
    drawn = np.minimum(least + 2 * least * (exponent - 1) * tail, min(config.items / 2, config.days * DAY))
    count = np.maximum(drawn, 1).astype(np.int64)
    if config.heavy_user and start == 0:
        count[0] = 0
    return count


@dataclass(frozen=True)
class Plan:
    """The pieces of a log: first the groups of users, then the stretches of the heavy user's time.

    ``events`` counts all good events, ``heavy_events`` those of the heavy user.
    """

    config: SynthesiseConfig
    events: int
    heavy_events: int

    @property
    def user_pieces(self) -> int:
        """Number of groups of users."""
        return -(-self.config.users // _users_per_piece(self.config))

    @property
    def heavy_pieces(self) -> int:
        """Number of stretches of the heavy user's time."""
        return -(-self.heavy_events // PIECE_EVENTS)

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return self.user_pieces + self.heavy_pieces

    @property
    def pieces_per_part(self) -> int:
        """Pieces in a part: parts of a large log are large, those that are cut by day larger."""
        parts, least, most = (16, 1_000_000, 4_000_000) if self.config.by_day else (32, PIECE_EVENTS, 1_000_000)
        return min(max(self.events // parts, least), most) // PIECE_EVENTS

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.pieces // self.pieces_per_part)

    def pieces_of(self, part: int) -> range:
        """The pieces of a part."""
        return range(part * self.pieces_per_part, min((part + 1) * self.pieces_per_part, self.pieces))

    def users(self, piece: int) -> tuple[int, int]:
        """First and last user (exclusive) of a group."""
        size = _users_per_piece(self.config)
        return piece * size, min((piece + 1) * size, self.config.users)

    def stretch(self, number: int) -> tuple[int, int, int]:
        """First and last second (exclusive) of a stretch of the heavy user's time, and the events in it."""
        start, stop = portion(self.config.days * DAY, number, self.heavy_pieces)
        first, last = portion(self.heavy_events, number, self.heavy_pieces)
        return start, stop, last - first


def plan_of(config: SynthesiseConfig) -> Plan:
    """Count the events, so that the heavy user's share of them is exact."""
    size = _users_per_piece(config)
    starts = range(0, config.users, size)
    others = sum(int(activity(config, start, min(start + size, config.users)).sum()) for start in starts)
    heavy = round(others * config.heavy_user / (1 - config.heavy_user))
    return Plan(config, others + heavy, heavy)


def portion(rows: int, index: int, count: int) -> tuple[int, int]:
    """First and last (exclusive) of ``rows`` rows that the part ``index`` of ``count`` equal ones has."""
    return rows * index // count, rows * (index + 1) // count


def _users_per_piece(config: SynthesiseConfig) -> int:
    """At least two, so that somebody is left beside a heavy user."""
    return max(2, PIECE_EVENTS // config.events_per_user)
