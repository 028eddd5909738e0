"""A backbone that is partitioned over the workers while it is read: no process ever holds all of it (ZeRO-3)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reclora_dist.backbone.load import Backbone, answer_ids, load_tokenizer, logit_form
from reclora_dist.config.schema import BackboneConfig, EngineConfig, TrainConfig


def load_partitioned(config: BackboneConfig, path: str, engine: EngineConfig, train: TrainConfig) -> Backbone:
    """Like ``load_backbone``, of the safetensors files in the folder or hub id ``path``; collective.

    Every layer is partitioned as soon as it is made; then one tensor after the other is read by rank 0 and divided. Of
    a causal model's head only the rows of the two answers are read.

    Raises:
        ValueError: a parameter of the model is in none of the files, or has another shape there.
    """
    import deepspeed
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, initialization

    from reclora_dist.train.deepspeed_engine import deepspeed_config

    home = _folder(path)
    settings, dtype = AutoConfig.from_pretrained(home), getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    with torch.device("meta"):
        largest = max(parameter.numel() for parameter in AutoModel.from_config(settings, dtype=dtype).parameters())
    with (
        initialization.no_init_weights(),
        # it takes the type from this config; one that it is given by name is ignored where there is no float16
        deepspeed.zero.Init(config_dict_or_path=deepspeed_config(engine, train, config.dtype, largest)),
    ):
        model = AutoModel.from_config(settings, dtype=dtype)
    if config.kind == "encoder" and hasattr(model, "pooler"):
        model.pooler = None
    rows, bias, form, prefix = None, None, (1.0, 0.0), getattr(model, "base_model_prefix", "")
    if config.kind != "encoder":
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        prefix, form, head = whole.base_model_prefix, logit_form(whole), whole.get_output_embeddings()
        names = _name_of(whole, head.weight), _name_of(whole, whole.get_input_embeddings().weight)  # or a tied one
        ids = answer_ids(load_tokenizer(path), config.answers)
        rows = _rows(home, names, ids).to(dtype)
        if getattr(head, "bias", None) is not None:
            bias = _rows(home, (_name_of(whole, head.bias),), ids).to(dtype)
    _fill(model, home, prefix)
    _compute_buffers(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Backbone(model, rows, model.config.hidden_size, bias, form)


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def _fill(model: nn.Module, home: Path, prefix: str) -> None:
    """Give every partitioned parameter its value, one at a time."""
    import deepspeed

    missing = dict(model.named_parameters())
    for name, read in _tensors(home):
        parameter = missing.pop(name.removeprefix(f"{prefix}."), None)
        if parameter is None:
            continue  # a head or a pooler that we have no use for
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                value = read()
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{name!r} has shape {list(value.shape)} in {str(home)!r}, but {list(parameter.shape)} by its "
                        "config.json; download the model again"
                    )
                parameter.data.copy_(value)
    if missing:
        raise ValueError(
            f"{str(home)!r} lacks {len(missing)} parameters of its model, among them {next(iter(missing))!r}: write it "
            "again with save_pretrained of the installed transformers"
        )


def _compute_buffers(model: Any) -> None:
    """Compute the float buffers (frequencies of rotary positions) anew: they were made in the parameters' type."""
    for name, module in list(model.named_modules()):
        own = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
        if own and not list(module.parameters()):
            twin = type(module)(config=model.config).to(own[0].device)
            model.set_submodule(name, twin)


def _tensors(home: Path) -> Iterator[tuple[str, Any]]:
    """Name of every tensor of the files, and a function that reads it."""
    for file in _files(home):
        with safe_open(home / file, "pt") as opened:
            for name in list(opened.keys()):
                yield name, lambda name=name, opened=opened: opened.get_tensor(name)


def _rows(home: Path, names: tuple[str, ...], rows: list[int]) -> Tensor:
    """Rows of the first of the named tensors that the files have; a tied head is stored once, as the embedding."""
    where = {name: file for file in _files(home) for name in _names(home / file)}
    name = next((name for name in names if name in where), None)
    if name is None:
        raise ValueError(f"{str(home)!r} has none of {list(names)}, the head of its model; take a causal model")
    with safe_open(home / where[name], "pt") as opened:
        stored = opened.get_slice(name)
        return torch.cat([stored[row : row + 1] for row in rows])


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _files(home: Path) -> list[str]:
    index = home / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    shards: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    return sorted(set(shards.values()))


def _name_of(model: nn.Module, wanted: Tensor) -> str:
    return next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted)
