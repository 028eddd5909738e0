"""K low-rank pairs for one matrix, applied with a mixture per sample and without a loop over the pairs."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["weights", "outputs"]


class Bank(nn.Module):
    """K meta-LoRAs ``A_k (r x d_in)``, ``B_k (r x d_out)`` of one Linear layer.

    ``weights`` (RecLoRA): ``y = s · (x A_pᵀ) B_p`` with ``A_p = Σ a_k A_k``, ``B_p = Σ a_k B_k``; rank r each.
    ``outputs`` (iLoRA): ``y = s · Σ a_k (x A_kᵀ) B_k`` with the total rank r split over the K pairs.
    The scale s is ``alpha`` over the rank of one pair. B starts at zero, so a new bank changes nothing.
    """

    def __init__(self, d_in: int, d_out: int, experts: int, rank: int, alpha: float, mode: Mode = "weights") -> None:
        super().__init__()
        if mode == "outputs" and rank % experts:
            raise ValueError(f"rank {rank} cannot be split over {experts} experts; take a multiple of {experts}")
        width = rank if mode == "weights" else rank // experts
        self.mode = mode
        self.scale = alpha / width
        self.A = nn.Parameter(torch.empty(experts, width, d_in))
        self.B = nn.Parameter(torch.zeros(experts, width, d_out))
        for matrix in self.A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor, mixture: Tensor | None) -> Tensor:
        """The update for ``x``.

        Args:
            x: input of the wrapped layer, [batch, length, d_in].
            mixture: weights of the experts, [batch, K]; None for a single expert without a gate.

        Returns:
            [batch, length, d_out], already scaled.
        """
        if mixture is None:
            return self.scale * F.linear(x, self.A[0]).matmul(self.B[0])
        if self.mode == "weights":
            return self._mix_weights(x, mixture)
        return self._mix_outputs(x, mixture)

    def _mix_weights(self, x: Tensor, mixture: Tensor) -> Tensor:
        """One GEMM mixes each sample's pair; two batched products apply it at the price of plain LoRA per token."""
        a = (mixture @ self.A.flatten(1)).unflatten(1, self.A.shape[1:])
        b = (mixture @ self.B.flatten(1)).unflatten(1, self.B.shape[1:])
        return torch.bmm(torch.bmm(x, a.transpose(1, 2)), self.scale * b)

    def _mix_outputs(self, x: Tensor, mixture: Tensor) -> Tensor:
        """Two GEMMs over all experts at once; the mixture scales the K blocks of the hidden columns between them."""
        hidden = F.linear(x, self.A.flatten(0, 1))
        weights = (self.scale * mixture).repeat_interleave(self.A.shape[1], dim=1)
        return (hidden * weights[:, None, :]).matmul(self.B.flatten(0, 1))
