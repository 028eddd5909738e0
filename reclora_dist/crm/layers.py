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
        # The first layer is linear, so its four inputs are never concatenated: half the work, a quarter of the memory.
        constant = F.linear(target, t + difference, self.first.bias)[:, None]
        varying = F.linear(history, h - difference) + F.linear(history * target[:, None], product)
        weights = self.rest(F.relu(constant + varying)).squeeze(-1) * mask
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
