"""What the tiny backbone reads before it is tuned: the domain's words, and prompts with answers drawn at random."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from reclora_dist.backbone.tiny import train_tokenizer
from reclora_dist.config.schema import BackboneConfig, PromptConfig
from reclora_dist.contract.manifest import Manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.storage import Folder
from reclora_dist.data.prompts import PromptBuilder


def corpus(
    events: Folder, manifest: Manifest, config: BackboneConfig, prompt: PromptConfig, short: int, prompts: int
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """A tokenizer and the texts to pretrain on.

    Half of the texts describe items. The others are prompts over ``short`` consecutive training events of a user: the
    ratings of the history are read, but the answer is yes or no by a coin, so no label of a sample is learned here.
    """
    items = read_parts(events, manifest.select("items/"), ["item", "title", "text"])
    texts = items["text"].to_pylist()
    titles = [""] * (manifest.facts["items"] + 1)
    for item, title in zip(items["item"].to_pylist(), items["title"].to_pylist(), strict=True):
        titles[item] = title
    words = [prompt.profile, prompt.history, prompt.event, prompt.question, prompt.answer]
    answers = [f" {word}" for word in config.answers]
    tokenizer = train_tokenizer([*texts, *titles, *(words + answers) * 100], config.tiny.vocabulary)
    facts = manifest.facts
    builder = PromptBuilder(prompt, tokenizer, titles, facts["rating_levels"], facts["user_fields"], causal=True)
    rng = np.random.default_rng(config.seed)
    asked = [
        builder.text(*sample) + answers[rng.integers(2)] for sample in _samples(events, manifest, short, prompts, rng)
    ]
    repeat = max(1, len(asked) // max(1, len(texts)))
    return tokenizer, [*texts * repeat, *asked]


Sample = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def _samples(events: Folder, manifest: Manifest, short: int, count: int, rng: np.random.Generator) -> list[Sample]:
    """``count`` random windows of the training events: (user fields, items, levels, next item)."""
    users = read_parts(events, manifest.select("users/"), ["user", "fields"])
    fields = dict(zip(users["user"].to_pylist(), users["fields"].to_pylist(), strict=True))
    log = read_parts(events, manifest.select("events/")[:1], ["user", "item", "level", "split"])
    user, item, level = (log[name].to_numpy() for name in ("user", "item", "level"))
    training = np.array(log["split"].to_pylist()) == "train"
    first = np.searchsorted(user, user)  # events are sorted by user
    targets = np.flatnonzero(training & (np.arange(len(user)) - first >= 2))
    chosen = rng.choice(targets, min(count, len(targets)), replace=False) if len(targets) else targets
    starts = np.maximum(first[chosen], chosen - short)
    return [
        (fields[int(user[t])], item[s:t].tolist(), level[s:t].tolist(), int(item[t]))
        for s, t in zip(starts, chosen, strict=True)
    ]
