"""DeepFM: a factorisation machine and a DNN on the same embeddings (arXiv 1703.04247)."""

import torch
from torch import Tensor, nn

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.inputs import Embedded, Inputs, Vocabulary
from reclora_dist.crm.layers import masked_mean, mlp


class DeepFm(nn.Module):
    """Fields are the target's id and fields, those of the mean history, and the user's.

    The first-order weights of the fields are linear in their embeddings. ``state`` is the DNN's last layer beside the
    factorisation machine's sum of products, [pairs], whose elements add up to its part of the logit.
    """

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, vocabulary, item_fields)
        width = self.inputs.step_width
        d_in = 2 * width + self.inputs.user_width + self.inputs.statistics_width
        self.dnn = mlp(d_in, config.dnn, config.dropout)
        self.logit = nn.Linear(d_in + config.dnn[-1], 1)
        self.state_width = config.dnn[-1] + config.embedding
        self.user_state_width = width + self.inputs.known_width

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch; the user's state has the history's mean."""
        x: Embedded = self.inputs(batch)
        mean = masked_mean(x.history, x.mask)
        items = self.inputs.item_width  # ratings are narrower than a field
        fields = torch.cat([x.target[:, :items], mean[:, :items], x.user], dim=-1)
        pairs = sum_of_products(fields.unflatten(-1, (-1, self.config.embedding)))
        read = torch.cat([x.target, mean, x.user, x.statistics], dim=-1)
        deep = self.dnn(read)
        logit = self.logit(torch.cat([read, deep], dim=-1)).squeeze(-1) + pairs.sum(-1)
        return CrmOutput(torch.cat([deep, pairs], dim=-1), logit, lambda: torch.cat([mean, x.known], dim=-1))


def sum_of_products(vectors: Tensor) -> Tensor:
    """Element-wise products of all pairs of [batch, fields, width], summed: [batch, width], in linear time."""
    return (vectors.sum(1).square() - vectors.square().sum(1)) / 2
