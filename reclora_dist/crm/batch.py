"""Input and output of a conventional recommender."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class CrmBatch:
    """Input of the CRM for B samples; F user fields, history of K steps padded with 0 at the end.

    Attributes:
        sample_id: int64 [B].
        item: target item positions, int64 [B].
        user: user positions, int64 [B].
        label: 0 or 1, float32 [B].
        user_fields: positions of the user's field values, int64 [B, F].
        statistics: raw running counts in the order of ``contract.schema.STATISTICS``, float32 [B, 4].
        items: history items, oldest first, int64 [B, K].
        levels: their rating levels, int64 [B, K].
        length: real history steps, int64 [B].
    """

    sample_id: torch.Tensor
    item: torch.Tensor
    user: torch.Tensor
    label: torch.Tensor
    user_fields: torch.Tensor
    statistics: torch.Tensor
    items: torch.Tensor
    levels: torch.Tensor
    length: torch.Tensor

    def __len__(self) -> int:
        return int(self.sample_id.shape[0])

    @property
    def size(self) -> int:
        """What the work of a forward pass grows with: B."""
        return len(self)

    @property
    def tokens(self) -> int:
        """Tokens of text: none."""
        return 0

    def take(self, rows: torch.Tensor) -> "CrmBatch":
        """The samples ``rows``, int64 [n]."""
        return CrmBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> "CrmBatch":
        """The batch on ``device``."""
        return CrmBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class CrmOutput:
    """What a CRM says of a batch.

    Attributes:
        state: what gates read of (user, target, history), [batch, state_width].
        logit: logit of liking, [batch].
    """

    state: torch.Tensor
    logit: torch.Tensor
    _user_state: Callable[[], torch.Tensor]

    @property
    def user_state(self) -> torch.Tensor:
        """What is known without the target item, [batch, user_state_width]; computed when it is asked for.

        With a history that was retrieved for the target (any strategy but ``recent``) it depends on the target all the
        same.
        """
        return self._user_state()
