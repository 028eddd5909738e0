"""Build a CRM from the facts of the data, save it, and load it again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from safetensors.torch import load, save

from reclora_dist.config.load import build
from reclora_dist.config.schema import CrmConfig
from reclora_dist.contract.manifest import FileEntry, Manifest, add_digested, digested, verified
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.sim import Sim, Vocabulary, item_fields_tensor

CONFIG, WEIGHTS = "crm_config.json", "crm.safetensors"


def vocabulary_of(facts: Mapping[str, Any]) -> Vocabulary:
    """Sizes of the embeddings, from the facts of an events manifest."""
    return Vocabulary(
        items=facts["items"],
        users=facts["users"],
        levels=len(facts["rating_levels"]),
        user_fields=tuple(len(values) for values in facts["user_fields"].values()),
        item_fields=tuple(len(values) for values in facts["item_fields"].values()),
    )


def build_crm(config: CrmConfig, facts: Mapping[str, Any], items: pa.Table) -> Sim:
    """An untrained CRM for the data that ``facts`` and the item table describe."""
    rows = items["fields"].to_pylist()
    return Sim(config, vocabulary_of(facts), item_fields_tensor(rows, items["item"].to_pylist()))


def add_crm(folder: Folder, model: Sim, vocabulary: Vocabulary) -> list[FileEntry]:
    """Write a CRM's config and weights into a dataset folder."""
    record = {"config": dataclasses.asdict(model.config), "vocabulary": dataclasses.asdict(vocabulary)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return [
        add_digested(folder, CONFIG, json.dumps(record, indent=1).encode()),
        add_digested(folder, WEIGHTS, save(weights)),
    ]


def load_crm(folder: Folder, manifest: Manifest) -> Sim:
    """The trained CRM of a CRM folder or an adapter folder, in eval mode.

    Raises:
        ContractError: a file is missing or damaged.
    """
    config, tensors = (verified(folder, entry) for entry in crm_files(folder, manifest))
    record, weights = json.loads(config), load(tensors)
    vocabulary = build(Vocabulary, record["vocabulary"])
    model = Sim(build(CrmConfig, record["config"]), vocabulary, weights["item_fields"])
    model.load_state_dict(weights)
    return model.eval()


def crm_files(folder: Folder, manifest: Manifest) -> Sequence[FileEntry]:
    """The entries of a CRM's config and weights.

    Raises:
        ContractError: the dataset has no CRM.
    """
    return [digested(folder, manifest, name) for name in (CONFIG, WEIGHTS)]
