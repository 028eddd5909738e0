"""The users' fields, read on executors where they are needed."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.storage import Folder


@dataclass(frozen=True)
class Profiles:
    """Fields of the users of an events dataset; ``firsts`` is the first user of each part.

    A task asks for users that stand together, so it reads one part or a few.
    """

    folder: Folder
    entries: Sequence[FileEntry]
    firsts: Sequence[int]
    fields: int

    def of(self, users: NDArray[Any]) -> pa.Array:
        """The fields of some users, lists of ``fields`` positions."""
        if not self.fields:
            return pa.array([[]] * len(users), pa.list_(pa.int32()))
        first, last = (bisect_right(self.firsts, int(user)) - 1 for user in (users.min(), users.max()))
        profile = read_parts(self.folder, self.entries[first : last + 1], ["user", "fields"])
        flat = profile["fields"].combine_chunks().flatten().to_numpy().reshape(-1, self.fields)
        rows = np.searchsorted(profile["user"].to_numpy(), users)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat[rows].ravel(), pa.int32()), self.fields)
