"""The embedded default backbone: a small LLaMA and its tokenizer, trained here, so that nothing is downloaded."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reclora_dist.config.schema import BackboneConfig, TinyConfig


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` entries, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


def build(config: TinyConfig, vocabulary: int) -> LlamaForCausalLM:
    """An untrained LLaMA of the configured size."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pretrain(
    config: BackboneConfig,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    folder: Path,
    progress: Callable[[int, float], None],
) -> float:
    """Train a model on ``texts`` (next token) and save it with its tokenizer at ``folder``.

    Args:
        progress: called with (step, loss) after every step.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.
    """
    tiny = config.tiny
    torch.manual_seed(config.seed)
    model = build(tiny, len(tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=tiny.lr, weight_decay=0.01)
    rise = min(0.9, max(0.1, 2 / tiny.steps))  # OneCycleLR divides by the steps of its rise less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, tiny.lr, total_steps=tiny.steps, pct_start=rise)
    losses = []
    for step, batch in enumerate(_batches(tokenizer, texts, config), 1):
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        progress(step, losses[-1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(np.mean(losses[-max(1, tiny.steps // 10) :]))


def _batches(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], config: BackboneConfig) -> Iterator[Tensor]:
    """Random windows of the shuffled texts laid end to end, int64 [batch, sequence]."""
    tiny = config.tiny
    order = list(texts)
    random.Random(config.seed).shuffle(order)
    encoded = tokenizer(order)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    stream = stream.repeat(1 + (tiny.sequence + 1) // len(stream))  # a handful of items is less than one window
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(tiny.steps):
        starts = torch.randint(0, len(stream) - tiny.sequence, (tiny.batch_size, 1), generator=generator)
        yield stream[starts + torch.arange(tiny.sequence)]
