"""DCN-V2, stacked: a cross network multiplies the inputs with each other, a DNN follows (arXiv 2008.13535)."""

import torch
from torch import Tensor, nn

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.inputs import Embedded, Inputs, Vocabulary
from reclora_dist.crm.layers import masked_mean, mlp


class CrossNetwork(nn.Module):
    """x ← x₀ · (W x + b) + x, once per layer: degree n + 1 after n layers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, width] -> [batch, width]."""
        crossed = inputs
        for layer in self.layers:
            crossed = inputs * layer(crossed) + crossed
        return crossed


class DcnV2(nn.Module):
    """Target, mean history, user and statistics through cross network and DNN, whose last layer is ``state``."""

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, vocabulary, item_fields)
        width = self.inputs.step_width
        d_in = 2 * width + self.inputs.user_width + self.inputs.statistics_width
        self.cross = CrossNetwork(d_in, config.layers)
        self.dnn = mlp(d_in, config.dnn, config.dropout)
        self.logit = nn.Linear(config.dnn[-1], 1)
        self.state_width = config.dnn[-1]
        self.user_state_width = width + self.inputs.known_width

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch; the user's state has the history's mean."""
        x: Embedded = self.inputs(batch)
        mean = masked_mean(x.history, x.mask)
        state = self.dnn(self.cross(torch.cat([x.target, mean, x.user, x.statistics], dim=-1)))
        return CrmOutput(state, self.logit(state).squeeze(-1), lambda: torch.cat([mean, x.known], dim=-1))
