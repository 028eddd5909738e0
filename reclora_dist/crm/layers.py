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


class Fields(nn.Module):
    """Embeddings of categorical fields, side by side; position 0 is unknown."""

    offsets: Tensor

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        offsets = torch.tensor([0, *[size + 1 for size in sizes]]).cumsum(0)
        self.register_buffer("offsets", offsets[:-1], persistent=False)
        self.table = nn.Embedding(int(offsets[-1]), width)
        self.width = width * len(sizes)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, fields: Tensor) -> Tensor:
        """int64 [..., fields] -> [..., fields * width]."""
        embedded: Tensor = self.table(fields + self.offsets)
        return embedded.flatten(-2)


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
