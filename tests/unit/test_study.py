"""Studies: the grid, what counts as finished, what is reused, and the figures against hand-computed ones."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from reclora_dist.cli import study as command
from reclora_dist.cli.compose import CONFIGS, load
from reclora_dist.config.check import check_study
from reclora_dist.config.load import ConfigError, build, override
from reclora_dist.config.schema import Config, StudyConfig, SynthesiseConfig
from reclora_dist.config.targets import Target, backbone_target, crm_target
from reclora_dist.contract.manifest import Manifest, add_digested, add_file, commit, digest, read_manifest
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.schema import ADAPTER, BACKBONE, CRM, EVALUATION, EVENTS, RAW, SHARDS, predictions
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.metrics import Interval, paired_difference
from reclora_dist.ray_app import pipeline, reuse
from reclora_dist.ray_app.reuse import reuse_stages
from reclora_dist.ray_app.study import _error_line, startable
from reclora_dist.studies import grid, report, results

SHIPPED = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))


@functools.cache
def demo() -> Config:
    return load()


def compose(overrides: Sequence[str]) -> Config:
    """Settings on the demo's, faster than by Hydra."""
    return build(Config, override(dataclasses.asdict(demo()), overrides))


def grid_of(home: Path, *overrides: str, **study: object) -> list[grid.Run]:
    """Runs of a study on the demo, without its composition from a file."""
    base = compose([*overrides, f"paths.run={home}"])
    return grid.runs(dataclasses.replace(base, study=StudyConfig(**study)), overrides, compose)  # type: ignore[arg-type]


def test_points_are_every_combination_of_named_overrides_and_axes() -> None:
    axes = {"retrieval.long": ("20", "60"), "crm.dropout": ("0.1",)}
    found = grid.expand(StudyConfig(points={"a": ("x.y=1",), "b": ()}, axes=axes))
    assert [point.name for point in found] == [
        "a_long-20_dropout-0.1", "a_long-60_dropout-0.1", "b_long-20_dropout-0.1", "b_long-60_dropout-0.1",
    ]  # fmt: skip
    assert found[1].overrides == ("x.y=1", "retrieval.long=60", "crm.dropout=0.1")
    assert found[1].axes == {"retrieval.long": "60", "crm.dropout": "0.1"}


def test_a_study_without_points_is_one_point() -> None:
    assert grid.expand(StudyConfig()) == [grid.Point("all", (), {})]


def test_axes_that_end_alike_are_told_apart_and_folder_names_are_plain() -> None:
    found = grid.expand(
        StudyConfig(axes={"crm_train.lr": ("1e-3",), "lora_train.lr": ("1e-3",), "crm.dnn": ("[8,8]",)})
    )
    assert [point.name for point in found] == ["crm_train.lr-1e-3_lora_train.lr-1e-3_dnn-_8_8_"]


def test_two_points_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="points of one name: dnn-_8_; name them differently"):
        grid.expand(StudyConfig(axes={"crm.dnn": ("[8]", "(8)")}))


def test_runs_go_seed_by_seed_each_with_its_seed_and_folder(tmp_path: Path) -> None:
    found = grid_of(tmp_path, axes={"retrieval.long": ("20", "60")}, seeds=(3, 4), seeded=("shards", "crm_train"))
    assert [run.name for run in found] == ["long-20 seed 3", "long-60 seed 3", "long-20 seed 4", "long-60 seed 4"]
    run = found[1]
    assert run.config.paths.run == str(tmp_path / "long-60/seed-3")
    assert (run.config.retrieval.long, run.config.shards.seed, run.config.crm_train.seed) == (60, 3, 3)
    assert run.config.lora_train.seed == 0
    assert not run.config.serve.check


def test_no_log_is_generated_where_there_is_a_real_one(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, "synthesise=null", "events.source.path=ml-1m", seeds=(1,))
    assert run.config.synthesise is None
    assert not [argument for argument in run.arguments if argument.startswith("synthesise.")]


@pytest.mark.parametrize("axis", ["crm.embeding", "ray.worker"])
def test_an_unknown_key_fails_before_any_run_and_is_named(tmp_path: Path, axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"point '\w+-8': config {axis} = 8: no such key; did you mean"):
        grid_of(tmp_path, axes={axis: ("8",)})


def test_settings_that_do_not_fit_together_name_the_point(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"point 'long-5': retrieval.short 10 is above retrieval.long 5"):
        grid_of(tmp_path, axes={"retrieval.long": ("60", "5")})


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("reclora", "loora"), "model 'loora'; there are: crm, lora, other, reclora, running_averages, uniform"),
        (("crm@a", "crm@c"), "point 'c'; there are: a, b"),
        (("crm", "other@a"), "model 'other'"),
    ],
)
def test_a_comparison_with_what_is_not_there_is_refused(tmp_path: Path, pair: tuple[str, str], words: str) -> None:
    points = {"a": (), "b": ("adapters.other={experts: 1, gate: none}",)}
    with pytest.raises(ConfigError, match=words):
        grid_of(tmp_path, points=points, compare=(pair,))
    pairs = (("other@b", "reclora (shuffled)@a"), ("other", "lora"))
    grid_of(tmp_path, "evaluate.shuffled=true", points=points, compare=pairs)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"axes": {"crm.dropout": ()}}, "study.axes has no values for 'crm.dropout'"),
        ({"seeds": ()}, r"study.seeds are \[\]"),
        ({"seeds": (1, 1)}, r"study.seeds are \[1, 1\]"),
        ({"seeded": ("shard",)}, "study.seeded names 'shard'"),
        ({"seeded": ("serve",)}, "study.seeded names 'serve'"),
        ({"metrics": ()}, "study.commands or study.metrics is empty"),
        ({"parallel": 0}, "study.parallel 0 must be at least 1"),
    ],
)
def test_a_grid_that_cannot_work_is_refused(setting: dict[str, object], words: str) -> None:
    check_study(StudyConfig())
    with pytest.raises(ValueError, match=words):
        check_study(StudyConfig(**setting))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_composes_and_says_what_it_asks(name: str) -> None:
    overrides = [f"study={name}"]
    config = command.compose(overrides)
    check_study(config.study)
    assert config.study.question.endswith("?")
    assert Path(config.paths.run).parts[-3:] == ("runs", "studies", name)
    found = grid.runs(config, overrides, command.compose)
    assert len(found) == len(grid.expand(config.study)) * len(config.study.seeds)
    assert command.compose(found[-1].arguments) == found[-1].config, "what the pipeline composes is what was checked"


def test_the_digest_of_a_run_is_of_its_settings_alone(tmp_path: Path) -> None:
    (one,) = grid_of(tmp_path / "a", seeds=(1,))
    (moved,) = grid_of(tmp_path / "b", seeds=(1,), metrics=("auc",))
    (other,) = grid_of(tmp_path / "a", "crm.dropout=0.2", seeds=(1,))
    (shorter,) = grid_of(tmp_path / "a", "study.commands=[prepare,train]", seeds=(1,))
    assert one.config_digest == moved.config_digest
    assert len({run.config_digest for run in (one, other, shorter)}) == 3


def test_an_evaluation_that_the_commands_do_not_make_is_not_read(tmp_path: Path) -> None:
    """It is an earlier run's, with other settings perhaps."""
    (run,) = grid_of(tmp_path, "study.commands=[prepare,train]", seeds=(1,))
    write_evaluation(run.folder)
    assert list(results.rows_of(run)) == []
    run.finish(1.0)
    write_evaluation(run.folder, shift=0.01)
    assert run.is_finished


SCORES = {"a": [0.9, 0.8, 0.3, 0.4, 0.6, 0.2], "b": [0.5, 0.6, 0.7, 0.2, 0.3, 0.4]}
LABELS = np.array([1, 1, 0, 0, 1, 0], np.int8)
USERS = np.array([1, 1, 2, 2, 3, 3], np.int32)


def write_evaluation(run: Folder, first_sample: int = 0, shift: float = 0.0, labels: np.ndarray = LABELS) -> None:
    """An evaluation of the models a and b: AUC of a 0.9 + shift, of b 0.7; a slice, and the CRM on all rows."""
    folder, files = run.child("evaluation"), []
    for place, (model, scores) in enumerate(SCORES.items()):
        order = np.arange(6)[::-1] if place else np.arange(6)
        columns = [pa.array(order + first_sample), pa.array(USERS[order]), pa.array(labels[order])]
        table = pa.table([*columns, pa.array(np.array(scores)[order])], schema=predictions)
        files.append(write_part(folder, f"predictions/test/{model}/", 0, table, 100))
    interval = {"mean": 0.9 + shift, "low": 0.8, "high": 1.0}
    metrics = {
        "splits": {"test": {"a": {"auc": interval}, "b": {"auc": {"mean": 0.7, "low": 0.6, "high": 0.8}}}},
        "all_rows": {"test": {"crm": {"rows": 50, "auc": interval}}},
        "slices": {"test": {"new items": {"rows": 4, "users": 2, "a": {"auc": interval, "gauc": None}}}},
        "ranking": {"users": 3, "models": {"a": {"hr@1": interval}}},
        "differences": [{"split": "test", "better": "a", "than": "b", "metric": "auc", **interval}],
    }
    files.append(add_digested(folder, "metrics.json", json.dumps(metrics).encode()))
    commit(folder, Manifest(EVALUATION.name, EVALUATION.version, "sample", {}, tuple(files), {}))


def test_a_run_is_finished_until_its_settings_or_its_evaluation_change(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, seeds=(1,))
    (changed,) = grid_of(tmp_path, "crm.dropout=0.2", seeds=(1,))
    write_evaluation(run.folder)
    assert not run.is_finished, "what it has made is no sign: it may have been stopped after that"
    run.finish(12.0)
    assert run.is_finished
    assert not changed.is_finished
    assert read_manifest(run.folder.child("finished"), grid.STUDY_RUN).facts["seconds"] == 12.0
    write_evaluation(run.folder, shift=0.01)
    assert not run.is_finished


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_t_quantiles_cut_off_a_fortieth(freedom: int) -> None:
    quantile = results._T[freedom - 1]
    x = np.linspace(0, quantile, 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert inside == pytest.approx(0.475, abs=1e-5)


def test_the_interval_over_seeds_is_students() -> None:
    found = results.t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    single = results.t_interval([0.5])
    assert single.mean == 0.5
    assert math.isnan(single.low) and math.isnan(single.high)


def finished_runs(tmp_path: Path, points: int = 1) -> tuple[Config, list[grid.Run]]:
    """Runs of seeds 0 and 1 with evaluations; seed 1's model a is better by 0.02."""
    overrides = ["adapters.a={experts: 1, gate: none}", "adapters.b={experts: 1, gate: none}"]
    study = {"axes": {"retrieval.long": ("20", "60")[:points]}, "seeds": (0, 1), "compare": (("a", "b"),)}
    runs = grid_of(tmp_path, *overrides, **study, metrics=("auc",))  # type: ignore[arg-type]
    for run in runs:
        write_evaluation(run.folder, shift=0.02 * run.seed)
        run.finish(1.0)
    return dataclasses.replace(runs[0].config, study=StudyConfig(**study, metrics=("auc",))), runs  # type: ignore[arg-type]


def test_every_figure_is_a_row_whatever_it_is_of(tmp_path: Path) -> None:
    _, (run, _) = finished_runs(tmp_path)
    found = {(row.split, row.slice, row.model, row.metric): row for row in results.rows_of(run)}
    assert set(found) == {
        ("test", "", "a", "auc"), ("test", "", "b", "auc"), ("test", "all_rows", "crm", "auc"),
        ("test", "new items", "a", "auc"), ("test", "ranking/models", "a", "hr@1"),
    }  # fmt: skip
    assert found["test", "", "a", "auc"] == results.Row("long-20", 0, "test", "", "a", "auc", 0.9, 0.8, 1.0, 6)
    assert found["test", "all_rows", "crm", "auc"].n == 50
    assert found["test", "new items", "a", "auc"].n == 4
    assert found["test", "ranking/models", "a", "hr@1"].n == 3, "lists, of which each user has one"


def test_paces_are_samples_over_seconds_of_the_stage(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, "crm_train.batch_size=3", seeds=(0,))
    run.folder.child("training").write("crm.json", json.dumps({"steps": 4.0, "stage_seconds": 2.0}).encode())
    timings = {"seconds": {"crm": 2.0, "events": 5.0}, "samples_per_s": {"lora": 7.5}}
    run.folder.write("timings.json", json.dumps(timings).encode())
    found = {(row.split, row.model, row.metric): row.value for row in results.rows_of(run)}
    assert found == {
        ("training", "crm", "seconds"): 2.0,
        ("training", "crm", "samples_per_s"): 4 * 3 / 2.0,  # of the process whose seconds they are
        ("training", "events", "seconds"): 5.0,
        ("scoring", "lora", "samples_per_s"): 7.5,
    }


def test_models_on_the_same_rows_are_compared_row_by_row_in_whatever_order_they_lie(tmp_path: Path) -> None:
    config, runs = finished_runs(tmp_path)
    (found,) = results.compare(config, runs, [row for run in runs for row in results.rows_of(run)])
    a, b = (np.array(SCORES[model]) for model in "ab")
    expected = paired_difference(LABELS, a, b, USERS, config.evaluate, "auc")
    assert (found.name, found.point, found.metric) == ("a − b", "long-20", "auc")
    assert found.seeds == {0: expected, 1: expected}
    assert expected.mean == pytest.approx(1 - 5 / 9)


def test_models_on_other_rows_are_compared_over_seeds_only(tmp_path: Path) -> None:
    config, runs = finished_runs(tmp_path, points=2)
    for run in runs[1::2]:
        write_evaluation(run.folder, first_sample=100, shift=0.05 * run.seed)
    config = dataclasses.replace(config, study=dataclasses.replace(config.study, compare=(("a@long-20", "a@long-60"),)))
    (found,) = results.compare(config, runs, [row for run in runs for row in results.rows_of(run)])
    assert found.point == ""
    assert [interval.mean for interval in found.seeds.values()] == pytest.approx([0.0, 0.02 - 0.05])
    assert all(math.isnan(interval.low) for interval in found.seeds.values())
    spread = 12.7062 * (0.03 / 2**0.5) / 2**0.5
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx((-0.015 - spread, -0.015 + spread))


def test_a_side_without_a_point_stands_for_every_point(tmp_path: Path) -> None:
    config, runs = finished_runs(tmp_path, points=2)
    config = dataclasses.replace(config, study=dataclasses.replace(config.study, compare=(("a@long-20", "b"),)))
    found = results.compare(config, runs, [row for run in runs for row in results.rows_of(run)])
    assert [(difference.name, difference.point) for difference in found] == [
        ("a@long-20 − b", "long-20"), ("a@long-20 − b", "long-60"),
    ]  # fmt: skip
    assert all(list(difference.seeds) == [0, 1] for difference in found)


def test_the_same_rows_with_other_labels_are_other_rows(tmp_path: Path) -> None:
    """As between points with two thresholds of a like."""
    config, runs = finished_runs(tmp_path, points=2)
    for run in runs[1::2]:
        write_evaluation(run.folder, shift=-0.01, labels=1 - LABELS)
    config = dataclasses.replace(config, study=dataclasses.replace(config.study, compare=(("a@long-20", "a@long-60"),)))
    (found,) = results.compare(config, runs, [row for run in runs for row in results.rows_of(run)])
    assert all(math.isnan(interval.low) for interval in found.seeds.values())
    assert found.seeds[0].mean == pytest.approx(0.01)


def test_the_results_are_a_tidy_table_a_page_and_a_plot_per_axis(tmp_path: Path) -> None:
    config, runs = finished_runs(tmp_path / "study", points=2)
    broken = grid_of(tmp_path / "broken", seeds=(7,))[0]
    found = report.gather("length", config, [*runs, broken], {broken.name: "error: no room"})
    home = Folder(str(tmp_path / "study"))
    report.write_results(home, found)
    table = pq.read_table(tmp_path / "study/results.parquet")
    assert table.column_names == [
        "point", "seed", "split", "slice", "model", "metric", "value", "low", "high", "n", "retrieval.long",
    ]  # fmt: skip
    assert table.num_rows == 4 * 5
    assert set(zip(table["point"].to_pylist(), table["retrieval.long"].to_pylist(), strict=True)) == {
        ("long-20", "20"), ("long-60", "60"),
    }  # fmt: skip
    assert pyarrow.csv.read_csv(tmp_path / "study/results.csv").num_rows == table.num_rows
    assert len(home.read("differences.csv").splitlines()) == 1 + 4
    page = home.read("results.md").decode()
    assert "| long-20 | a | 0.9100 ± 0.0141 | 2 |" in page, "standard deviation of 0.90 and 0.92"
    assert "* all seed 7: error: no room" in page
    assert "| a − b | long-60 | auc | +0.4444 [" in page
    assert "![auc-retrieval-long](auc-retrieval-long.png)" in page
    assert home.read("auc-retrieval-long.png").startswith(b"\x89PNG")


def test_named_points_are_plotted_side_by_side(tmp_path: Path) -> None:
    config, runs = finished_runs(tmp_path)
    points = [dataclasses.replace(run.point, axes={}) for run in runs]
    study = dataclasses.replace(config.study, axes={})
    runs = [dataclasses.replace(run, point=point) for run, point in zip(runs, points, strict=True)]
    found = report.gather("t", dataclasses.replace(config, study=study), runs, {})
    assert set(report._figures(found)) == {"auc.png"}


def test_a_line_of_a_plot_is_a_model_with_everything_else_equal() -> None:
    points = grid.expand(StudyConfig(axes={"x.long": ("1", "2"), "x.short": ("3", "4")}))
    intervals = {(point.name, "a"): Interval(float(place), 0, 9) for place, point in enumerate(points)}
    lines = report._lines("x.long", intervals, {point.name: point for point in points})
    assert {name: {x: i.mean for x, i in line.items()} for name, line in lines.items()} == {
        "a x.short=3": {"1": 0, "2": 2},
        "a x.short=4": {"1": 1, "2": 3},
    }


def write_dataset(
    folder: Folder, form: object, config_digest: str, parents: dict[str, str], content: bytes
) -> Manifest:
    files = (add_file(folder, "part.bin", content),)
    return commit(folder, Manifest(form.name, form.version, config_digest, parents, files, {}))  # type: ignore[attr-defined]


def test_a_sibling_s_stages_are_linked_if_settings_and_parents_are_the_same(tmp_path: Path) -> None:
    one, same, other = (compose([f"paths.run={tmp_path / name}"]) for name in ("one", "same", "other"))
    other = dataclasses.replace(other, synthesise=SynthesiseConfig(users=7))
    run = Folder(one.paths.run)
    write_dataset(run.child("raw"), RAW, digest(one.synthesise), {}, b"raw")
    events = write_dataset(run.child("events"), EVENTS, "another configuration", {}, b"events")
    write_dataset(
        run.child("backbone"), BACKBONE, backbone_target(one).config_digest, {"events": events.content_digest}, b"b"
    )
    assert reuse_stages(same, [str(tmp_path / "absent"), one.paths.run]) == ["synthesise"]
    assert (tmp_path / "same/raw/part.bin").samefile(tmp_path / "one/raw/part.bin"), "no second copy"
    assert not (tmp_path / "same/events").exists()
    write_dataset(Folder(same.paths.run).child("events"), EVENTS, "another configuration", {}, b"events")
    assert reuse_stages(same, [one.paths.run]) == ["backbone"], "the same parent is there now, raw was there before"
    assert reuse_stages(other, [one.paths.run]) == []


def test_what_the_run_measured_of_a_stage_before_it_was_linked_is_forgotten(tmp_path: Path) -> None:
    one, two = (compose([f"paths.run={tmp_path / name}"]) for name in ("one", "two"))
    write_dataset(Folder(one.paths.run).child("raw"), RAW, digest(one.synthesise), {}, b"raw")
    home = Folder(two.paths.run)
    home.write("timings.json", json.dumps({"seconds": {"synthesise": 9.0, "events": 5.0}}).encode())
    assert reuse_stages(two, [one.paths.run]) == ["synthesise"]
    assert json.loads(home.read("timings.json"))["seconds"] == {"events": 5.0}


def test_a_linked_adapter_has_no_card_of_the_one_before_it(tmp_path: Path) -> None:
    donor, place = Folder(str(tmp_path / "donor")), Folder(str(tmp_path / "own"))
    write_dataset(donor, ADAPTER, "its settings", {}, b"weights")
    place.write("README.md", b"of another adapter")
    assert not reuse._link(donor, Target(place, ADAPTER, "settings that it had before", {}))
    assert reuse._link(donor, Target(place, ADAPTER, "its settings", {}))
    assert place.exists("part.bin") and not place.exists("README.md")


def test_a_run_forgets_what_it_measured_of_stages_and_models_that_are_gone(tmp_path: Path) -> None:
    config = compose([f"paths.run={tmp_path}"])
    state = {
        "seconds": {"crm": 1.0, "workers": 2.0, "adapter lora": 3.0, "adapter gone": 4.0},
        "samples_per_s": {"crm": 5.0, "gone": 6.0},
    }
    Folder(str(tmp_path)).write("timings.json", json.dumps(state).encode())
    found = pipeline._read_state(Folder(str(tmp_path)), config)
    assert found["seconds"] == {"crm": 1.0, "workers": 2.0, "adapter lora": 3.0}
    assert found["samples_per_s"] == {"crm": 5.0}


def test_a_crm_is_shared_by_runs_that_differ_in_their_text_samples(tmp_path: Path) -> None:
    few, many = (compose([f"paths.run={tmp_path / n}", f"shards.text_train={n}"]) for n in ("100", "200"))
    for config in (few, many):
        run = Folder(config.paths.run)
        write_dataset(run.child("events"), EVENTS, "of both", {}, b"events")
        place = run.child("shards")
        own = config.paths.run.encode()
        files = add_file(place, "crm/part.bin", b"all samples"), add_file(place, "text/part.bin", own)
        commit(place, Manifest(SHARDS.name, SHARDS.version, "its own", {}, files, {}))
    made = crm_target(few)
    write_dataset(made.folder, CRM, made.config_digest, dict(made.parents), b"crm")
    assert "crm" in reuse_stages(many, [few.paths.run])
    place = Folder(many.paths.run).child("shards")
    commit(place, Manifest(SHARDS.name, SHARDS.version, "", {}, (add_file(place, "crm/part.bin", b"others"),), {}))
    assert not crm_target(many).is_current


def test_a_linked_stage_that_is_made_anew_leaves_the_siblings_whole(tmp_path: Path) -> None:
    one, two = (compose([f"paths.run={tmp_path / name}"]) for name in ("one", "two"))
    write_dataset(Folder(one.paths.run).child("raw"), RAW, digest(one.synthesise), {}, b"first")
    reuse_stages(two, [one.paths.run])
    write_dataset(Folder(two.paths.run).child("raw"), RAW, "changed", {}, b"second")
    assert (tmp_path / "one/raw/part.bin").read_bytes() == b"first"


def test_runs_at_a_time_wait_for_the_first_of_all_and_the_first_of_their_seed(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, axes={"retrieval.long": ("20", "60", "90")}, seeds=(0, 1))
    a0, b0, c0, a1, b1, _ = runs
    assert startable(runs, runs, []) is a0
    assert startable(runs, runs[1:], [a0]) is None
    assert startable(runs, runs[1:], []) is a1, "the first of a seed comes before the others"
    assert startable(runs, [b0, c0, b1], [a1]) is b0
    assert startable(runs, [b1], [a1, c0]) is None
    assert startable(runs, [b1], [c0]) is b1
    assert startable(runs, [], [c0]) is None


def test_the_error_of_a_log_is_its_last_error_or_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("=== events\nerror: first\nerror: config is bad\nstudy: more\n\n")
    assert _error_line(log) == "error: config is bad"
    log.write_text("Traceback\nray.exceptions.RayTaskError(OSError): oops\nRay's logs of this run are in /tmp/x\n")
    assert _error_line(log) == "ray.exceptions.RayTaskError(OSError): oops"
    log.write_text("=== events\nKilled\n\n")
    assert _error_line(log) == "Killed"


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says as it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["crm.dropout=0.2"], ["study=few"]])
def test_without_a_study_all_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    text = said(monkeypatch, capsys, *arguments)
    for name in SHIPPED:
        assert f"study={name} " in text
        assert yaml.safe_load((CONFIGS / f"study/{name}.yaml").read_text())["study"]["question"] in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study=few_shot", "crm.embeding=8"], "error: config crm.embeding = 8: no such key; did you mean 'crm.embed"),
        (
            ["study=few_shot", "study.axes={crm.typo: [1]}"],
            "error: point 'text_train-0.01_typo-1': config crm.typo = 1",
        ),
        (["study=few_shot", "study=scaling"], "error: study= is given 2 times (few_shot, scaling): name one study"),
        (["study=few_shot", "data=nothing"], "error: In 'config': Could not find 'data/nothing'"),
        (["study=identity", "study.points={a: ['crm_train.lr=[1']}"], "error: point 'a': no viable alternative"),
    ],
)
def test_a_wrong_override_is_one_clear_message_and_starts_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert said(monkeypatch, capsys, *arguments, f"paths.run={tmp_path}").startswith(words)
    assert not list(tmp_path.iterdir())


def test_help_teaches_and_lists_the_studies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--help"])
    command.main()
    text = capsys.readouterr().out
    assert "python -m reclora_dist.cli.study study=NAME [overrides]" in text
    assert all(f"study={name} " in text for name in SHIPPED)
