"""What the tiny backbone reads: training events only, and answers that are drawn by a coin."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sample_data import TOPICS, write_run

from reclora_dist.config.schema import BackboneConfig, PromptConfig
from reclora_dist.contract.manifest import Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.corpus import corpus

SHORT = 4
NUMBER = re.compile(r"record (\d+)")
EVENTS_FIELD = {name: pa.field(name, pa.int8(), nullable=False) for name in ("label", "level")}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    run = tmp_path_factory.mktemp("run")
    write_run(run)
    return Folder(str(run / "events"))


def texts(events: Folder, seed: int = 0, **prompt: str) -> list[str]:
    manifest, config = read_manifest(events, EVENTS), BackboneConfig(seed=seed)
    return corpus(events, manifest, config, PromptConfig(**prompt), SHORT, 300)[1]


def asked(found: list[str]) -> list[str]:
    return [text for text in found if "Will the user like" in text]


def log(events: Folder) -> pa.Table:
    return read_parts(events, read_manifest(events, EVENTS).select("events/"))


def windows(events: Folder) -> dict[tuple[tuple[int, int], ...], int]:
    """Every window of training events that may be asked about, as ((item, level), ..., (target, 0)), and its label."""
    rows = log(events).to_pandas()
    found = {}
    for _, own in rows.groupby("user"):
        pairs = list(zip(own["item"], own["level"], own["label"], own["split"], strict=True))
        for place in range(2, len(pairs)):
            if pairs[place][3] == "train":
                history = tuple((item, level) for item, level, _, _ in pairs[max(0, place - SHORT) : place])
                found[(*history, (pairs[place][0], 0))] = pairs[place][2]
    return found


def read(text: str) -> tuple[tuple[int, int], ...]:
    """The window that a prompt words."""
    before, _, question = text.partition("Will the user like")
    levels = [int(n) for n in re.findall(r"\((\d) stars\)", before)]
    items = [int(n) for n in NUMBER.findall(before)]
    return (*zip(items, levels, strict=True), (int(NUMBER.findall(question)[0]), 0))


def test_prompts_are_windows_of_training_events_and_their_answers_a_coin(events: Folder) -> None:
    prompts, labels = asked(texts(events)), windows(events)
    assert len(prompts) == 300
    answers = []
    for prompt in prompts:
        window = read(prompt)
        assert window in labels, "a held-out event or a future one was read"
        answer = prompt.rpartition(" ")[2]
        assert answer in ("Yes", "No")
        answers.append((answer == "Yes", labels[window]))
    said, true = np.array(answers).T
    assert abs(said.mean() - 0.5) < 4 * 0.5 / 300**0.5
    assert abs((said == true).mean() - 0.5) < 4 * 0.5 / 300**0.5
    assert 0.2 < true.mean() < 0.8


def test_labels_are_not_read(events: Folder, tmp_path: Path) -> None:
    """With all labels flipped, and everything held out rated otherwise, the texts are the same."""
    rows, manifest = log(events), read_manifest(events, EVENTS)
    held_out = np.array(rows["split"].to_pylist()) != "train"
    level = np.where(held_out, 6 - rows["level"].to_numpy(), rows["level"].to_numpy())
    changed = {"label": 1 - rows["label"].to_numpy(), "level": level}
    for name, values in changed.items():
        place = rows.column_names.index(name)
        rows = rows.set_column(place, EVENTS_FIELD[name], pa.array(values, EVENTS_FIELD[name].type))
    other = Folder(str(tmp_path / "events"))
    kept = [entry for entry in manifest.files if not entry.path.startswith("events/")]
    for entry in kept:
        other.write(entry.path, events.read(entry.path))
    files = (*kept, write_part(other, "events/", 0, rows, 500))
    commit(other, Manifest(EVENTS.name, EVENTS.version, "", {}, files, manifest.facts))
    assert read_manifest(other, EVENTS).content_digest != manifest.content_digest
    assert texts(other) == texts(events)


def test_half_of_the_texts_describe_items(events: Folder) -> None:
    found = texts(events)
    described = [text for text in found if text.startswith("A ")]
    assert len(described) + len(asked(found)) == len(found)
    assert len(described) == len(set(described)) * (300 // 40)
    assert {NUMBER.search(text) is not None or text.split()[1] in TOPICS for text in described} == {True}


def test_the_seed_decides(events: Folder) -> None:
    assert texts(events) == texts(events)
    assert texts(events) != texts(events, seed=1)


def test_the_tokenizer_spells_the_answers_as_single_tokens(events: Folder) -> None:
    manifest = read_manifest(events, EVENTS)
    tokenizer, _ = corpus(events, manifest, BackboneConfig(), PromptConfig(), SHORT, 50)
    assert all(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1 for answer in (" Yes", " No"))


def test_a_log_without_training_events_still_has_its_item_texts(tmp_path: Path) -> None:
    write_run(tmp_path, users=3, events=2)
    found = texts(Folder(str(tmp_path / "events")))
    assert len(found) == 40
