"""Input of the language model and of the CRM that conditions it."""

import dataclasses
from dataclasses import dataclass

import torch

from reclora_dist.crm.batch import CrmBatch


@dataclass(frozen=True)
class TextBatch:
    """Input of the language model for B samples, right-padded to the longest prompt of the batch (L tokens).

    Attributes:
        crm: the CRM rows of the same samples.
        input_ids: int64 [B, L].
        attention_mask: 1 for real tokens, int64 [B, L].
        last: place of the last real token, int64 [B].
        positions: of a packed batch, in which all samples are one after another in one row: place of each token in its
            prompt, int64 [1, L]; ``last`` is counted in that row then. None where every sample has its row.
        segments: of a packed batch, the sample that each token belongs to, int64 [1, L].
        answers: what the CRM says of the samples, if it was asked before: state [B, .], logit [B], user state [B, .].
        taught: probability of a like to be learned in place of the label, float32 [B]; None: the label.
    """

    crm: CrmBatch
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    last: torch.Tensor
    answers: tuple[torch.Tensor, ...] = ()
    taught: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.crm)

    @property
    def label(self) -> torch.Tensor:
        """0 or 1, float32 [B]."""
        return self.crm.label

    @property
    def size(self) -> int:
        """What the work of a forward pass grows with: tokens, padding included."""
        return self.input_ids.numel()

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())

    def take(self, rows: torch.Tensor) -> "TextBatch":
        """The samples ``rows``, int64 [n], padded to the longest of them."""
        last = self.last[rows]
        length = int(last.max()) + 1 if len(rows) else 0
        return TextBatch(
            self.crm.take(rows),
            self.input_ids[rows, :length],
            self.attention_mask[rows, :length],
            last,
            tuple(answer[rows] for answer in self.answers),
            None if self.taught is None else self.taught[rows],
        )

    def packed(self) -> "TextBatch":
        """The same samples one after another in one row, without padding."""
        real = self.attention_mask.bool()
        lengths = real.sum(1)
        places = torch.arange(self.input_ids.shape[1]).expand(self.input_ids.shape)
        owners = torch.arange(len(self))[:, None].expand(self.input_ids.shape)
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[real][None],
            attention_mask=self.attention_mask[real][None],
            last=lengths.cumsum(0) - 1,
            positions=places[real][None],
            segments=owners[real][None],
        )

    def to(self, device: torch.device | str) -> "TextBatch":
        """The batch on ``device``."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        answers = tuple(answer.to(device, non_blocking=True) for answer in self.answers)
        return dataclasses.replace(self, crm=self.crm.to(device), answers=answers, **moved)
