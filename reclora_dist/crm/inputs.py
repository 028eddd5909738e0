"""What every conventional recommender reads: ids, fields, statistics and the history, embedded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch

PRIME = 2**31 - 1
HASHES = ((1_103_515_245, 12_345), (1_779_033_703, 1_013_904_223))
"""(a, b) of the hash functions ((a x + b) mod PRIME) mod rows (Carter and Wegman); a x fits int64 for all positions."""

INITIAL_STD = 0.01
"""Standard deviation of untrained embeddings: small, so that rare values stay near the mean of all."""


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of everything that is embedded: items, users, rating levels, and each field's values."""

    items: int
    users: int
    levels: int
    user_fields: tuple[int, ...]
    item_fields: tuple[int, ...]


class Table(nn.Embedding):
    """Embeddings of the positions 1 to ``values``; row 0 is the padding's, and that of positions that came later.

    With ``rows`` below ``values`` a position has two hashed rows, whose sum it is: two positions that share one row
    seldom share the other (arXiv 1709.03933, without its weights). Later positions are hashed like the others then.
    """

    def __init__(self, values: int, width: int, rows: int = 0) -> None:
        hashed = 0 < rows < values
        super().__init__((rows if hashed else values) + 1, width)
        self.hashed = hashed

    def reset_parameters(self) -> None:
        """Row 0, which training may never see, starts at the mean."""
        nn.init.normal_(self.weight, std=INITIAL_STD)
        self.weight.data[0] = 0

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        if not self.hashed:
            return F.embedding(torch.where(positions < self.num_embeddings, positions, 0), self.weight)
        rows = self.num_embeddings - 1
        hashed = [torch.where(positions > 0, (a * positions + b) % PRIME % rows + 1, 0) for a, b in HASHES]
        return F.embedding(hashed[0], self.weight) + F.embedding(hashed[1], self.weight)


class Fields(nn.Module):
    """Embeddings of categorical fields, side by side; position 0 is unknown, and so is a value that came later."""

    offsets: Tensor
    sizes: Tensor

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        offsets = torch.tensor([0, *[size + 1 for size in sizes]]).cumsum(0)
        self.register_buffer("offsets", offsets[:-1], persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.int64), persistent=False)
        self.table = nn.Embedding(int(offsets[-1]), width)
        self.width = width * len(sizes)
        nn.init.normal_(self.table.weight, std=INITIAL_STD)

    def forward(self, fields: Tensor) -> Tensor:
        """int64 [..., fields] -> [..., fields * width]."""
        embedded: Tensor = self.table(torch.where(fields <= self.sizes, fields, 0) + self.offsets)
        return embedded.flatten(-2)


class Embedded(NamedTuple):
    """A batch after its embeddings.

    Attributes:
        target: the target item, its rating unknown, [batch, step_width].
        history: every step's item and rating, [batch, steps, step_width].
        mask: bool [batch, steps], True where a step is real.
        user: fields and perhaps the id, [batch, user_width].
        statistics: 6 features of the running counts, [batch, 6]; [batch, 0] where they are switched off.
    """

    target: Tensor
    history: Tensor
    mask: Tensor
    user: Tensor
    statistics: Tensor

    @property
    def known(self) -> Tensor:
        """User and user statistics, [batch, known_width]: what does not depend on item and history."""
        return torch.cat([self.user, self.statistics[:, 1::2]], dim=-1)


class Inputs(nn.Module):
    """The embeddings of a CRM.

    Attributes:
        item_fields: the field positions of every item, int64 [items + 1, fields]. Items beyond are unknown.
        users: users there were at the training.
        item_width: width of an item's id and fields, a multiple of ``config.embedding``.
        step_width: width of an item with its rating, which stands last.
    """

    item_fields: Tensor

    def __init__(self, config: CrmConfig, vocabulary: Vocabulary, item_fields: Tensor) -> None:
        super().__init__()
        width = config.embedding
        self.config = config
        self.register_buffer("item_fields", item_fields)
        self.users = vocabulary.users
        self.item = Table(vocabulary.items, width, config.item_rows)
        self.fields = Fields(vocabulary.item_fields, width)
        self.user_fields = Fields(vocabulary.user_fields, width)
        self.user = Table(vocabulary.users, width, config.user_rows) if config.user_id else None
        self.item_width = width + self.fields.width
        self.gain = Table(vocabulary.levels, self.item_width)
        self.level = Table(vocabulary.levels, max(1, width // 4))  # a handful of values needs few numbers
        self.step_width = self.item_width + self.level.embedding_dim
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.user_width = self.user_fields.width + width * config.user_id
        self.statistics_width = 6 * config.statistics
        self.known_width = self.user_width + self.statistics_width // 2

    def forward(self, batch: CrmBatch) -> Embedded:
        """Embed a batch."""
        user = [self.user_fields(batch.user_fields)]
        if self.user is not None:
            user.append(self.dropout(self.user(batch.user)))
        statistics = statistics_features(batch.statistics) if self.config.statistics else batch.statistics[:, :0]
        return Embedded(
            target=self._steps(self._known(batch.item), torch.zeros_like(batch.item)),
            history=self._steps(self._known(batch.items), batch.levels),
            mask=torch.arange(batch.items.shape[1], device=batch.length.device) < batch.length[:, None],
            user=torch.cat(user, dim=-1),
            statistics=statistics,
        )

    def _known(self, items: Tensor) -> Tensor:
        return torch.where(items < len(self.item_fields), items, 0)

    def _steps(self, items: Tensor, levels: Tensor) -> Tensor:
        """Item and fields, scaled by the rating, beside the rating: int64 [...] twice -> [..., step_width].

        Scaled element by element (arXiv 1709.07871), so that even a mean of steps tells what was liked from what was
        not. Where there are more steps than pairs of an item and a rating, each pair is put together once.
        """
        ratings = self.level.num_embeddings
        pairs = len(self.item_fields) * ratings
        if items.numel() > pairs:
            every = torch.arange(pairs, device=items.device)
            # F.embedding's backward is one scatter; indexing's is a sort
            return F.embedding(items * ratings + levels, self._steps(every // ratings, every % ratings))
        item = self.dropout(torch.cat([self.item(items), self.fields(self.item_fields[items])], dim=-1))
        return torch.cat([item * (1 + self.gain(levels)), self.level(levels)], dim=-1)


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
