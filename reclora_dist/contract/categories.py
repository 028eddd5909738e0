"""The category of every item, for the strategy that compares categories."""

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import Manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.storage import Folder


def item_categories(events: Folder, manifest: Manifest, field: str) -> NDArray[np.int32]:
    """The values of an item field by item position, int32 [items + 1]; 0 is unknown.

    Args:
        events: folder of an events dataset.
        manifest: its manifest.
        field: name of the field; empty takes the first.

    Raises:
        ValueError: the items have no field of that name.
    """
    known = list(manifest.facts["item_fields"])
    if not known or (field and field not in known):
        raise ValueError(
            f"strategy = category compares the item field {field or 'that comes first'!r}; items have: "
            f"{', '.join(known) or 'no field'}. Name one in category, or more columns in source.item_fields."
        )
    items = read_parts(events, manifest.select("items/"), ["item", "fields"])
    flat = items["fields"].combine_chunks().flatten().to_numpy().reshape(-1, len(known))
    table = np.zeros(manifest.facts["items"] + 1, np.int32)
    table[items["item"].to_numpy()] = flat[:, known.index(field) if field else 0]
    return table
