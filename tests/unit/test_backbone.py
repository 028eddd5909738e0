"""The tiny backbone and its pretraining, all families of models, what loading refuses, item vectors: pooling, PCA."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from reclora_dist.backbone.embed import Projection, TextEncoder
from reclora_dist.backbone.load import Backbone, answer_ids, load_backbone, load_tokenizer, mean_pool
from reclora_dist.backbone.tiny import pretrain, train_tokenizer
from reclora_dist.config.schema import BackboneConfig, LoraConfig, TinyConfig
from reclora_dist.lora.bank import Bank
from reclora_dist.lora.inject import Conditioning, inject
from reclora_dist.retrieval import check_grid

TEXTS = [f"{color} record number {n}. Answer Yes or No: Yes" for n in range(30) for color in ("red", "blue")]
TINY = TinyConfig(hidden=16, layers=1, heads=2, vocabulary=320, steps=30, batch_size=4, sequence=32, lr=1e-2)
CONFIG = BackboneConfig(tiny=TINY)


def trained(folder: Path, config: BackboneConfig = CONFIG) -> list[float]:
    losses: list[float] = []
    tokenizer = train_tokenizer(TEXTS, config.tiny.vocabulary)
    pretrain(config, tokenizer, TEXTS, folder, lambda step, loss: losses.append(loss))
    return losses


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    losses = trained(folder)
    assert len(losses) == TINY.steps
    assert losses[-1] < losses[0] - 1, "it learns"
    return folder


def test_it_loads_offline_without_pickle_as_a_frozen_scorer(tiny: Path) -> None:
    assert {path.name for path in tiny.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [path for path in tiny.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    backbone = load_backbone(CONFIG, str(tiny))
    ids = torch.tensor([[1, 5, 9], [1, 7, 0]])
    logits = backbone(ids, (ids > 0).long(), torch.tensor([2, 1]))
    assert logits.shape == (2, 2)
    assert logits.dtype == torch.float32


def test_the_same_seed_gives_the_same_model(tiny: Path, tmp_path: Path) -> None:
    trained(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


def test_few_short_texts_are_enough(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b"], 300)
    steps: list[int] = []
    pretrain(CONFIG, tokenizer, ["a b"], tmp_path, lambda step, loss: steps.append(step))
    assert steps == list(range(1, TINY.steps + 1))


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 20])
def test_any_number_of_steps_can_be_trained(steps: int, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tiny=dataclasses.replace(TINY, steps=steps))
    losses = trained(tmp_path, config)
    assert len(losses) == steps
    assert np.isfinite(losses).all()


def test_the_tokenizer_spells_anything_and_marks_the_start(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    ids = tokenizer("Ünknown 日本 words")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Ünknown 日本 words"


def test_answers_that_start_alike_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"\('Yes', 'Yes'\) start with the same token \d+; choose words that differ"):
        load_backbone(BackboneConfig(tiny=TINY, answers=("Yes", "Yes")), str(tiny))


def test_answers_of_a_sentencepiece_llama_are_their_first_letters_not_the_space(real_model: Any) -> None:
    tokenizer = load_tokenizer(real_model.path("stories260K"))
    ids = answer_ids(tokenizer, ("No", "Yes"))
    assert [tokenizer.decode([i]).strip()[:1] for i in ids] == ["N", "Y"]


@pytest.mark.parametrize("path", ["", "./nowhere", "/nowhere/at/all"])
@pytest.mark.parametrize("load", [lambda p: load_backbone(CONFIG, p), load_tokenizer])
def test_a_missing_folder_is_named(load: Any, path: str) -> None:
    with pytest.raises(ValueError, match=f"backbone.path '{path}' is not a model folder: no config.json there"):
        load(path)


SMALL = {
    "vocab_size": 397,  # no other size of these models
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
CAUSAL = {
    "llama": (LlamaConfig(**SMALL), {"q_proj", "v_proj"}),
    "llama_tied": (LlamaConfig(**SMALL, **GROUPED, tie_word_embeddings=True), {"q_proj", "v_proj"}),
    "mistral": (MistralConfig(**SMALL, **GROUPED, sliding_window=4), {"q_proj", "v_proj"}),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=1), {"q_proj", "v_proj"}),
    "qwen3": (Qwen3Config(**SMALL, **GROUPED), {"q_proj", "v_proj"}),
    "gpt_neox": (GPTNeoXConfig(**SMALL), {"query_key_value"}),
    "phi (head with a bias)": (PhiConfig(**SMALL), {"q_proj", "v_proj"}),
    "granite (logits divided)": (GraniteConfig(**SMALL, logits_scaling=8.0), {"q_proj", "v_proj"}),
    "cohere (logits multiplied)": (CohereConfig(**SMALL, logit_scale=0.5), {"q_proj", "v_proj"}),
    "gemma 2 (logits capped)": (Gemma2Config(**SMALL, **GROUPED, final_logit_softcapping=0.2), {"q_proj", "v_proj"}),
}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8}
ENCODERS = {
    "bert": (BertConfig(**SMALL), {"query", "value"}),
    "modernbert": (ModernBertConfig(**SMALL, **MODERN), {"Wqkv"}),
}


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and last places of rows of 6, 2 and 4 tokens, padded."""
    last = torch.tensor([5, 1, 3])
    mask = (torch.arange(6) <= last[:, None]).long()
    return torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(0)) * mask, mask, last


class Sizes(TorchDispatchMode):
    """The last dimension of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dim() and not func.is_view:
            self.found.add(made.shape[-1])
        return made


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_family_scores_as_its_full_head_without_computing_it(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, names = CAUSAL[family]
    full = AutoModelForCausalLM.from_config(config).eval()
    if full.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(full.get_output_embeddings().bias)
    full.save_pretrained(tmp_path)
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(kind="causal"), str(tmp_path)).eval()
    ids, mask, last = prompts()
    with Sizes() as sizes:
        logits = backbone(ids, mask, last)
    assert SMALL["vocab_size"] not in sizes.found
    everything = full(input_ids=ids, attention_mask=mask).logits[torch.arange(3), last]
    torch.testing.assert_close(logits, everything[:, answer_ids(tokenizer, ("No", "Yes"))])
    assert_default_targets_learn(backbone, names)


def test_large_answers_of_a_half_precision_model_are_told_apart(tmp_path: Path) -> None:
    """bfloat16 has steps of .125 there; the two logits must not be rounded before their difference is taken."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CAUSAL["llama"][0]).save_pretrained(tmp_path)
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(kind="causal", dtype="bfloat16"), str(tmp_path))
    ids, mask, last = torch.randint(3, 300, (500, 6)), torch.ones(500, 6, dtype=torch.int64), torch.full((500,), 5)
    backbone.answers = (20 / 16 + 0.1 * torch.randn(2, 16)).bfloat16()
    with torch.no_grad():
        backbone.model.embed_tokens.weight += 0.1  # type: ignore[union-attr, operator]  # the mean of all states
        state = backbone.pooled(ids, mask, last).double()
        logits = backbone(ids, mask, last)
    assert 15 < logits.mean() < 25
    torch.testing.assert_close(logits.double(), state @ backbone.answers.double().T, rtol=0, atol=1e-4)
    assert len((logits[:, 1] - logits[:, 0]).unique()) > 250


def test_an_encoders_head_scores_in_float32_though_the_model_was_cast(tmp_path: Path) -> None:
    """DeepSpeed casts the head with the rest of the model."""
    torch.manual_seed(0)
    AutoModel.from_config(ENCODERS["bert"][0]).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(kind="encoder"), str(tmp_path)).bfloat16()
    logits = backbone(*prompts())
    assert backbone.head is not None
    assert logits.dtype == torch.float32
    weight, bias = backbone.head.weight.double(), backbone.head.bias.double()
    torch.testing.assert_close(logits.double(), backbone.pooled(*prompts()).double() @ weight.T + bias)
    logits.sum().backward()
    assert backbone.head.weight.grad is not None
    assert backbone.head.weight.grad.any()


@pytest.mark.parametrize("family", CAUSAL)
def test_the_last_mlp_is_computed_only_where_the_score_is_read(family: str, tmp_path: Path) -> None:
    """With banks on all its layers, too; the gradients are those of the whole."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CAUSAL[family][0]).save_pretrained(tmp_path)
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path)
    backbone, conditioning = load_backbone(BackboneConfig(kind="causal"), str(tmp_path)), Conditioning()
    banks = inject(backbone.model, ["all-linear"], LoraConfig(experts=3, rank=2), conditioning)
    for bank in banks.values():
        torch.nn.init.normal_(bank.B)
    conditioning.mixture = torch.rand(len(banks), 3, 3)
    seen: list[torch.Size] = []
    for layer in backbone.model.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))  # type: ignore[union-attr]
    ids, mask, last = prompts()
    found = gradients(backbone(ids, mask, last), banks)
    assert seen == [(3, 6), (3, 1)]
    backbone._rows = None  # a copy has hooks of its own
    torch.testing.assert_close(copy.deepcopy(backbone)(ids, mask, last), found[0])
    hidden = backbone.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(3), last]
    expected = gradients(backbone.answer(hidden), banks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients(logits: Tensor, banks: dict[str, Bank]) -> list[Tensor]:
    """The logits and the gradient of their squares for each parameter of the banks."""
    parameters = [parameter for bank in banks.values() for parameter in bank.parameters()]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters)]


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_family_scores_by_the_mean_of_its_states(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, names = ENCODERS[family]
    full = AutoModel.from_config(config).eval()
    full.save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(kind="encoder"), str(tmp_path)).eval()
    ids, mask, last = prompts()
    hidden = full(input_ids=ids, attention_mask=mask).last_hidden_state
    means = torch.stack([row[: n + 1].mean(0) for row, n in zip(hidden, last, strict=True)])
    assert backbone.head is not None
    torch.testing.assert_close(backbone(ids, mask, last), backbone.head(means))
    assert not any("pooler" in name for name, _ in backbone.named_modules())
    assert_default_targets_learn(backbone, names)


def assert_default_targets_learn(backbone: Backbone, names: set[str]) -> None:
    """Without targets named, the family's own are found in both layers; the scores stay and the banks learn."""
    ids, mask, last = prompts()
    before = backbone(ids, mask, last)
    conditioning = Conditioning()
    banks = inject(backbone.model, (), LoraConfig(experts=3, rank=2), conditioning)
    assert {name.rpartition(".")[2] for name in banks} == names
    assert len(banks) == 2 * len(names)
    conditioning.mixture = torch.rand(len(banks), 3, 3)
    logits = backbone(ids, mask, last)
    torch.testing.assert_close(logits, before)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
    assert all(bank.B.grad is not None and bank.B.grad.any() for bank in banks.values())
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert", "modernbert"])
def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing(family: str, tmp_path: Path) -> None:
    config, _ = {**CAUSAL, **ENCODERS}[family]
    kind = "causal" if family in CAUSAL else "encoder"
    torch.manual_seed(0)
    (AutoModelForCausalLM if kind == "causal" else AutoModel).from_config(config).save_pretrained(tmp_path)
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path)

    def gradients(checkpointing: bool) -> tuple[int, list[Tensor]]:
        settings = BackboneConfig(kind=kind, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        backbone, conditioning = load_backbone(settings, str(tmp_path)).train(), Conditioning()
        banks = inject(backbone.model, (), LoraConfig(experts=3, rank=2, dropout=0.1), conditioning)
        calls: list[int] = []
        for bank in banks.values():
            torch.nn.init.normal_(bank.B)
            bank.register_forward_hook(lambda *_: calls.append(1))
        conditioning.mixture = mixture = torch.rand(len(banks), 3, 3).requires_grad_()
        backbone(*prompts()).square().sum().backward()
        leaves = [mixture, *(p for bank in banks.values() for p in bank.parameters())]
        return len(calls) // len(banks), [leaf.grad for leaf in leaves if leaf.grad is not None]

    (once, plain), (twice, checkpointed) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert len(plain) == len(checkpointed) > 4
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_mean_pooling_ignores_padding() -> None:
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    pooled = mean_pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, :2].mean(0))
    assert not pooled[2].any(), "a row without tokens is zero, not NaN"


def test_a_text_has_the_same_vector_alone_and_beside_a_longer_one(tiny: Path) -> None:
    encode = TextEncoder(str(tiny), 32)
    both = encode(["red record", "blue record number 7 and much more of it"])
    assert both.dtype == np.float32
    assert both.shape == (2, TINY.hidden)
    np.testing.assert_allclose(both[0], encode(["red record"])[0], atol=1e-5)
    cut = TextEncoder(str(tiny), 4)
    np.testing.assert_allclose(cut(["red record number 1"]), cut(["red record number 2"]), atol=1e-6)


def test_real_sentence_vectors_know_what_is_alike(real_model: Any) -> None:
    encode = TextEncoder(real_model.path("all-MiniLM-L6-v2"), 64)
    vectors = encode(["A movie about space ships.", "A film on space travel.", "A cook book of soups."])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.5 > unit[0] @ unit[2]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(6, 20), width=st.integers(2, 8), dimension=st.integers(0, 9), seed=st.integers(0, 100))
def test_reduced_vectors_have_unit_length_on_the_grid(rows: int, width: int, dimension: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, width)).astype(np.float32)
    projection = Projection.fit(vectors[:-2], dimension)
    found = projection(vectors)
    assert found.dtype == np.float32
    assert found.shape == (rows, width if dimension == 0 else min(width, dimension))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    check_grid(found)
    np.testing.assert_array_equal(Projection.from_array(projection.to_array())(vectors), found)


def test_the_projection_keeps_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 5)) * [0.01, 5, 0.01, 3, 0.01] + 7).astype(np.float32)
    found = Projection.fit(vectors, 2)(vectors)
    centred = vectors - vectors.mean(0)
    plane = centred[:, [1, 3]] / np.linalg.norm(centred[:, [1, 3]], axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, plane @ plane.T, atol=0.05)
    np.testing.assert_array_equal(Projection.fit(vectors, 2)(vectors), found)


def test_no_training_item_is_an_error() -> None:
    with pytest.raises(ValueError, match="no item has a training event, so there is nothing to fit the PCA on"):
        Projection.fit(np.ones((0, 2), np.float32), 1)
