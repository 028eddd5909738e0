"""How much an event of the past suits a target: one score per pair, exact in float32, for every retrieval strategy."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig

GRID = 4096
"""Item vectors hold multiples of 1/GRID and have a length of at most 1. Every partial sum of a dot product is then a
multiple of 2**-24 not above 1, which float32 holds exactly: scores depend neither on the order of summation nor on the
BLAS, the block or the processor, and equal vectors have equal scores.
"""

_ABSENT = np.float32(-np.inf)


class Similarity(Protocol):
    """Scores of events for targets; ``-inf`` means that the target must not see the event."""

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """Scores float32 [..., T, L] of event items [..., L] at ``places`` [..., L] of their users' logs, for target
        items [..., T].
        """


@dataclass(frozen=True)
class Semantic:
    """Cosine of item vectors, float32 [items + 1, D] on the grid (may be memory-mapped)."""

    vectors: NDArray[np.float32]

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """See Similarity."""
        scores: NDArray[np.float32] = self.vectors[targets] @ self.vectors[events].swapaxes(-1, -2)
        return scores


@dataclass(frozen=True)
class SimHash:
    """Equal bits of hashed item vectors (ETA, arXiv 2108.04468): ``codes`` uint64 [items + 1, words]."""

    codes: NDArray[np.uint64]

    @classmethod
    def of(cls, vectors: NDArray[np.float32], bits: int, seed: int) -> "SimHash":
        """Hash vectors by the signs of ``bits`` random projections."""
        planes = np.random.default_rng(seed).normal(size=(vectors.shape[1], bits))
        packed = [np.packbits(block @ planes > 0, axis=1) for block in _blocks(vectors)]
        return cls(np.ascontiguousarray(np.concatenate(packed)).view(np.uint64))

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """See Similarity; the score is minus the Hamming distance."""
        wanted, seen = self.codes[targets], self.codes[events]
        differing = np.zeros((*targets.shape, events.shape[-1]), np.uint16)
        for word in range(self.codes.shape[1]):
            differing += np.bitwise_count(wanted[..., :, None, word] ^ seen[..., None, :, word])
        return -differing.astype(np.float32)


@dataclass(frozen=True)
class Known:
    """Scores that know the items up to ``items`` only: later ones count as the padding, whose vector is zero."""

    similarity: Similarity
    items: int

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """See Similarity."""
        wanted, seen = (np.where(items > self.items, 0, items) for items in (targets, events))
        return self.similarity(wanted, seen, places)


@dataclass(frozen=True)
class Category:
    """Events of the target's category only (SIM's hard search, arXiv 2006.05639), newest first: int32 [items + 1]."""

    categories: NDArray[np.int32]

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """See Similarity."""
        equal = self.categories[targets][..., :, None] == self.categories[events][..., None, :]
        return np.where(equal, np.float32(0), _ABSENT)


@dataclass(frozen=True)
class Random:
    """A seeded random order of the past, another one for each target item."""

    seed: int

    def __call__(self, targets: NDArray[Any], events: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float32]:
        """See Similarity; 24 bits of a hash of seed, target item, event item and place."""
        seed = np.uint32(self.seed % 2**32)
        row = _mixed(targets.astype(np.uint32) ^ seed)
        column = _mixed(_mixed(events.astype(np.uint32)) ^ places.astype(np.uint32))
        return (_mixed(row[..., :, None] ^ column[..., None, :]) >> np.uint32(8)).astype(np.float32)


def similarity(
    config: RetrievalConfig, vectors: NDArray[np.float32] | None, categories: NDArray[np.int32] | None
) -> Similarity | None:
    """The scores of a strategy; None for the newest events, which need none.

    Args:
        config: the strategy and its settings.
        vectors: float32 [items + 1, D] on the grid, for ``semantic`` and ``simhash``.
        categories: int32 [items + 1], for ``category``.

    Raises:
        ValueError: the strategy lacks what it compares.
    """
    if config.strategy in ("semantic", "simhash"):
        if vectors is None:
            raise ValueError(f"strategy = {config.strategy} compares item vectors: give them, or set strategy=recent")
        return Semantic(vectors) if config.strategy == "semantic" else SimHash.of(vectors, config.bits, config.seed)
    if config.strategy == "category":
        if categories is None:
            raise ValueError("strategy = category compares a field of the items: name one in retrieval.category")
        return Category(categories)
    return Random(config.seed) if config.strategy == "random" else None


def on_grid(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to a length just below 1 and round them to multiples of 1/GRID; zero rows stay zero.

    Rounding adds at most sqrt(D)/2 grid steps to a row's length, so that much is left free.
    """
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    length = GRID - np.sqrt(vectors.shape[1]) / 2
    table: NDArray[np.float32] = (np.rint(vectors / np.maximum(norm, 1e-12) * length) / GRID).astype(np.float32)
    return table


def check_grid(vectors: NDArray[np.float32]) -> None:
    """Refuse vectors whose dot products would not be exact.

    Raises:
        ValueError: names the first row that is not on the grid, not finite, or longer than 1.
    """
    row = 0
    for block in _blocks(vectors):
        steps = block * np.float32(GRID)
        bad = ((steps != np.rint(steps)) | ~np.isfinite(steps)).any(axis=1) | ((steps**2).sum(axis=1) > GRID**2)
        if bad.any():
            raise ValueError(
                f"the vector of item {row + int(bad.argmax())} is not on the grid (finite multiples of 1/{GRID}, "
                "length at most 1), so its cosines would not be exact. Make the vectors with `embed`, or pass them "
                "through reclora_dist.retrieval.on_grid."
            )
        row += len(block)


def _blocks(vectors: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [vectors[start : start + 65_536] for start in range(0, len(vectors), 65_536)]


def _mixed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of the value."""
    value = value ^ (value >> np.uint32(16))
    value = value * np.uint32(0x85EBCA6B)
    value = value ^ (value >> np.uint32(13))
    value = value * np.uint32(0xC2B2AE35)
    return value ^ (value >> np.uint32(16))
