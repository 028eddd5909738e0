"""SIM as the paper uses it: DIN's attention over the retrieved history (arXiv 2006.05639, 1706.06978)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.layers import Fields, TargetAttention, mlp


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of everything that is embedded: items, users, rating levels, and each field's values."""

    items: int
    users: int
    levels: int
    user_fields: tuple[int, ...]
    item_fields: tuple[int, ...]


class CrmOutput(NamedTuple):
    """What a CRM says of a batch.

    Attributes:
        state: what gates read of (user, target, history), [batch, state_width].
        logit: logit of liking, [batch].
        user_state: what is known without the target item, [batch, user_state_width]; with a history that was retrieved
            for the target (any strategy but `recent`) it depends on the target all the same.
    """

    state: Tensor
    logit: Tensor
    user_state: Tensor


class Sim(nn.Module):
    """Like/dislike from ids, fields, running statistics and a retrieved history; ``state`` is the DNN's last layer."""

    item_fields: Tensor

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        """Args: item_fields: int64 [items + 1, fields], the field positions of every item."""
        super().__init__()
        width = config.embedding
        self.config = config
        self.register_buffer("item_fields", item_fields)
        self.item = _embedding(vocabulary.items + 1, width)
        self.fields = Fields(vocabulary.item_fields, width)
        self.user_fields = Fields(vocabulary.user_fields, width)
        self.user = _embedding(vocabulary.users + 1, width) if config.user_id else None
        self.level = _embedding(vocabulary.levels + 1, width)
        target = width + self.fields.width
        self.step = nn.Linear(target + width, target)
        self.attention = TargetAttention(target, config.attention)
        self.dropout = nn.Dropout(config.embedding_dropout)
        inputs = 2 * target + self.user_fields.width + width * config.user_id + 6 * config.statistics
        self.dnn = mlp(inputs, config.dnn, config.dropout)
        self.logit = nn.Linear(config.dnn[-1], 1)
        self.users = vocabulary.users
        self.state_width = config.dnn[-1]
        self.user_state_width = target + self.user_fields.width + width * config.user_id + 3 * config.statistics

    def forward(self, batch: CrmBatch) -> CrmOutput:
        """State and logit of a batch."""
        target = self.dropout(self._item_vectors(batch.item))
        history = self._history(batch)
        mask = torch.arange(history.shape[1], device=history.device) < batch.length[:, None]
        user = [self.user_fields(batch.user_fields)]
        if self.user is not None:
            user.append(self.dropout(self.user(batch.user)))
        parts, known = [target, self.attention(target, history, mask), *user], [masked_mean(history, mask), *user]
        if self.config.statistics:
            features = statistics_features(batch.statistics)
            parts.append(features)
            known.append(features[:, 1::2])
        state = self.dnn(torch.cat(parts, dim=-1))
        return CrmOutput(state, self.logit(state).squeeze(-1), torch.cat(known, dim=-1))

    def _item_vectors(self, items: Tensor) -> Tensor:
        return torch.cat([self.item(items), self.fields(self.item_fields[items])], dim=-1)

    def _history(self, batch: CrmBatch) -> Tensor:
        """ReLU(Linear([item; rating])) of every step, [batch, steps, width].

        The layer is linear before its ReLU, so items and levels are projected apart; when the batch holds more steps
        than there are items, each item is projected once and then looked up.
        """
        by_item, by_level = self.step.weight.split([self.step.out_features, self.config.embedding], dim=1)
        if batch.items.numel() > len(self.item_fields):
            every = torch.arange(len(self.item_fields), device=batch.items.device)
            # F.embedding's backward is one scatter; indexing's is a sort
            projected = F.embedding(batch.items, F.linear(self.dropout(self._item_vectors(every)), by_item))
        else:
            projected = F.linear(self.dropout(self._item_vectors(batch.items)), by_item)
        level = F.embedding(batch.levels, F.linear(self.level.weight, by_level, self.step.bias))
        return F.relu(projected + level)


def _embedding(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.1)
    return table


def masked_mean(history: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real steps of [batch, steps, width]; zero where there are none."""
    real = mask[..., None].to(history.dtype)
    return (history * real).sum(1) / real.sum(1).clamp(min=1)


def statistics_features(counts: Tensor) -> Tensor:
    """Counts [batch, 4] (see ``contract.schema.STATISTICS``) to 6 features: log counts and smoothed like-rates."""
    events, likes = counts[:, 0::2], counts[:, 1::2]
    rate = (likes + 5) / (events + 10)
    return torch.cat([torch.log1p(events) / 5, rate, torch.logit(rate)], dim=1)


def item_fields_tensor(rows: Sequence[Sequence[int]], items: Sequence[int]) -> Tensor:
    """Field positions by item position: int64 [items + 1, fields]; row 0 (padding) is zero."""
    table = torch.zeros(max(items) + 1, len(rows[0]), dtype=torch.int64)
    table[torch.tensor(items)] = torch.tensor(rows, dtype=torch.int64)
    return table
