"""Any transformers causal LM or encoder as a yes/no scorer.

transformers, which takes a second and a half to import, is loaded with the first model: who trains a CRM needs none.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reclora_dist.config.schema import BackboneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Backbone(nn.Module):
    """A language model that returns the logits of (no, yes).

    Causal: the hidden state at the last position times two rows of the LM head; neither the rest of the vocabulary is
    computed nor, if samples are not packed, the last layer's MLP at other positions. Encoder: the mean of the hidden
    states through a two-class head, which is trained.
    """

    answers: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        answers: Tensor | None,
        width: int,
        bias: Tensor | None = None,
        form: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        """Wrap the stack of a language model.

        Args:
            answers: the head's rows of the two answer tokens [2, width]; None for an encoder.
            bias: the head's bias of these tokens [2]; None where it has none.
            form: see ``logit_form``.
        """
        super().__init__()
        self.model = model
        self.register_buffer("answers", answers, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.scale, self.cap = form
        self.head = None if answers is not None else _Head(width, 2)
        self.width = width
        # of the forward pass in work; they stay set, because gradient checkpointing runs layers again in backward
        self._rows: tuple[Tensor, Tensor] | None = None
        self._whole = torch.Size()
        if answers is not None:
            self._spare_the_last_mlp()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, last: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, 2] in float32; the arguments are those of ``pooled``."""
        pooled = self.pooled(input_ids, attention_mask, last, positions)
        logits: Tensor = self.answer(pooled) if self.head is None else self.head(pooled)
        return logits

    def answer(self, state: Tensor) -> Tensor:
        """A causal model's logits of (no, yes), float32 [batch, 2], from its state at the last positions."""
        assert self.answers is not None
        # in float32: a bfloat16 logit near 20 has steps of .125, larger than most differences of the two
        bias = None if self.bias is None else self.bias.float()
        raw = self.scale * F.linear(state.float(), self.answers.float(), bias)
        return self.cap * torch.tanh(raw / self.cap) if self.cap else raw

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, last: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """The state that the score is read from, [batch, width]: the last position's, or an encoder's mean.

        Args:
            input_ids: int64 [batch, length], right-padded.
            attention_mask: int64 [batch, length]; a causal model needs none.
            last: int64 [batch], position of each row's last token; of a packed row, of each sample's.
            positions: place of each token in its sample, int64 [1, length], if all samples are in one row (packed). A
                causal model's attention is kept within the samples by them.
        """
        self._rows = None
        if positions is not None:
            packed = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
            state: Tensor = packed[0, last]
            return state
        if self.head is None:
            # no mask: padding is on the right, where no real token of a causal model looks, and without a mask
            # attention takes its faster kernel
            self._rows = torch.arange(len(last), device=last.device), last
            hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
            last_state: Tensor = hidden[self._rows]
            return last_state
        return mean_pool(
            self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask
        )

    def _spare_the_last_mlp(self) -> None:
        """Let the last layer's MLP see the last positions only: its other rows are in no score."""
        last_layer = next(reversed(getattr(self.model, "layers", ())), None)
        mlp = getattr(last_layer, "mlp", None)
        if mlp is not None:
            mlp.register_forward_pre_hook(self._gather)  # methods, so that a deep copy has hooks of its own
            mlp.register_forward_hook(self._scatter)

    def _gather(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        self._whole = inputs[0].shape
        return None if self._rows is None else (inputs[0][self._rows][:, None],)

    def _scatter(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        return None if self._rows is None else output.new_zeros(self._whole).index_put(self._rows, output[:, 0])


class _Head(nn.Linear):
    """A Linear that computes in float32, also where DeepSpeed has cast it with the rest of the model."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the hidden states over the real tokens: [batch, length, width] -> [batch, width]."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def load_backbone(config: BackboneConfig, path: str) -> Backbone:
    """Load the model at ``path`` (a folder or a hub id) without its unused head or pooler.

    Raises:
        ValueError: the folder is missing, an answer is not one token, or the model knows no gradient checkpointing.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    _check(path)
    logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(config.seed)  # an encoder's two-class head starts from here
    if config.kind == "encoder":
        model = AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True)
        if hasattr(model, "pooler"):
            model.pooler = None  # ours is the mean of the states; an adapter there would get no gradient
    else:
        causal = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        head, ids = causal.get_output_embeddings(), answer_ids(load_tokenizer(path), config.answers)
        model = causal.get_decoder()
    if config.gradient_checkpointing:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed within transformers 5
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.kind == "encoder":
        return Backbone(model, None, model.config.hidden_size)
    bias = None if getattr(head, "bias", None) is None else head.bias.detach()[ids].clone()
    return Backbone(model, head.weight.detach()[ids].clone(), model.config.hidden_size, bias, logit_form(causal))


def logit_form(causal: nn.Module) -> tuple[float, float]:
    """What a causal model does to the logits of its head: a factor, and a soft cap after that (0: none).

    Cohere multiplies them, Granite divides them, Gemma 2 caps them: ``cap · tanh(x / cap)``; most do nothing.
    """
    config: Any = causal.config
    factor = getattr(causal, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return factor / divisor, getattr(config, "final_logit_softcapping", None) or 0.0


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The fast tokenizer at ``path``.

    Raises:
        ValueError: the folder is missing or has no tokenizer.json.
    """
    from transformers import AutoTokenizer

    _check(path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


def answer_ids(tokenizer: "PreTrainedTokenizerBase", answers: tuple[str, str]) -> list[int]:
    """The token that starts each answer.

    Raises:
        ValueError: the two answers start with the same token, so their logits could not differ.
    """
    first = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in answers]
    ids = [next((i for i in tokens if tokenizer.decode([i]).strip()), tokens[0]) for tokens in first]
    if ids[0] == ids[1]:
        raise ValueError(
            f"backbone.answers {answers!r} start with the same token {ids[0]}; choose words that differ there"
        )
    return ids


def _check(path: str) -> None:
    local = Path(path).expanduser()
    if not path or ((local.is_absolute() or path.startswith(".")) and not (local / "config.json").exists()):
        raise ValueError(f"backbone.path {path!r} is not a model folder: no config.json there")
