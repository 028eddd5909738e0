"""SIM as the paper uses it: DIN's attention over the retrieved history (arXiv 2006.05639, 1706.06978).

On the newest events (``retrieval.strategy=recent``) the same network is DIN: what differs is who chose the history.
"""

import torch
from torch import Tensor, nn

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.inputs import Embedded, Inputs, Vocabulary
from reclora_dist.crm.layers import TargetAttention, masked_mean, mlp


class Sim(nn.Module):
    """Attention of the target on the history, then a DNN; ``state`` is the DNN's last layer."""

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, vocabulary, item_fields)
        width = self.inputs.step_width
        self.attention = TargetAttention(width, config.attention)
        d_in = 2 * width + self.inputs.user_width + self.inputs.statistics_width
        self.dnn = mlp(d_in, config.dnn, config.dropout)
        self.logit = nn.Linear(config.dnn[-1], 1)
        self.state_width = config.dnn[-1]
        self.user_state_width = width + self.inputs.known_width

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch; the user's state has the history's mean."""
        x: Embedded = self.inputs(batch)
        interest = self.attention(x.target, x.history, x.mask)
        state = self.dnn(torch.cat([x.target, interest, x.user, x.statistics], dim=-1))
        return CrmOutput(
            state,
            self.logit(state).squeeze(-1),
            lambda: torch.cat([masked_mean(x.history, x.mask), x.known], dim=-1),
        )
