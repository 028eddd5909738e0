"""Input of the language model and of the CRM that conditions it."""

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
    """

    crm: CrmBatch
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    last: torch.Tensor

    def __len__(self) -> int:
        return len(self.crm)

    @property
    def label(self) -> torch.Tensor:
        """0 or 1, float32 [B]."""
        return self.crm.label

    def to(self, device: torch.device | str) -> "TextBatch":
        """The batch on ``device``."""
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.last))
        return TextBatch(self.crm.to(device), *moved)
