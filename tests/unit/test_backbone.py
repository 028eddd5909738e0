"""The tiny backbone and its pretraining, what loading refuses, and item vectors: pooling and PCA."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.backbone.embed import Projection, TextEncoder
from reclora_dist.backbone.load import answer_ids, load_backbone, load_tokenizer, mean_pool
from reclora_dist.backbone.tiny import pretrain, train_tokenizer
from reclora_dist.config.schema import BackboneConfig, TinyConfig
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
