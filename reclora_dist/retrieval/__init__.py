"""Which events of a user's past a sample gets to see.

Spark jobs and the service both call this, so a history is the same in training and in serving.
"""

from reclora_dist.retrieval.nearest import Past, retrieve
from reclora_dist.retrieval.similarity import (
    Category,
    Known,
    Random,
    Semantic,
    SimHash,
    Similarity,
    check_grid,
    on_grid,
    similarity,
)

__all__ = [
    "Category",
    "Known",
    "Past",
    "Random",
    "Semantic",
    "SimHash",
    "Similarity",
    "check_grid",
    "on_grid",
    "retrieve",
    "similarity",
]
