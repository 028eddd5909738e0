"""K low-rank pairs for one matrix, applied with a mixture per sample and without a loop over the pairs."""

import math
from typing import Any, Literal

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
            mixed: Tensor = _MixThenApply.apply(output, x, mixture, a, b, self.scale)  # type: ignore[no-untyped-call]
            return mixed
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
            return torch.einsum("...ij,...j->...i", matrices, hidden) if per_token else torch.bmm(hidden, matrices.mT)
        weights = (mixture if per_token else mixture[:, None])[..., None]
        blocks: Tensor = hidden.unflatten(-1, (self.experts, self.rank)) * weights
        if self.mode == "weights":
            blocks = blocks.sum(-2, keepdim=True) * weights
        return blocks.flatten(-2)


def mixes_first(experts: int, x: Tensor, mixture: Tensor) -> bool:
    """Which of two exact forms of the ``weights`` mode is the faster one.

    True: a GEMM over the bank mixes each sample's pair, two batched products apply it; K + length products of r x d per
    sample. False: two GEMMs over all experts; K · length such products, but no weights of a sample are written, and the
    mixture may be per token.

    Measured as time of the first over time of the second, forward and backward on one CPU core, 64 samples, r = 8,
    d = 384, K = 32, 16, 8, 4: 1.64, 1.27, 1.21 and 1.15 where K · length is 32; 1.03, .86, .92 and .89 where it is 64;
    .17, .31, .49 and .72 at length 64. K = 2: above 1 at any length. With 8 samples the two are nearer to each other.
    """
    return x.dim() == 3 > mixture.dim() and experts > 2 and experts * x.shape[1] > 32


def _pair(mixture: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's own A and B, [batch, r, d_in] and [batch, r, d_out]."""
    return (mixture @ a.flatten(1)).unflatten(1, a.shape[1:]), (mixture @ b.flatten(1)).unflatten(1, b.shape[1:])


class _MixThenApply(torch.autograd.Function):
    """``weights`` mode with each sample's own pair: the price of plain LoRA per token.

    Written out because autograd would keep the pairs for the backward, where mixing again is cheaper than their memory,
    and would take the gradient of A_p as ``xᵀ · g``, on a CPU five times as slow as ``gᵀ · x``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, mixture: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """``output + scale · (x A_pᵀ) B_p``."""
        own_a, own_b = _pair(mixture, a, b)
        hidden = torch.bmm(x, own_a.mT)
        ctx.save_for_backward(x, mixture, a, b, hidden)
        ctx.scale = scale
        return torch.baddbmm(output, hidden, own_b, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of output, x, mixture, A and B."""
        x, mixture, a, b, hidden = ctx.saved_tensors
        own_a, own_b = _pair(mixture, a, b)
        to_hidden = torch.bmm(grad, own_b.mT).mul_(ctx.scale)
        to_a = torch.bmm(to_hidden.mT, x).flatten(1)
        to_b = torch.bmm(hidden.mul(ctx.scale).mT, grad).flatten(1)
        to_mixture = torch.addmm(to_a @ a.flatten(1).T, to_b, b.flatten(1).T) if ctx.needs_input_grad[2] else None
        to_x = torch.bmm(to_hidden, own_a) if ctx.needs_input_grad[1] else None
        return grad, to_x, to_mixture, (mixture.T @ to_a).view(a.shape), (mixture.T @ to_b).view(b.shape), None
