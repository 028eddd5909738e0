"""One user's adapter as a plain LoRA that PEFT loads: for a fixed mixture the bank of a matrix is one low-rank pair."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from reclora_dist import __version__
from reclora_dist.config.schema import BackboneConfig
from reclora_dist.contract.storage import Folder
from reclora_dist.lora.adapter import CARD, AdapterConfig, front_matter
from reclora_dist.lora.bank import Bank
from reclora_dist.lora.model import RecLora

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
"""The names that PEFT looks for, and an encoder's two-class head, which PEFT knows nothing of."""


@dataclass(frozen=True)
class Origin:
    """What an exported adapter was made from: the adapter's content digest, its parents' digests, the user (or all)."""

    content_digest: str
    parents: Mapping[str, str]
    user: str


def check_exportable(config: AdapterConfig) -> None:
    """Refuse an adapter that is no fixed LoRA for a user.

    Raises:
        ValueError: its mixture depends on the target item, or its score needs the CRM.
    """
    lora, strategy = config.lora, config.retrieval.strategy
    if lora.gate == "crm":
        raise ValueError(
            f"adapter {config.name!r} has gate 'crm': its mixture depends on the target item, so there is no one "
            "adapter per user; train one with gate=user"
        )
    if lora.gate == "user" and strategy != "recent":
        raise ValueError(
            f"adapter {config.name!r} has gate 'user' and retrieval.strategy {strategy!r}: the history that the gate "
            "reads depends on the target item; train with retrieval.strategy=recent"
        )
    if lora.head != "answers":
        raise ValueError(
            f"adapter {config.name!r} has head {lora.head!r}: its score needs the CRM, which a PEFT folder cannot "
            "hold; train one with head=answers"
        )


def lora_pair(bank: Bank, mixture: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair whose update ``scale · B A x`` is that of ``bank`` under one mixture.

    Args:
        mixture: weights of the experts [K], in ``matrix`` mode the rows of M [r * r]; None without a gate.

    Returns:
        A [rank, d_in] and B [d_out, rank]; in ``outputs`` mode the experts stand side by side and their ranks add up.
    """
    a, b = bank.A.detach().float(), bank.B.detach().float()
    if mixture is None:
        return a[0], b[0].T
    if bank.mode == "weights":
        return torch.tensordot(mixture, a, 1), torch.tensordot(mixture, b, 1).T
    if bank.mode == "outputs":
        return a.flatten(0, 1), (mixture[:, None, None] * b).flatten(0, 1).T
    return a[0], b[0].T @ mixture.unflatten(0, (a.shape[1], a.shape[1]))


def peft_tensors(banks: Mapping[str, Bank], mixture: Tensor | None, prefix: str) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` by PEFT's names, float32.

    Args:
        banks: by the name of their layer within the adapted stack.
        mixture: of one user, [matrices, width]; None without a gate.
        prefix: where that stack lies in the model that PEFT wraps, with its dot.
    """
    tensors: dict[str, Tensor] = {}
    for index, (name, bank) in enumerate(banks.items()):
        a, b = lora_pair(bank, None if mixture is None else mixture[index].float())
        layer = f"base_model.model.{prefix}{name}"
        tensors |= {f"{layer}.lora_A.weight": a.contiguous(), f"{layer}.lora_B.weight": b.contiguous()}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def peft_config(config: AdapterConfig, base: str, model: RecLora, rank: int, prefix: str) -> dict[str, object]:
    """The content of ``adapter_config.json``; alpha is such that PEFT's alpha / rank is the banks' scale."""
    scale = next(iter(model.banks.values())).scale
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if config.backbone.kind == "encoder" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": config.lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": [prefix + name for name in model.banks],
    }


def stack_prefix(backbone: BackboneConfig, path: str) -> str:
    """Where the adapted stack lies in what ``AutoModelForCausalLM`` or, for an encoder, ``AutoModel`` loads."""
    if backbone.kind == "encoder":
        return ""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    stack = causal.get_decoder()
    return next(f"{name}." for name, module in causal.named_modules() if module is stack)


def write_peft(
    out: Folder, config: AdapterConfig, base: str, model: RecLora, mixture: Tensor | None, origin: Origin
) -> None:
    """Write a PEFT folder; its config comes last, so that PEFT refuses what a kill left unfinished.

    Args:
        base: folder or hub id of the backbone.
        mixture: of one user, [matrices, width]; None without a gate.

    Raises:
        ValueError: the folder holds something else than an earlier export.
    """
    foreign = sorted(set(out.files()) - {CONFIG, WEIGHTS, HEAD, CARD})
    if foreign:
        raise ValueError(
            f"export.out {out.uri!r} holds {foreign[0]!r}, which no export wrote; give a folder of its own"
        )
    out.delete(CONFIG)
    prefix = stack_prefix(config.backbone, base)
    tensors = peft_tensors(model.banks, mixture, prefix)
    rank = len(next(iter(tensors.values())))
    out.write(WEIGHTS, save(tensors, {"format": "pt"}))
    head = model.backbone.head
    if head is None:
        out.delete(HEAD)
    else:
        out.write(HEAD, save({name: p.detach().cpu().contiguous() for name, p in head.state_dict().items()}))
    out.write(CARD, peft_card(config, base, origin).encode())
    out.write(CONFIG, json.dumps(peft_config(config, base, model, rank, prefix), indent=1).encode())


def peft_card(config: AdapterConfig, base: str, origin: Origin) -> str:
    """A Markdown card: whose adapter it is, what it was made from, how it scores."""
    made = {"adapter": origin.content_digest, **origin.parents}
    record = {"base_model": base, "library_name": "peft", "tags": ["recommendation", "lora", "reclora"]}
    return "\n".join(
        [
            front_matter(record),
            f"# Adapter `{config.name}` of " + (f"user `{origin.user}`" if origin.user else "all users"),
            "",
            f"A plain LoRA, exported from a RecLoRA adapter (arXiv 2408.03533, {config.lora.mode} mode, gate: "
            f"{config.lora.gate}) of reclora_dist {__version__}. It scores as that adapter does for this user at the "
            "end of the log; it is personal data where the log is.",
            "",
            "## Made from",
            *(f"* {name}: content digest `{digest}`" for name, digest in sorted(made.items())),
            "",
            "## Use",
            _encoder_use(base) if config.backbone.kind == "encoder" else _causal_use(base, config.backbone.answers),
            "",
            f"Prompts are worded as in training: `{json.dumps(dataclasses.asdict(config.prompt), ensure_ascii=False)}`",
            "",
        ]
    )


def _causal_use(base: str, answers: tuple[str, str]) -> str:
    return f"""```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "THIS FOLDER").eval()
score = softmax(model(input_ids).logits[0, -1, [no, yes]], -1)[1]
```
`no` and `yes` are the first tokens of {" " + answers[0]!r} and {" " + answers[1]!r}; the score is the probability of
a like."""


def _encoder_use(base: str) -> str:
    return f"""```python
model = PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), "THIS FOLDER").eval()
head = load_file("THIS FOLDER/{HEAD}")
pooled = model(input_ids).last_hidden_state[0].mean(0)
score = softmax(linear(pooled, head["weight"], head["bias"]), -1)[1]
```
The mean is over the real tokens, padding left out; the score is the probability of a like."""
