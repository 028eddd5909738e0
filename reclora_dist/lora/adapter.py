"""The adapter folder: what scoring needs besides backbone and data, which it names (docs/checkpoint-format.md)."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from reclora_dist.backbone.load import load_backbone
from reclora_dist.config.load import build
from reclora_dist.config.schema import BackboneConfig, LoraConfig, PromptConfig, RetrievalConfig
from reclora_dist.contract.manifest import ContractError, Manifest, add_file, commit, read_manifest, verified
from reclora_dist.contract.schema import ADAPTER, BACKBONE
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import crm_files, load_crm
from reclora_dist.lora.model import RecLora

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@dataclass(frozen=True)
class Reference:
    """A dataset that an adapter needs: its place (relative to the adapter if it starts with a dot) and its digest."""

    uri: str
    content_digest: str


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is; ``backbone_path`` is a local folder or a hub id."""

    name: str
    backbone: BackboneConfig
    backbone_path: str
    prompt: PromptConfig
    lora: LoraConfig
    retrieval: RetrievalConfig
    references: dict[str, Reference]


@dataclass(frozen=True)
class AdapterIdentity:
    """Config digest and parents of the training run that made an adapter."""

    config_digest: str
    parents: Mapping[str, str]


def save_adapter(
    folder: Folder,
    config: AdapterConfig,
    parameters: Mapping[str, Tensor],
    crm: tuple[Folder, Manifest],
    identity: AdapterIdentity,
    facts: Mapping[str, Any],
) -> Manifest:
    """Write an adapter folder; the manifest comes last.

    Args:
        parameters: the trained parameters by name.
        crm: folder and manifest of the frozen CRM; its two files are copied.
        facts: figures of the training, shown on the model card.
    """
    crm_folder, crm_manifest = crm
    files = [
        add_file(folder, CONFIG, json.dumps(dataclasses.asdict(config), indent=1).encode()),
        add_file(folder, WEIGHTS, save({name: value.contiguous() for name, value in parameters.items()})),
        *(add_file(folder, e.path, verified(crm_folder, e)) for e in crm_files(crm_manifest)),
        add_file(folder, CARD, model_card(config, facts).encode()),
    ]
    manifest = Manifest(
        ADAPTER.name, ADAPTER.version, identity.config_digest, dict(identity.parents), tuple(files), dict(facts)
    )
    return commit(folder, manifest)


def read_adapter_config(folder: Folder) -> tuple[AdapterConfig, Manifest]:
    """Config and manifest of an adapter folder.

    Raises:
        ContractError: it is no adapter folder, of another version, or damaged.
    """
    manifest = read_manifest(folder, ADAPTER)
    entry = next(e for e in manifest.files if e.path == CONFIG)
    return build(AdapterConfig, json.loads(verified(folder, entry))), manifest


def load_adapter(folder: Folder) -> tuple[RecLora, AdapterConfig]:
    """The model of an adapter folder, in eval mode.

    Raises:
        ContractError: the folder is damaged, or the backbone that its config names is not the one it was trained on.
    """
    config, manifest = read_adapter_config(folder)
    _check_backbone(folder, config, manifest.parents)
    entry = next(e for e in manifest.files if e.path == WEIGHTS)
    parameters = load(verified(folder, entry))
    backbone = load_backbone(config.backbone, resolved_backbone(folder, config))
    model = RecLora(backbone, load_crm(folder, manifest), config.backbone, config.lora)
    load_trained(model, parameters, folder.uri)
    return model.eval(), config


def _check_backbone(folder: Folder, config: AdapterConfig, parents: Mapping[str, str]) -> None:
    """A run's own backbone may have been trained again: other weights of the same shapes would score, and badly."""
    if "backbone" not in parents:
        return
    found = read_manifest(folder.resolve(config.backbone_path), BACKBONE).content_digest
    if found != parents["backbone"]:
        raise ContractError(
            f"adapter {config.name!r} was trained with backbone {parents['backbone'][:12]}…, but "
            f"{config.backbone_path!r} now holds {found[:12]}…; train the adapter again or restore the backbone"
        )


def resolved_backbone(folder: Folder, config: AdapterConfig) -> str:
    """Where the backbone of an adapter lies: a path relative to the adapter's folder, an absolute one, or a hub id."""
    if not config.backbone_path.startswith("."):
        return config.backbone_path
    return str(folder.resolve(config.backbone_path).local())


def load_trained(model: RecLora, parameters: Mapping[str, Tensor], origin: str) -> None:
    """Copy an adapter's weights into a model.

    Raises:
        ContractError: names or shapes differ, so the adapter belongs to another backbone or config.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(own.keys() | parameters.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (own, parameters))
        if ours != theirs:
            raise ContractError(
                f"{origin!r}: {name!r} has shape {theirs} in the adapter and {ours} in the model; "
                "the adapter was trained for another backbone or config"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def model_card(config: AdapterConfig, facts: Mapping[str, Any]) -> str:
    """A Markdown card: what it is, what it was made from, how it did on validation, and its limits."""
    lora = config.lora
    figures = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    return "\n".join(
        [
            f"# Adapter `{config.name}`",
            "",
            f"{lora.experts} meta-LoRAs of rank {lora.rank} ({lora.mode} mode, gate: {lora.gate}) on "
            f"{', '.join(config.backbone.targets) or 'queries and values'} of `{config.backbone_path}`. It predicts "
            "whether a user will like an item; the score is the probability of yes.",
            "",
            "## Training",
            "| figure | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in figures.items()),
            "",
            "## Data",
            *(
                f"* {name}: content digest `{ref.content_digest[:16]}`"
                for name, ref in sorted(config.references.items())
            ),
            "",
            "## Limits",
            "Scores hold for users and items of the data above and for the time it covers; a new item has only its "
            "text and fields, a user without history gets no score. The figures are of the validation split; see the "
            "evaluation's report for the test split.",
            "",
        ]
    )
