"""From the CRM's state to one mixture per adapted matrix, all matrices in one batched product."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GateStack(nn.Module):
    """One gate per adapted matrix: ``softmax(W2 · Dropout(ReLU(W1 · LayerNorm(h) + b1)) + b2) / T)``.

    The gates' parameters are stacked, so the number of kernels grows neither with the matrices nor with K.
    """

    def __init__(
        self, matrices: int, state: int, hidden: int, experts: int, temperature: float, dropout: float
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"gate temperature {temperature} must be above 0")
        self.temperature = temperature
        self.dropout = dropout
        self.norm_weight = nn.Parameter(torch.ones(matrices, 1, state))
        self.norm_bias = nn.Parameter(torch.zeros(matrices, 1, state))
        self.w1 = nn.Parameter(torch.empty(matrices, state, hidden))
        self.b1 = nn.Parameter(torch.zeros(matrices, 1, hidden))
        self.w2 = nn.Parameter(torch.empty(matrices, hidden, experts))
        self.b2 = nn.Parameter(torch.zeros(matrices, 1, experts))
        for weight in (self.w1, self.w2):
            bound = math.sqrt(6 / weight.shape[1] / (1 + 5))  # kaiming_uniform(a=√5), as for a Linear of this fan-in
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, state: Tensor) -> Tensor:
        """Mixtures of a batch: state [batch, state] -> [matrices, batch, experts], each row sums to 1."""
        normed = F.layer_norm(state, state.shape[-1:])
        x = normed * self.norm_weight + self.norm_bias
        hidden = F.dropout(F.relu(torch.baddbmm(self.b1, x, self.w1)), self.dropout, self.training)
        return torch.softmax(torch.baddbmm(self.b2, hidden, self.w2) / self.temperature, dim=-1)
