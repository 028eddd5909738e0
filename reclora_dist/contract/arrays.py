"""Arrays of a dataset: .npy files under a name that carries their digest, read back verified."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry, Manifest, add_digested, digested, verified
from reclora_dist.contract.storage import Folder


def add_array(folder: Folder, name: str, array: NDArray[Any]) -> FileEntry:
    """Write ``array`` as ``{name}-{digest}.npy``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return add_digested(folder, f"{name}.npy", buffer.getvalue())


def array_entry(folder: Folder, manifest: Manifest, name: str) -> FileEntry:
    """The one file of the array ``name``.

    Raises:
        ContractError: the dataset has none, or several.
    """
    return digested(folder, manifest, f"{name}.npy")


def read_array(folder: Folder, manifest: Manifest, name: str) -> NDArray[Any]:
    """The array ``name`` of a dataset.

    Raises:
        ContractError: the dataset has none, or several, or the file is missing or its digest does not match.
    """
    content = verified(folder, array_entry(folder, manifest, name))
    array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array
