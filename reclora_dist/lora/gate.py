"""From what is known of a sample to one mixture per adapted matrix, all matrices in one batched product."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import LoraConfig

RANDOM_ROWS = 4096
"""Rows of a random gate's table: users whose positions are equal modulo this share a mixture."""


def mix(logits: Tensor, config: LoraConfig) -> Tensor:
    """``softmax(logits / T)`` over the last axis; with ``top_k`` over the k largest, and 0 for the others.

    The k kept weights sum to 1 and gradients flow through them alone (arXiv 1701.06538, section 2.1, without noise).
    """
    scaled = logits / config.temperature
    if not config.top_k:
        return torch.softmax(scaled, dim=-1)
    kept, places = scaled.topk(config.top_k, dim=-1)
    return torch.zeros_like(scaled).scatter(-1, places, torch.softmax(kept, dim=-1))


class GateStack(nn.Module):
    """One gate per adapted matrix: ``softmax(W2 · Dropout(ReLU(W1 · LayerNorm(h) + b1)) + b2) / T)``.

    The gates' parameters are stacked, so the number of kernels grows neither with the matrices nor with K. In mode
    ``matrix`` (CFLoRA, arXiv 2501.13344) there is neither softmax nor temperature: a gate's r² numbers are a matrix
    that goes between A and B. Its bias starts at the identity.
    """

    def __init__(self, gates: int, state: int, config: LoraConfig) -> None:
        """Args: gates: the number of matrices, or 1 for a shared gate; state: width of the state."""
        super().__init__()
        width = config.mixture_width
        self.config = config
        self.norm_weight = nn.Parameter(torch.ones(gates, 1, state))
        self.norm_bias = nn.Parameter(torch.zeros(gates, 1, state))
        self.w1 = nn.Parameter(torch.empty(gates, state, config.gate_hidden))
        self.b1 = nn.Parameter(torch.zeros(gates, 1, config.gate_hidden))
        self.w2 = nn.Parameter(torch.empty(gates, config.gate_hidden, width))
        self.b2 = nn.Parameter(torch.zeros(gates, 1, width))
        for weight in (self.w1, self.w2):
            bound = math.sqrt(6 / weight.shape[1] / (1 + 5))  # kaiming_uniform(a=√5), as for a Linear of this fan-in
            nn.init.uniform_(weight, -bound, bound)
        if config.mode == "matrix":
            with torch.no_grad():
                self.b2.copy_(torch.eye(config.rank).flatten())

    def forward(self, state: Tensor) -> Tensor:
        """Mixtures of a batch: state [batch, state] -> [gates, batch, experts], each row sums to 1.

        In mode ``matrix``: [gates, batch, r · r], without that sum.
        """
        x = self._normed(state) * self.norm_weight + self.norm_bias
        hidden = F.relu(torch.baddbmm(self.b1, x, self.w1))
        hidden = F.dropout(hidden, self.config.gate_dropout, self.training)
        logits = torch.baddbmm(self.b2, hidden, self.w2)
        return logits if self.config.mode == "matrix" else mix(logits, self.config)

    def _normed(self, state: Tensor) -> Tensor:
        """The state with mean 0 and variance 1, [batch, state]; dropout and noise are the same for all gates."""
        normed = F.layer_norm(state.to(self.w1.dtype), state.shape[-1:])
        if not self.training:
            return normed
        normed = F.dropout(normed, self.config.state_dropout)
        return normed + self.config.state_noise * torch.randn_like(normed) if self.config.state_noise else normed


class IdGate(nn.Module):
    """A learned row of logits per user. All start at 0, so a user who is not trained on has the uniform mixture."""

    def __init__(self, gates: int, users: int, config: LoraConfig) -> None:
        """Args: users: the largest user position; row 0 stands for users beyond it."""
        super().__init__()
        self.config = config
        self.logits = nn.Embedding(users + 1, gates * config.experts)
        nn.init.zeros_(self.logits.weight)

    def forward(self, user: Tensor) -> Tensor:
        """Mixtures of a batch: user positions int64 [batch] -> [gates, batch, experts]."""
        known = torch.where(user < self.logits.num_embeddings, user, 0)
        logits: Tensor = self.logits(known)
        return mix(logits.unflatten(1, (-1, self.config.experts)).transpose(0, 1), self.config)


class RandomGate(nn.Module):
    """A fixed mixture per user, of standard normal logits that the seed alone sets. Nothing is trained or saved."""

    mixtures: Tensor

    def __init__(self, gates: int, config: LoraConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(gates, RANDOM_ROWS, config.experts, generator=generator)
        self.register_buffer("mixtures", mix(logits, config), persistent=False)

    def forward(self, user: Tensor) -> Tensor:
        """Mixtures of a batch: user positions int64 [batch] -> [gates, batch, experts]."""
        return self.mixtures[:, user % RANDOM_ROWS]


Gate = GateStack | IdGate | RandomGate


def imbalance(mixture: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' importance, averaged over the matrices; a scalar.

    ``K · Σ_k (mean_b a_k)² − 1``: 0 for even use, K − 1 if one expert has all weight (arXiv 1701.06538, equation 7).

    Args:
        mixture: [matrices, batch, experts], rows that sum to 1.
    """
    importance = mixture.float().mean(dim=1)
    return (mixture.shape[-1] * importance.square().sum(dim=-1) - 1).mean()


@dataclass(frozen=True)
class GateUse:
    """How a batch's mixtures use K experts.

    Attributes:
        entropy: mean entropy over log K; 1 is uniform, 0 is one expert.
        weight: mean weight of each expert; they sum to 1.
        largest: share of the mixtures in which an expert has the largest weight; they sum to 1.
    """

    entropy: float
    weight: list[float]
    largest: list[float]


@torch.no_grad()
def gate_use(mixture: Tensor) -> GateUse:
    """The use of experts in mixtures [matrices, batch, experts] of at least two experts."""
    rows = mixture.float().flatten(0, -2)
    experts = rows.shape[1]
    entropy = torch.special.entr(rows).sum(-1).mean() / math.log(experts)
    largest = torch.bincount(rows.argmax(-1), minlength=experts) / len(rows)
    return GateUse(float(entropy), rows.mean(0).tolist(), largest.tolist())
