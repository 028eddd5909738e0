"""A RecLora of a few hundred parameters with random weights, and a batch for it."""

from typing import Any

import torch
from torch import nn

from reclora_dist.backbone.load import Backbone
from reclora_dist.backbone.tiny import build
from reclora_dist.config.schema import BackboneConfig, CrmConfig, LoraConfig, TinyConfig
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.inputs import Vocabulary
from reclora_dist.crm.sim import Sim
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.model import RecLora

LORA = LoraConfig(experts=3, rank=2, gate_hidden=5, temperature=1.0)


def crm() -> Sim:
    torch.manual_seed(0)
    config = CrmConfig(embedding=4, attention=(6,), dnn=(8, 8), dropout=0.3, embedding_dropout=0.3)
    return Sim(config, Vocabulary(9, 5, 5, (2,), (3,)), torch.randint(1, 4, (10, 1)))


def text_batch(vocabulary: int = 50, size: int = 4, length: int = 6) -> TextBatch:
    torch.manual_seed(1)
    lengths = torch.randint(2, length + 1, (size,))
    steps = torch.randint(1, 7, (size,))
    real = torch.arange(6) < steps[:, None]
    rows = CrmBatch(
        sample_id=torch.arange(size),
        item=torch.randint(1, 10, (size,)),
        user=torch.randint(1, 6, (size,)),
        label=torch.randint(0, 2, (size,)).float(),
        user_fields=torch.randint(0, 3, (size, 1)),
        statistics=torch.tensor([9, 3, 7, 2]) * torch.randint(0, 9, (size, 1)).float(),  # likes are events too
        items=torch.randint(1, 10, (size, 6)) * real,
        levels=torch.randint(1, 6, (size, 6)) * real,
        length=steps,
    )
    mask = (torch.arange(length) < lengths[:, None]).long()
    return TextBatch(rows, torch.randint(3, vocabulary, (size, length)) * mask, mask, lengths - 1)


def llama() -> Any:
    torch.manual_seed(0)
    return build(TinyConfig(hidden=16, layers=2, heads=2), 50)


def model(lora: LoraConfig = LORA, encoder: bool = False) -> RecLora:
    causal = llama()
    rows = None if encoder else causal.get_output_embeddings().weight.detach()[[7, 9]].clone()
    torch.manual_seed(3)
    found = RecLora(Backbone(causal.get_decoder(), rows, 16), crm(), BackboneConfig(), lora)
    for bank in found.banks.values():
        nn.init.normal_(bank.B, std=0.5)
    return found
