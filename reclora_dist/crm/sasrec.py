"""SASRec: causal self-attention over the history in time order (arXiv 1808.09781), here as a click model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.inputs import INITIAL_STD, Embedded, Inputs, Vocabulary
from reclora_dist.crm.layers import last_step, mlp


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each on normalised steps and added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(mlp(width, [width], dropout), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, steps: Tensor) -> Tensor:
        """[batch, steps, width] -> the same; a step sees itself and those before it."""
        projected = self.project(self.before_attention(steps)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        steps = steps + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        result: Tensor = steps + self.dropout(self.network(self.before_network(steps)))
        return result


class SasRec(nn.Module):
    """The newest step's state s meets the target t as [t, s, t·s] in a DNN, whose last layer is ``state``."""

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, vocabulary, item_fields)
        width = self.inputs.item_width
        self.read = nn.Linear(self.inputs.step_width, width)  # which the heads divide
        self.position = nn.Embedding(config.positions, width)
        nn.init.normal_(self.position.weight, std=INITIAL_STD)
        self.blocks = nn.Sequential(*[Block(width, config.heads, config.dropout) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width)
        d_in = 3 * width + self.inputs.user_width + self.inputs.statistics_width
        self.dnn = mlp(d_in, config.dnn, config.dropout)
        self.logit = nn.Linear(config.dnn[-1], 1)
        self.state_width = config.dnn[-1]
        self.user_state_width = width + self.inputs.known_width

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch; the user's state has the newest step's."""
        x: Embedded = self.inputs(batch)
        steps, target = self.read(x.history), self.read(x.target)
        steps = self.blocks(steps + self.position(self._ages(batch)))  # causal, so no real step sees the padding
        last = last_step(self.norm(steps), batch.length)
        state = self.dnn(torch.cat([target, last, target * last, x.user, x.statistics], dim=-1))
        return CrmOutput(state, self.logit(state).squeeze(-1), lambda: torch.cat([last, x.known], dim=-1))

    def _ages(self, batch: CrmBatch) -> Tensor:
        """Positions counted from the newest step (0), int64 [batch, steps]."""
        place = torch.arange(batch.items.shape[1], device=batch.length.device)
        return (batch.length[:, None] - 1 - place).clamp(0, self.config.positions - 1)
