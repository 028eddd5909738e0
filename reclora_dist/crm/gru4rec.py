"""GRU4Rec: a recurrent network reads the history in time order (arXiv 1511.06939), here as a click model."""

import torch
from torch import Tensor, nn

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.inputs import Embedded, Inputs, Vocabulary
from reclora_dist.crm.layers import last_step, mlp


class Gru4Rec(nn.Module):
    """The GRU's last state s meets the target t as [t, s, t·s] in a DNN, whose last layer is ``state``."""

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, vocabulary, item_fields)
        width = self.inputs.step_width
        self.gru = nn.GRU(width, width, config.layers, batch_first=True)
        d_in = 3 * width + self.inputs.user_width + self.inputs.statistics_width
        self.dnn = mlp(d_in, config.dnn, config.dropout)
        self.logit = nn.Linear(config.dnn[-1], 1)
        self.state_width = config.dnn[-1]
        self.user_state_width = width + self.inputs.known_width

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch; the user's state has the GRU's."""
        x: Embedded = self.inputs(batch)
        steps, _ = self.gru(x.history)  # padding comes after the last real step, so it changes no state that is read
        last = last_step(steps, batch.length)
        state = self.dnn(torch.cat([x.target, last, x.target * last, x.user, x.statistics], dim=-1))
        return CrmOutput(state, self.logit(state).squeeze(-1), lambda: torch.cat([last, x.known], dim=-1))
