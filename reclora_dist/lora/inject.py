"""Wrap a backbone's linear layers with banks and hand them the mixture of the running forward."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import LoraConfig
from reclora_dist.lora.bank import Bank

QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("query_key_value",), ("Wqkv",))
"""Names of the query and value projections: LLaMA, Mistral and Qwen; BERT; GPT-NeoX; ModernBERT."""


@dataclass
class Conditioning:
    """What the adapters of the batch in work are mixed by.

    It stays set after the forward, because gradient checkpointing runs the layers again in backward.

    Attributes:
        mixture: [matrices, samples, width], width K, or r·r in ``matrix`` mode; None means one expert and no gate.
        segments: which sample each token belongs to, int64 [batch, length], where several samples share a row; padding
            may name any. None: row i is sample i.
    """

    mixture: Tensor | None = field(default=None, repr=False)
    segments: Tensor | None = field(default=None, repr=False)
    _source: tuple[object, ...] = field(default=(), init=False, repr=False)
    _rows: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def row(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """The mixture of one matrix in ``dtype``, [samples, width], or [batch, length, width] with segments.

        Cast, spread over the tokens and taken apart once for all matrices, forward and backward.
        """
        if self.mixture is None:
            return None
        source = (self.mixture, self.segments, dtype, torch.is_grad_enabled())
        if len(self._source) != len(source) or any(a is not b for a, b in zip(self._source, source, strict=True)):
            mixture = self.mixture.to(dtype)
            if self.segments is not None:
                mixture = mixture.index_select(1, self.segments.flatten()).unflatten(1, self.segments.shape)
            self._source, self._rows = source, mixture.unbind(0)
        return self._rows[index]


class PersonalisedLinear(nn.Module):
    """A frozen linear layer plus the update of its bank under the current conditioning.

    The layer may be of any kind, quantised for instance: it is only called.
    """

    def __init__(self, base: nn.Module, bank: Bank, index: int, conditioning: Conditioning, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.index = index
        self.conditioning = conditioning
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Output of the wrapped layer for x [batch, length, d_in]."""
        mixture = self.conditioning.row(self.index, x.dtype)
        own = F.dropout(x, self.dropout, self.training) if self.dropout else x
        output: Tensor = self.bank(own, mixture, self.base(x))
        return output


def inject(
    model: nn.Module, targets: Sequence[str], config: LoraConfig, conditioning: Conditioning, top_layers: int = 0
) -> dict[str, Bank]:
    """Freeze ``model`` and wrap its linear layers that ``targets`` name.

    Args:
        targets: last names (``q_proj``) or ends of the full name (``self_attn.q_proj``); ``all-linear`` alone for every
            linear layer of the stack; empty for the query and value projections.
        top_layers: adapt only the last n layers of the stack; 0 adapts all.

    Returns:
        The banks by the full name of the wrapped layer, in the order of the gates' matrices.

    Raises:
        ValueError: no layer matches.
    """
    model.requires_grad_(False)
    names = _target_names(model, targets, top_layers)
    banks = {}
    for index, name in enumerate(names):
        base = model.get_submodule(name)
        d_in, d_out = (int(getattr(base, side)) for side in ("in_features", "out_features"))
        bank = Bank(d_in, d_out, config.experts, config.rank, config.alpha, config.mode)
        layer = PersonalisedLinear(base, bank, index, conditioning, config.dropout)
        model.set_submodule(name, layer)
        banks[name] = bank
    return banks


def _target_names(model: nn.Module, targets: Sequence[str], top_layers: int) -> list[str]:
    linears = [n for n, m in model.named_modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    known = sorted({name.rpartition(".")[2] for name in linears})
    if list(targets) == ["all-linear"]:
        names = [name for name in linears if _layer(name) >= 0]
    else:
        wanted = targets or next((group for group in QUERY_VALUE if set(group) <= set(known)), ())
        names = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in wanted)]
    if top_layers:
        first = max(map(_layer, names), default=0) + 1 - top_layers
        names = [name for name in names if _layer(name) >= first]
    if not names:
        raise ValueError(f"no linear layer is named any of {list(targets)}; this backbone has: {', '.join(known)}")
    return names


def _layer(name: str) -> int:
    """The layer of the stack that a module is part of; -1 for a head or a pooler."""
    numbers = re.findall(r"\.(\d+)\.", f".{name}")
    return int(numbers[0]) if numbers else -1
