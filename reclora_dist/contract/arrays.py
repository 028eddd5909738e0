"""Arrays of a dataset: .npy files under a name that carries their digest, read back verified."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import ContractError, FileEntry, Manifest, add_file, file_entry, verified
from reclora_dist.contract.storage import Folder


def add_array(folder: Folder, name: str, array: NDArray[Any]) -> FileEntry:
    """Write ``array`` as ``{name}-{digest}.npy``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    return add_file(folder, f"{name}-{file_entry('', content).sha256[:12]}.npy", content)


def array_entry(folder: Folder, manifest: Manifest, name: str) -> FileEntry:
    """The one file of the array ``name``.

    Raises:
        ContractError: the dataset has none, or several.
    """
    entries = manifest.select(f"{name}-")
    if len(entries) != 1:
        raise ContractError(
            f"{folder.uri!r} names {len(entries)} files {name}-*.npy, not one. Run the stage that writes it again."
        )
    return entries[0]


def read_array(folder: Folder, manifest: Manifest, name: str) -> NDArray[Any]:
    """The array ``name`` of a dataset.

    Raises:
        ContractError: the dataset has none, or several, or the file is missing or its digest does not match.
    """
    content = verified(folder, array_entry(folder, manifest, name))
    array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array
