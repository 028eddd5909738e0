"""RecLoRA: a frozen language model whose adapters are mixed per sample by the state of a frozen CRM."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.backbone.load import Backbone
from reclora_dist.config.check import check_lora
from reclora_dist.config.schema import BackboneConfig, LoraConfig
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.build import Crm
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.fusion import Fusion
from reclora_dist.lora.gate import Gate, GateStack, IdGate, RandomGate
from reclora_dist.lora.inject import Conditioning, inject


class RecLora(nn.Module):
    """Backbone + banks + gates + CRM; plain LoRA is the same with one expert and no gate.

    The CRM is no sub-module: it is frozen, stays in eval mode, is not partitioned by ZeRO and not saved with the
    trainable parameters.
    """

    def __init__(self, backbone: Backbone, crm: Crm, target: BackboneConfig, config: LoraConfig) -> None:
        """Wrap ``backbone``, which is changed in place.

        Raises:
            ValueError: the settings of ``config`` do not go together, or no layer of the backbone is a target.
        """
        super().__init__()
        check_lora(config, "LoraConfig")
        self.config = config
        self.conditioning = Conditioning()
        self.backbone = backbone
        self.banks = inject(backbone.model, target.targets, config, self.conditioning, target.top_layers)
        self.gates = _gates(config, len(self.banks), crm, target.seed)
        self.fusion = Fusion(backbone.width, crm.state_width) if config.head == "fusion" else None
        if self.fusion is not None and backbone.head is not None:
            backbone.head.requires_grad_(False)  # not called any more: DDP would wait for its gradient
        if config.head == "offset" and backbone.head is not None:
            nn.init.zeros_(backbone.head.weight)  # training starts at the CRM's own score
            nn.init.zeros_(backbone.head.bias)
        self.reads_crm = config.gate in ("crm", "user") or config.head != "answers"
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

    def mixture(self, crm: CrmBatch) -> Tensor | None:
        """Mixtures of the samples with these CRM rows, [matrices, batch, experts]; None without a gate.

        In mode ``matrix`` they are matrices, [matrices, batch, r · r].
        """
        return self._mixture(crm, self._known(crm))

    def forward(self, batch: TextBatch, mixture: Tensor | None = None) -> Tensor:
        """Logits of (no, yes) for a batch, [batch, 2].

        Args:
            mixture: what ``mixture`` returns of other samples, to be used in place of the batch's own.
        """
        known = self._known(batch.crm, batch.answers)
        self.conditioning.mixture = self._mixture(batch.crm, known) if mixture is None else mixture
        self.conditioning.segments = batch.segments
        prompt = batch.input_ids, batch.attention_mask, batch.last, batch.positions
        if self.fusion is not None and known is not None:
            fused: Tensor = self.fusion(self.backbone.pooled(*prompt), known.state)
            return fused
        return self._headed(self.backbone(*prompt), known)

    def _headed(self, answers: Tensor, known: CrmOutput | None) -> Tensor:
        """The logits of the score, [batch, 2], from those of the answers.

        With head ``blend`` they are the answers' own in training: what the CRM knows would keep the language model from
        learning the rest.
        """
        head, share = self.config.head, self.config.blend
        if known is None or head == "answers" or (head == "blend" and self.training):
            return answers
        crm = F.pad(known.logit[:, None], (1, 0)).to(answers.dtype)
        return answers + crm if head == "offset" else share * answers + (1 - share) * crm

    @torch.no_grad()
    def _known(self, crm: CrmBatch, answers: tuple[Tensor, ...] = ()) -> CrmOutput | None:
        """What the CRM says of a batch, or said before; None if neither gate nor head reads it."""
        if not self.reads_crm:
            return None
        if answers:
            state, logit, user_state = answers
            return CrmOutput(state, logit, lambda: user_state)
        output: CrmOutput = self.crm(crm)
        return output

    def _mixture(self, crm: CrmBatch, known: CrmOutput | None) -> Tensor | None:
        if self.config.gate == "none":
            return None
        if self.gates is None:
            shape = (len(self.banks), len(crm), self.config.experts)
            return torch.full(shape, 1 / self.config.experts, device=crm.user.device)
        source = crm.user
        if isinstance(self.gates, GateStack):
            assert known is not None
            source = known.state if self.config.gate == "crm" else known.user_state
        mixture: Tensor = self.gates(source)
        return mixture.expand(len(self.banks), -1, -1)  # a shared gate's is that of every matrix


def _gates(config: LoraConfig, matrices: int, crm: Crm, seed: int) -> Gate | None:
    gates = 1 if config.shared_gate else matrices
    match config.gate:
        case "crm":
            return GateStack(gates, crm.state_width, config)
        case "user":
            return GateStack(gates, crm.user_state_width, config)
        case "id":
            return IdGate(gates, crm.inputs.users, config)
        case "random":
            return RandomGate(gates, config, seed)
        case "uniform" | "none":
            return None


def parameter_role(name: str) -> str:
    """Which learning rate a trainable parameter takes: ``bank``, ``gate`` or ``other`` (heads)."""
    if ".bank." in name:
        return "bank"
    return "gate" if name.startswith("gates.") else "other"
