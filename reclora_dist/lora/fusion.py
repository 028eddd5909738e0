"""Late fusion: a head on what the language model and the CRM know, the usual rival of a conditioned adapter."""

import torch
from torch import Tensor, nn

_HIDDEN, _DROPOUT = 64, 0.1


class Fusion(nn.Module):
    """``W2 · Dropout(ReLU(W1 · [LayerNorm(pooled); LayerNorm(state)] + b1)) + b2``, trained from the start."""

    def __init__(self, width: int, state: int) -> None:
        """Args: width: of the pooled hidden state; state: of the CRM's state."""
        super().__init__()
        self.text, self.state = nn.LayerNorm(width), nn.LayerNorm(state)
        self.mlp = nn.Sequential(
            nn.Linear(width + state, _HIDDEN), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, 2)
        )

    def forward(self, pooled: Tensor, state: Tensor) -> Tensor:
        """Logits of (no, yes) [batch, 2] in float32 from [batch, width] and [batch, state]."""
        dtype = self.text.weight.dtype
        both = torch.cat([self.text(pooled.to(dtype)), self.state(state.to(dtype))], dim=-1)
        logits: Tensor = self.mlp(both)
        return logits.float()
