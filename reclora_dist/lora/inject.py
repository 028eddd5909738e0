"""Wrap a backbone's Linear layers with banks and hand them the mixture of the running forward."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import LoraConfig
from reclora_dist.lora.bank import Bank


@dataclass
class Conditioning:
    """The mixtures of the batch in work, [matrices, batch, experts]; None means one expert and no gate.

    It stays set after the forward, because gradient checkpointing runs the layers again in backward.
    """

    mixture: Tensor | None = field(default=None, repr=False)


class PersonalisedLinear(nn.Module):
    """A frozen Linear plus the update of its bank under the current conditioning."""

    def __init__(self, base: nn.Module, bank: Bank, index: int, conditioning: Conditioning, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.index = index
        self.conditioning = conditioning
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Output of the wrapped layer for x [batch, length, d_in]."""
        mixture = self.conditioning.mixture
        own = None if mixture is None else mixture[self.index].to(x.dtype)
        update: Tensor = self.bank(F.dropout(x, self.dropout, self.training), own)
        output: Tensor = self.base(x)
        return output + update


def inject(
    model: nn.Module, targets: Sequence[str], config: LoraConfig, conditioning: Conditioning, top_layers: int = 0
) -> dict[str, Bank]:
    """Freeze ``model`` and wrap its Linear layers whose last name is in ``targets``.

    Args:
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
        parent = model.get_submodule(name.rpartition(".")[0])
        base = model.get_submodule(name)
        d_out, d_in = base.weight.shape  # type: ignore[misc]
        bank = Bank(d_in, d_out, config.experts, config.rank, config.alpha, config.mode)
        setattr(parent, name.rpartition(".")[2], PersonalisedLinear(base, bank, index, conditioning, config.dropout))
        banks[name] = bank
    return banks


def _target_names(model: nn.Module, targets: Sequence[str], top_layers: int) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if name.rpartition(".")[2] in targets]
    if top_layers:
        layer = {name: int(re.findall(r"\.(\d+)\.", f".{name}")[0]) for name in names}
        first = max(layer.values(), default=0) + 1 - top_layers
        names = [name for name in names if layer[name] >= first]
    if not names:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no Linear layer is named any of {list(targets)}; this backbone has: {known}")
    return names
