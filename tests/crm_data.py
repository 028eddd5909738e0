"""Small CRMs and batches for them."""

import torch

from reclora_dist.config.schema import CrmConfig
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.build import KINDS, Crm
from reclora_dist.crm.inputs import Vocabulary

CONFIG = CrmConfig(embedding=4, attention=(6, 5), dnn=(8, 7), user_id=True)
WORDS = Vocabulary(items=12, users=6, levels=5, user_fields=(2, 3), item_fields=(3, 4))


def model(config: CrmConfig = CONFIG) -> Crm:
    torch.manual_seed(0)
    fields = torch.stack([torch.randint(0, 4, (13,)), torch.randint(0, 5, (13,))], 1)
    fields[0] = 0
    found = KINDS[config.kind](config, WORDS, fields)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def batch(size: int, steps: int = 6, seed: int = 1) -> CrmBatch:
    torch.manual_seed(seed)
    length = torch.randint(0, steps + 1, (size,))
    real = torch.arange(steps) < length[:, None]
    return CrmBatch(
        sample_id=torch.arange(size),
        item=torch.randint(1, 13, (size,)),
        user=torch.randint(0, 7, (size,)),
        label=torch.randint(0, 2, (size,)).float(),
        user_fields=torch.stack([torch.randint(0, 3, (size,)), torch.randint(0, 4, (size,))], 1),
        statistics=torch.tensor([9, 3, 7, 2]) * torch.randint(0, 9, (size, 1)).float(),  # likes are events too
        items=torch.randint(1, 13, (size, steps)) * real,
        levels=torch.randint(1, 6, (size, steps)) * real,
        length=length,
    )


def part(rows: CrmBatch, index: slice) -> CrmBatch:
    return CrmBatch(**{name: value[index] for name, value in vars(rows).items()})
