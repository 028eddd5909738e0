"""RecLoRA: a frozen language model whose adapters are mixed per sample by the state of a frozen CRM."""

from typing import Any

import torch
from torch import Tensor, nn

from reclora_dist.backbone.load import Backbone
from reclora_dist.config.schema import BackboneConfig, LoraConfig
from reclora_dist.crm.build import Crm
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.gate import GateStack
from reclora_dist.lora.inject import Conditioning, inject


class RecLora(nn.Module):
    """Backbone + banks + gates + CRM; plain LoRA is the same with one expert and no gate.

    The CRM is no sub-module: it is frozen, stays in eval mode, is not partitioned by ZeRO and not saved with the
    trainable parameters.
    """

    def __init__(self, backbone: Backbone, crm: Crm, target: BackboneConfig, config: LoraConfig) -> None:
        super().__init__()
        if config.gate == "none" and config.experts != 1:
            raise ValueError(f"gate 'none' needs experts = 1, not {config.experts}; or take gate 'uniform'")
        self.config = config
        self.conditioning = Conditioning()
        self.backbone = backbone
        self.banks = inject(backbone.model, target.targets, config, self.conditioning, target.top_layers)
        self.gates = _gates(config, len(self.banks), crm.state_width) if config.gate == "crm" else None
        self._crm = [crm.eval().requires_grad_(False)]

    @property
    def crm(self) -> Crm:
        """The frozen CRM."""
        return self._crm[0]

    def _apply(self, fn: Any, recurse: bool = True) -> "RecLora":
        """Take the CRM along when the module moves to another device."""
        self.crm._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def mixture(self, batch: TextBatch) -> Tensor | None:
        """Mixtures of a batch, [matrices, batch, experts]; None without a gate."""
        if self.config.gate == "none":
            return None
        if self.gates is None:
            shape = (len(self.banks), len(batch.input_ids), self.config.experts)
            return torch.full(shape, 1 / self.config.experts, device=batch.input_ids.device)
        with torch.no_grad():
            state = self.crm(batch.crm).state
        result: Tensor = self.gates(state)
        return result

    def forward(self, batch: TextBatch) -> Tensor:
        """Logits of (no, yes) for a batch, [batch, 2]."""
        self.conditioning.mixture = self.mixture(batch)
        logits: Tensor = self.backbone(batch.input_ids, batch.attention_mask, batch.last)
        return logits


def _gates(config: LoraConfig, matrices: int, state: int) -> GateStack:
    return GateStack(
        matrices, state, config.gate_hidden, config.experts, temperature=config.temperature, dropout=config.gate_dropout
    )


def parameter_role(name: str) -> str:
    """Which learning rate a trainable parameter takes: ``bank``, ``gate`` or ``other`` (an encoder's head)."""
    if ".bank." in name:
        return "bank"
    return "gate" if name.startswith("gates.") else "other"
