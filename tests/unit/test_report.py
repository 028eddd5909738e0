import base64
import dataclasses
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from reclora_dist.contract.manifest import verified
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.metrics import Interval
from reclora_dist.evaluate.report import Difference, ModelResult, RankingResult, Report, SliceResult, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def model(name, mixtures=None, rows=300, **metrics):
    rng = np.random.default_rng(len(name))
    labels = rng.integers(0, 2, rows).astype(np.int8)
    scores = np.clip(0.4 * labels + 0.3 * rng.random(rows) + 0.1, 0, 1).round(2)
    found = {"auc": Interval(0.7, 0.65, 0.75), "logloss": Interval(0.6, 0.55, 0.66), **metrics}
    return ModelResult(name, found, labels, scores, 1234.5, mixtures)


def mixture(experts):
    return np.random.default_rng(0).dirichlet(np.ones(experts), (50, 4)).astype(np.float32)


@pytest.fixture
def report():
    return Report(
        title="A <demo> & more",
        models=[model("crm"), model("lora", mixture(1)), model("rec|lora", mixture(4))],
        differences=[Difference("rec|lora", "lora", "auc", Interval(0.02, 0.01, 0.03))],
        notes=["Only the long history <shows> it."],
        seconds={"events": 1.25, "crm": 2.0},
    )


class Page(HTMLParser):
    """Collects what a browser would show, and complains of tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_files_are_written_and_described(tmp_path, report):
    folder = Folder(str(tmp_path))
    entries = write_report(folder, report)
    names = {entry.path for entry in entries}
    assert names == {"report.md", "report.html", "auc.png", "roc.png", "calibration.png", "gates.png"}
    assert set(folder.files()) == names
    for entry in entries:
        content = verified(folder, entry)
        if entry.path.endswith(".png"):
            width, height = struct.unpack(">II", content[16:24])
            assert content.startswith(PNG)
            assert width > 500
            assert height > 200


def test_markdown_holds_every_figure(tmp_path, report):
    folder = Folder(str(tmp_path))
    write_report(folder, report)
    text = folder.read("report.md").decode()
    assert "| crm | 0.7000 [0.6500, 0.7500] | 0.6000 [0.5500, 0.6600] | 1,234 |" in text
    assert r"| rec\|lora − lora | AUC | +0.0200 [+0.0100, +0.0300] |" in text
    assert "| events | 1.2 |" in text
    assert "| total | 3.2 |" in text
    assert "* Only the long history <shows> it." in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert folder.exists(name)
    columns = [line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert columns == [5] * 5 + [4] * 3 + [3] * 5


def test_html_is_self_contained_and_escaped(tmp_path, report):
    folder = Folder(str(tmp_path))
    write_report(folder, report)
    page = Page()
    page.feed(folder.read("report.html").decode())
    assert page.open == []
    text = "".join(page.text)
    assert "A <demo> & more" in text
    assert "Only the long history <shows> it." in text
    assert len(page.sources) == 4
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)


def test_a_report_is_a_function_of_its_input(tmp_path, report):
    first, second = (write_report(Folder(str(tmp_path / name)), report) for name in "ab")
    assert first == second


def test_what_is_unknown_is_left_out(tmp_path):
    nan = float("nan")
    bare = ModelResult("crm", {"gauc": Interval(nan, nan, nan)}, *(model("x").labels, model("x").scores))
    folder = Folder(str(tmp_path))
    names = {entry.path for entry in write_report(folder, Report("Bare", [bare]))}
    assert names == {"report.md", "report.html", "roc.png", "calibration.png"}
    assert "| crm | – | – |" in folder.read("report.md").decode()


def test_more_models_than_colours_and_few_rows(tmp_path):
    models = [model(f"model {n}", mixture(2), rows=8) for n in range(9)]
    assert len(write_report(Folder(str(tmp_path)), Report("Many", models))) == 6


def test_slices_and_the_ranking_are_shown(tmp_path, report):
    auc, hits = {"auc": Interval(0.71, 0.6, 0.8)}, {"hit_ratio_at_1": Interval(0.25, 0.2, 0.3)}
    between = Difference("rec|lora", "lora", "auc", Interval(0.05, 0.01, 0.09))
    slices = [
        SliceResult("rare_items", 1234, 56, {"crm": auc, "lora": auc, "rec|lora": {}}, [between]),
        SliceResult("new_users", 3, 1, {"crm": {}, "lora": {}}),
    ]
    whole = [SliceResult("rare_items", 99_000, 236, {"crm": auc})]
    better = [Difference("rec|lora", "lora", "hit_ratio_at_1", Interval(0.1, 0.05, 0.15))]
    ranking = RankingResult(1000, 20, {"crm": hits}, better)
    folder = Folder(str(tmp_path))
    write_report(folder, dataclasses.replace(report, slices=slices, all_rows=whole, ranking=ranking))
    text = folder.read("report.md").decode()
    assert (
        "| rare items | 1,234 | 56 | crm | 0.7100 [0.6000, 0.8000] |\n"
        "|  |  |  | lora | 0.7100 [0.6000, 0.8000] |\n"
        "| new users | 3 | 1 | – | – |\n"
    ) in text
    assert r"| rare items | rec\|lora − lora | AUC | +0.0500 [+0.0100, +0.0900] |" in text
    assert "| rare items | 99,000 | 236 | crm |" in text.split("## Slices of all rows")[1]
    assert "## Next liked item among 20 (1,000 users)\n\n| Model | HR@1 |" in text
    assert r"| rec\|lora − lora | HR@1 | +0.1000 [+0.0500, +0.1500] |" in text
    assert folder.read("slices.png").startswith(PNG)
    page = Page()
    page.feed(folder.read("report.html").decode())
    assert "Slices: paired differences" in page.text
    assert "AUC by slice" in page.text


def test_slices_without_any_auc_are_not_drawn(tmp_path, report):
    folder = Folder(str(tmp_path))
    write_report(folder, dataclasses.replace(report, slices=[SliceResult("new_users", 3, 1, {"crm": {}})]))
    assert not folder.exists("slices.png")
    assert "| new users | 3 | 1 | – |" in folder.read("report.md").decode()


def test_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report 'Empty' has no model"):
        write_report(Folder(str(tmp_path)), Report("Empty", []))
    assert Folder(str(tmp_path)).files() == []
