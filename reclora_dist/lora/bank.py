"""K low-rank pairs for one matrix, applied with a mixture per sample and without a loop over the pairs."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["weights", "outputs", "matrix"]


class Bank(nn.Module):
    """K meta-LoRAs ``A_k (r x d_in)``, ``B_k (r x d_out)`` of one Linear layer.

    ``weights`` (RecLoRA, arXiv 2408.03533): ``y = s · (x A_pᵀ) B_p`` with ``A_p = Σ a_k A_k``, ``B_p = Σ a_k B_k``.
    ``outputs`` (iLoRA, arXiv 2408.10159): ``y = s · Σ a_k (x A_kᵀ) B_k`` with the total rank r split over the K pairs.
    ``matrix`` (CFLoRA, arXiv 2501.13344): ``y = s · (x Aᵀ) Mᵀ B``, one pair and an r x r matrix M per sample.
    The scale s is ``alpha`` over the rank of one pair. B starts at zero, so a new bank changes nothing.

    The parameters stay in float32 whatever the type of the layer, unless the whole model is cast: an update of Adam is
    smaller than the steps of a bfloat16 weight. They are cast to the type of the input at use; DeepSpeed casts the
    model and keeps float32 masters of its own.

    Raises:
        ValueError: the rank cannot be split over the experts, or ``matrix`` is asked for several experts.
    """

    def __init__(self, d_in: int, d_out: int, experts: int, rank: int, alpha: float, mode: Mode = "weights") -> None:
        super().__init__()
        if mode == "outputs" and rank % experts:
            raise ValueError(f"rank {rank} cannot be split over {experts} experts; take a multiple of {experts}")
        if mode == "matrix" and experts != 1:
            raise ValueError(f"mode 'matrix' has one pair of matrices, not experts = {experts}; take experts = 1")
        self.mode = mode
        self.experts = experts
        self.rank = rank // experts if mode == "outputs" else rank
        self.width = rank * rank if mode == "matrix" else experts
        self.scale = alpha / self.rank
        self.A = nn.Parameter(torch.empty(experts, self.rank, d_in))
        self.B = nn.Parameter(torch.zeros(experts, self.rank, d_out))
        for matrix in self.A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor, mixture: Tensor | None, output: Tensor | None = None) -> Tensor:
        """The update for ``x``, added to ``output``.

        Args:
            x: input of the wrapped layer, [batch, length, d_in] or [batch, d_in].
            mixture: weights of the experts per sample, [batch, K], or per token (samples packed into rows),
                [batch, length, K]; in ``matrix`` mode r·r wide, M row by row. None for a single expert without a gate.
            output: what the wrapped layer made of ``x``, [batch, length, d_out]; None: zeros.

        Returns:
            ``output`` plus the scaled update, [batch, length, d_out], in the type of ``x``.

        Raises:
            ValueError: the mixture is of another width, or there is none for several experts.
        """
        self._check(mixture)
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        if output is None:
            output = x.new_zeros(*x.shape[:-1], b.shape[-1])
        if mixture is not None and self.mode == "weights" and mixes_first(self.experts, x, mixture):
            return _mix_then_apply(x, mixture, a, b, self.scale, output)
        hidden = self._weighted(F.linear(x, a.flatten(0, 1)), mixture)
        added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), b.flatten(0, 1), alpha=self.scale)
        return added.view(output.shape)

    def _check(self, mixture: Tensor | None) -> None:
        if mixture is None and self.experts != 1:
            raise ValueError(f"{self.experts} experts and no mixture; set one, [batch, {self.width}] for each matrix")
        if mixture is not None and mixture.shape[-1] != self.width:
            raise ValueError(
                f"a mixture of shape {list(mixture.shape)} for a bank in {self.mode!r} mode that takes {self.width} "
                "numbers per sample; build the gate from the same LoraConfig"
            )

    def _weighted(self, hidden: Tensor, mixture: Tensor | None) -> Tensor:
        """What comes between the two GEMMs over all experts, [batch, length, K·r] -> the same shape."""
        if mixture is None:
            return hidden
        per_token = mixture.dim() == hidden.dim()
        if self.mode == "matrix":
            matrices = mixture.unflatten(-1, (self.rank, self.rank))
            return (matrices @ hidden[..., None])[..., 0] if per_token else torch.bmm(hidden, matrices.mT)
        weights = (mixture if per_token else mixture[:, None])[..., None]
        blocks = hidden.unflatten(-1, (self.experts, self.rank)) * weights
        if self.mode == "weights":
            blocks = blocks.sum(-2, keepdim=True) * weights
        return blocks.flatten(-2)


def mixes_first(experts: int, x: Tensor, mixture: Tensor) -> bool:
    """Which of two exact forms of the ``weights`` mode is the faster one.

    True: a GEMM over the bank mixes each sample's pair, two batched products apply it; K + length products of r x d per
    sample. False: two GEMMs over all experts; K · length such products, but no weights of a sample are written, and the
    mixture may be per token.

    Measured as time of the first over time of the second, forward and backward on one CPU core, 64 samples, r = 8,
    d = 384: 1.44, 1.30, 1.18 and 1.23 where K · length is 32 (K = 32, 16, 8, 4); .90, .91, .90 and 1.06 where it is 64;
    .18, .36, .62 and 1.27 at length 64. With K = 2 it is about 1 or above at any length; with 8 samples the two are
    nearer to each other.
    """
    return x.dim() == 3 > mixture.dim() and experts > 2 and experts * x.shape[1] > 32


def _mix_then_apply(x: Tensor, mixture: Tensor, a: Tensor, b: Tensor, scale: float, output: Tensor) -> Tensor:
    """``weights`` mode with each sample's own pair: the price of plain LoRA per token."""
    own_a, own_b = ((mixture @ matrix.flatten(1)).unflatten(1, matrix.shape[1:]) for matrix in (a, b))
    return torch.baddbmm(output, torch.bmm(x, own_a.mT), own_b, alpha=scale)
