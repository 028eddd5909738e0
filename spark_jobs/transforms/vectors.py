"""What a strategy compares, on executors: item vectors memory-mapped where the file is local, else broadcast."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract.arrays import array_entry
from reclora_dist.contract.categories import item_categories
from reclora_dist.contract.manifest import ContractError, FileEntry, Manifest, verified
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import Known, Semantic, Similarity, check_grid, similarity

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARES_VECTORS = ("semantic", "simhash")
"""Strategies that need item vectors."""


@dataclass(frozen=True)
class SharedVectors:
    """Something small that travels to executors and opens the vectors there."""

    path: str
    broadcast: Any = None

    def open(self) -> NDArray[np.float32]:
        """The vectors, float32 [items + 1, D]."""
        source = self.path if self.broadcast is None else io.BytesIO(self.broadcast.value)
        mode: Literal["r"] | None = "r" if self.broadcast is None else None
        table: NDArray[np.float32] = np.load(source, mmap_mode=mode, allow_pickle=False)
        return table.view(np.ndarray)


@dataclass(frozen=True)
class SharedSimilarity:
    """The strategy's scores on executors: vectors where they lie, or the whole object broadcast.

    Items above ``known`` came after the vectors were made; None: there are none.
    """

    vectors: SharedVectors | None = None
    whole: Any = None
    known: int | None = None

    def open(self) -> Similarity | None:
        """The scores; None for the newest events."""
        found: Similarity | None = None if self.whole is None else self.whole.value
        if self.vectors is not None:
            found = Semantic(self.vectors.open())
        return found if found is None or self.known is None else Known(found, self.known)


def share(
    spark: "SparkSession", config: RetrievalConfig, folders: Mapping[str, Folder], manifests: Mapping[str, Manifest]
) -> SharedSimilarity:
    """Check what the strategy compares, and make it available to executors.

    Raises:
        ContractError: the vectors' file is missing, its bytes changed, or it has vectors of another number of items.
        ValueError: the vectors are not on the grid or not finite, or the items lack the field that is compared.
    """
    vectors = _checked(spark, folders, manifests) if config.strategy in COMPARES_VECTORS else None
    rows = len(vectors.open()) if vectors else 0
    known = rows - 1 if vectors and rows <= manifests["events"].facts["items"] else None
    if config.strategy == "semantic":
        return SharedSimilarity(vectors, known=known)
    by_category = config.strategy == "category"
    categories = item_categories(folders["events"], manifests["events"], config.category) if by_category else None
    scores = similarity(config, vectors.open() if vectors else None, categories)
    return SharedSimilarity(whole=None if scores is None else spark.sparkContext.broadcast(scores), known=known)


def _checked(spark: "SparkSession", folders: Mapping[str, Folder], manifests: Mapping[str, Manifest]) -> SharedVectors:
    folder, items = folders["vectors"], manifests["events"].facts["items"]
    shared = _shared(spark, folder, array_entry(folder, manifests["vectors"], "vectors"))
    table = shared.open()
    by_days = "days" in manifests["events"].facts
    if table.ndim != 2 or not (len(table) == items + 1 or (by_days and 0 < len(table) <= items)):
        raise ContractError(
            f"{folder.uri!r} has vectors of shape {list(table.shape)}, but the log has {items} items, which takes "
            f"{items + 1} rows. Run `embed` on these events."
        )
    check_grid(table)
    return shared


def _shared(spark: "SparkSession", folder: Folder, entry: FileEntry) -> SharedVectors:
    if not isinstance(folder.fs, LocalFileSystem):
        return SharedVectors("", spark.sparkContext.broadcast(verified(folder, entry)))
    with open(folder.path(entry.path), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} has SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…: "
            "its bytes changed after it was written. Run `embed` again."
        )
    return SharedVectors(folder.path(entry.path))
