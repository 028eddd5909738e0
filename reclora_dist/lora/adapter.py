"""The adapter folder: what scoring needs besides backbone and data, which it names (docs/checkpoint-format.md)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from reclora_dist.backbone.load import load_backbone
from reclora_dist.config.load import build
from reclora_dist.config.schema import BackboneConfig, LoraConfig, PromptConfig, RetrievalConfig
from reclora_dist.contract.manifest import (
    ContractError,
    Manifest,
    add_digested,
    add_file,
    commit,
    digested,
    read_manifest,
    verified,
)
from reclora_dist.contract.schema import ADAPTER, BACKBONE
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import crm_files, load_crm
from reclora_dist.lora.gate import GateStack
from reclora_dist.lora.model import RecLora

_DTYPES: Mapping[torch.dtype, Literal["float32", "bfloat16"]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

START_NOISE = 0.1
"""Standard deviation of the noise on experts that start from one pair, as a share of that of the pair's B."""

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
    """Write an adapter folder: its files, then the manifest that names them, then the model card.

    The card is for people, who add a license or a remark to it: the manifest does not name it, no reader needs it.

    Args:
        parameters: the trained parameters by name.
        crm: folder and manifest of the frozen CRM; its two files are copied.
        facts: figures of the training, shown on the model card; see ``model_card``.
    """
    crm_folder, crm_manifest = crm
    files = [
        add_digested(folder, CONFIG, json.dumps(dataclasses.asdict(config), indent=1).encode()),
        add_digested(folder, WEIGHTS, save({name: value.contiguous() for name, value in parameters.items()})),
        *(add_file(folder, e.path, verified(crm_folder, e)) for e in crm_files(crm_folder, crm_manifest)),
    ]
    manifest = Manifest(
        ADAPTER.name, ADAPTER.version, identity.config_digest, dict(identity.parents), tuple(files), dict(facts)
    )
    commit(folder, manifest, fixed=(CARD,))  # no card is better than that of another adapter
    folder.write(CARD, model_card(config, identity.parents, facts).encode())
    return manifest


def read_adapter_config(folder: Folder) -> tuple[AdapterConfig, Manifest]:
    """Config and manifest of an adapter folder.

    Raises:
        ContractError: it is no adapter folder, of another version, or damaged.
    """
    manifest = read_manifest(folder, ADAPTER)
    content = verified(folder, digested(folder, manifest, CONFIG))
    return build(AdapterConfig, json.loads(content)), manifest


def load_adapter(
    folder: Folder, dtype: torch.dtype | None = None, base: str | None = None
) -> tuple[RecLora, AdapterConfig]:
    """The model of an adapter folder, in eval mode, and its config with the changes asked for here.

    Args:
        dtype: float32 or bfloat16, the type of the backbone in place of the configured one.
        base: folder or hub id of the backbone in place of the configured one.

    Raises:
        ContractError: the folder is damaged, or the backbone is not the one that the adapter was trained on.
        ValueError: the dtype is another one.
    """
    config, manifest = read_adapter_config(folder)
    config = _changed(config, dtype, base)
    _check_backbone(folder, config, manifest.parents)
    parameters = read_weights(folder)
    backbone = load_backbone(config.backbone, resolved_backbone(folder, config))
    model = RecLora(backbone, load_crm(folder, manifest), config.backbone, config.lora)
    load_trained(model, parameters, folder.uri)
    return model.eval(), config


def _changed(config: AdapterConfig, dtype: torch.dtype | None, base: str | None) -> AdapterConfig:
    if dtype is not None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype} is not supported: take {' or '.join(map(str, _DTYPES))}")
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, dtype=_DTYPES[dtype]))
    if base is not None:
        path = Path(base).expanduser()
        config = dataclasses.replace(config, backbone_path=str(path.resolve()) if path.is_dir() else base)
    return config


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


def read_weights(folder: Folder) -> dict[str, Tensor]:
    """The trained parameters of an adapter folder, by name.

    Raises:
        ContractError: it is no adapter folder, of another version, or damaged.
    """
    return load(verified(folder, digested(folder, read_manifest(folder, ADAPTER), WEIGHTS)))


def start_from(model: RecLora, parameters: Mapping[str, Tensor], seed: int) -> None:
    """Give an untrained model the weights of a trained one where name and shape are the same.

    A single pair becomes every expert of its bank, so the model says what the trained one says, whatever the mixture.
    Their B gets a little noise: of equal experts the gate would learn nothing. In mode ``matrix`` new gates say the
    identity, whatever they read, at first.

    Args:
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = parameters.get(name)
            if not parameter.requires_grad or source is None:
                continue
            if source.shape == parameter.shape:
                parameter.copy_(source)
            elif ".bank." in name and source.shape == (1, *parameter.shape[1:]):
                parameter.copy_(source.expand_as(parameter))
                if name.endswith(".B"):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(START_NOISE * source.std() * noise)
        if model.config.mode == "matrix" and isinstance(model.gates, GateStack) and "gates.w2" not in parameters:
            model.gates.w2.zero_()


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


def model_card(config: AdapterConfig, parents: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """A Markdown card with the front matter of the Hugging Face hub; the license is left to whoever publishes it.

    Args:
        parents: content digests of what the training read, by name.
        facts: figures of the training; ``validation_auc`` and ``history``, its values by step, are among them.
    """
    lora = config.lora
    figures = [(key, value) for key, value in facts.items() if isinstance(value, int | float | str)]
    known = {key: reference.content_digest for key, reference in config.references.items()} | dict(parents)
    return "\n".join(
        [
            front_matter(_hub_record(config, known, facts)),
            f"# Adapter `{config.name}`",
            "",
            f"{lora.experts} meta-LoRAs of rank {lora.rank} ({lora.mode} mode, gate: {lora.gate}) on "
            f"{', '.join(config.backbone.targets) or 'queries and values'} of `{config.backbone_path}` (RecLoRA, "
            "arXiv 2408.03533). It predicts whether a user will like an item; the score is the probability of yes.",
            "",
            _USE,
            "## Training",
            *_descent(lora),
            *_table(("figure", "value"), figures),
            "",
            "## Validation",
            *_table(("step", "AUC"), [(point["step"], f"{point['validation_auc']:.4f}") for point in facts["history"]]),
            "",
            "The weights are those of the best step. See the evaluation's report for the test split.",
            "",
            "## Data",
            *_table(("dataset", "content digest"), [(name, f"`{digest}`") for name, digest in sorted(known.items())]),
            "",
            _LIMITS,
        ]
    )


def _descent(lora: LoraConfig) -> list[str]:
    """Which adapters of its run it was made from, if any."""
    told = [f"It started from the weights of `{lora.start}`."] if lora.start else []
    if lora.teacher:
        told.append(f"It learned the probabilities that `{lora.teacher}` gives the samples, in place of their labels.")
    return [" ".join(told), ""] if told else []


_USE = """## Use
```python
from reclora_dist.evaluate.scorer import Scorer, feature_store

scorer = Scorer.from_pretrained("THIS FOLDER")
store = feature_store("THIS FOLDER", scorer.config)
scorer.score(store.rows(["ITEM", "ITEM"], scorer.config.retrieval, user="USER"))
```
"""

_LIMITS = """## Intended use
Scoring of candidates that something else retrieved, for users of the log or users whose history comes with the request.
It is not meant to rank a whole catalogue, nor for decisions about people.

## Limits
Scores hold for users and items of the data above and for the time it covers, with the biases of what was shown and
rated then. A new item has only its text and fields; a user without history gets no score.
"""


def _hub_record(config: AdapterConfig, known: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Front matter by the hub's names; ``model-index`` is how it takes figures."""
    result = {
        "task": {"type": "text-classification", "name": "click-through rate prediction"},
        "dataset": {
            "type": "reclora.shards",
            "name": "text samples",
            "split": "validation",
            "revision": known["shards"],
        },
        "metrics": [{"type": "roc_auc", "name": "AUC", "value": facts["validation_auc"]}],
    }
    return {
        "base_model": config.backbone_path,
        "library_name": "reclora_dist",
        "tags": ["recommendation", "click-through-rate", "lora", "reclora"],
        "metrics": ["roc_auc"],
        "model-index": [{"name": config.name, "results": [result]}],
    }


def front_matter(record: Mapping[str, Any]) -> str:
    """YAML between two lines of dashes, as the hub reads it from the top of a card."""
    return f"---\n{yaml.safe_dump(dict(record), sort_keys=False)}---"


def _table(header: tuple[str, str], rows: Sequence[tuple[object, object]]) -> list[str]:
    return [f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows)]
