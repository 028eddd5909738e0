"""Layers that conventional recommenders share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(d_in: int, widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU and dropout for each width."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(d_in, width), nn.ReLU(), nn.Dropout(dropout)]
        d_in = width
    return nn.Sequential(*layers)


def initialise(model: nn.Module) -> None:
    """Weights of all linear layers from Glorot's normal distribution (proceedings.mlr.press/v9/glorot10a), no bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)


CACHED_STEPS = 2**15
"""History steps that a CPU attends to at a time: what the MLP makes of them (256 bytes each) stays in its caches."""


class TargetAttention(nn.Module):
    """DIN's attention: an MLP on [t, h, t−h, t·h] weighs each history step, without softmax (arXiv 1706.06978)."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(4 * width, hidden[0])
        self.rest = nn.Sequential(mlp(hidden[0], hidden[1:]), nn.Linear(hidden[-1], 1))

    def forward(self, target: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """Weighted sum of the history.

        Args:
            target: [batch, width].
            history: [batch, steps, width].
            mask: bool [batch, steps], True where a step is real.

        Returns:
            [batch, width].
        """
        t, h, difference, product = self.first.weight.split(self.width, dim=1)
        # The first layer is linear, so t, t−h and t·h are folded into a matrix per sample, and nothing is concatenated.
        constant = F.linear(target, t + difference, self.first.bias)[:, None]
        rows = max(1, CACHED_STEPS // max(history.shape[1], 1)) if target.device.type == "cpu" else len(target)
        parts = zip(*(tensor.split(rows) for tensor in (target, constant, history, mask)), strict=True)
        return torch.cat([self._attend(h - difference, product, *part) for part in parts])

    def _attend(
        self, own: Tensor, product: Tensor, target: Tensor, constant: Tensor, history: Tensor, mask: Tensor
    ) -> Tensor:
        per_sample = torch.addcmul(own.t(), target[:, :, None], product.t())
        weights = self.rest(F.relu(torch.baddbmm(constant, history, per_sample))).squeeze(-1) * mask
        return torch.bmm(weights[:, None], history).squeeze(1)


def masked_mean(history: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real steps of [batch, steps, width]; zero where there are none."""
    real = mask[..., None].to(history.dtype)
    return (history * real).sum(1) / real.sum(1).clamp(min=1)


def last_step(steps: Tensor, length: Tensor) -> Tensor:
    """The last real step of [batch, steps, width]; zero where there is none.

    Args:
        length: real steps, which come first, int64 [batch].
    """
    last = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, steps.shape[2])
    return steps.gather(1, last).squeeze(1) * (length > 0)[:, None]
