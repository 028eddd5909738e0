"""Build a CRM from the facts of the data, save it, and load it again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from reclora_dist.config.load import build
from reclora_dist.config.schema import CrmConfig
from reclora_dist.contract.manifest import ContractError, FileEntry, Manifest, add_digested, digested, verified
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.dcnv2 import DcnV2
from reclora_dist.crm.deepfm import DeepFm
from reclora_dist.crm.gru4rec import Gru4Rec
from reclora_dist.crm.inputs import Vocabulary, item_fields_tensor
from reclora_dist.crm.layers import initialise
from reclora_dist.crm.sasrec import SasRec
from reclora_dist.crm.sim import Sim

Crm = Sim | Gru4Rec | SasRec | DeepFm | DcnV2
"""Any CRM: ``CrmBatch`` to ``CrmOutput``, with ``config``, ``inputs``, ``state_width`` and ``user_state_width``."""

KINDS: Mapping[str, type[Crm]] = {
    "sim": Sim,
    "din": Sim,
    "gru4rec": Gru4Rec,
    "sasrec": SasRec,
    "deepfm": DeepFm,
    "dcnv2": DcnV2,
}

CONFIG, WEIGHTS = "crm_config.json", "crm.safetensors"


def vocabulary_of(facts: Mapping[str, Any], ignore: Sequence[str] = ()) -> Vocabulary:
    """Sizes of the embeddings, from the facts of an events manifest; a field to ``ignore`` has no values.

    Raises:
        ValueError: the log has no field of that name.
    """
    user_fields, item_fields = facts["user_fields"], facts["item_fields"]
    if unknown := sorted({*ignore} - {*user_fields, *item_fields}):
        raise ValueError(
            f"crm.ignore names {unknown}: users of this log have the fields {[*user_fields]}, items {[*item_fields]}"
        )

    def sizes(fields: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
        return tuple(0 if name in ignore else len(values) for name, values in fields.items())

    return Vocabulary(
        items=facts["items"],
        users=facts["users"],
        levels=len(facts["rating_levels"]),
        user_fields=sizes(user_fields),
        item_fields=sizes(item_fields),
    )


def build_crm(config: CrmConfig, facts: Mapping[str, Any], items: pa.Table) -> Crm:
    """An untrained CRM for the data that ``facts`` and the item table describe."""
    model = KINDS[config.kind](config, vocabulary_of(facts, config.ignore), _fields_of(items))
    initialise(model)
    return model


def _fields_of(items: pa.Table) -> Tensor:
    return item_fields_tensor(items["fields"].to_pylist(), items["item"].to_pylist())


def add_crm(folder: Folder, model: Crm, vocabulary: Vocabulary) -> list[FileEntry]:
    """Write a CRM's config and weights into a dataset folder."""
    record = {"config": dataclasses.asdict(model.config), "vocabulary": dataclasses.asdict(vocabulary)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return [
        add_digested(folder, CONFIG, json.dumps(record, indent=1).encode()),
        add_digested(folder, WEIGHTS, save(weights)),
    ]


def load_crm(folder: Folder, manifest: Manifest, items: pa.Table | None = None) -> Crm:
    """The trained CRM of a CRM folder or an adapter folder, in eval mode.

    Args:
        items: today's item table (``item``, ``fields``), which may hold items that came after the training: their
            fields are read. Without it, such items are unknown.

    Raises:
        ContractError: a file is missing or damaged, or the items have another number of fields.
    """
    settings, tensors = (verified(folder, entry) for entry in crm_files(folder, manifest))
    record, weights = json.loads(settings), load(tensors)
    config, vocabulary = build(CrmConfig, record["config"]), build(Vocabulary, record["vocabulary"])
    model = KINDS[config.kind](config, vocabulary, weights["inputs.item_fields"])
    model.load_state_dict(weights)
    if items is not None:
        model.inputs.item_fields = _extended(model.inputs.item_fields, _fields_of(items))
    return model.eval()


def _extended(known: Tensor, fields: Tensor) -> Tensor:
    """The fields of the items a CRM knows, and those of the items that came later."""
    if known.shape[1] != fields.shape[1]:
        raise ContractError(
            f"the items have {fields.shape[1]} fields, the CRM was trained with {known.shape[1]}: train it on this log"
        )
    return torch.cat([known, fields[len(known) :]])


def crm_files(folder: Folder, manifest: Manifest) -> Sequence[FileEntry]:
    """The entries of a CRM's config and weights.

    Raises:
        ContractError: the dataset has no CRM.
    """
    return [digested(folder, manifest, name) for name in (CONFIG, WEIGHTS)]
