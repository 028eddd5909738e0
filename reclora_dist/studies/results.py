"""What the runs of a study have measured, and how models and points differ."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import digested, read_manifest, verified
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVALUATION
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.metrics import METRICS, Interval, paired_difference
from reclora_dist.studies.grid import Run

NAN = float("nan")
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_NORMAL = 1.9600


@dataclass(frozen=True)
class Row:
    """One figure of one run: ``value`` with its 95 % interval (NaN: none), over ``n`` samples.

    ``slice`` names the rows that it is of; empty: the text samples of the split, which all models score.
    """

    point: str
    seed: int
    split: str
    slice: str
    model: str
    metric: str
    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0


@dataclass(frozen=True)
class Difference:
    """The paired difference of two models: seed to its interval over users (NaN where other rows were scored)."""

    name: str
    point: str
    metric: str
    seeds: Mapping[int, Interval]

    @property
    def over_seeds(self) -> Interval:
        """Mean of the seeds' differences and its 95 % t interval."""
        return t_interval([interval.mean for interval in self.seeds.values()])


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval of independent values by Student's t; one value has no interval (NaN).

    Beyond 31 values the normal quantile is taken, which is 0.08 short at most.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, NAN, NAN)
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else _NORMAL
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def rows_of(run: Run) -> Iterator[Row]:
    """All figures of a run: those of its evaluation, and pace and seconds of the stages that it did itself."""
    point, seed = run.point.name, run.seed
    evaluation = run.evaluation
    if evaluation:
        record = read_manifest(evaluation, EVALUATION)
        entry = digested(evaluation, record, "metrics.json")
        for path, leaf, n in _leaves(json.loads(verified(evaluation, entry)), (), 0):
            split, slice_, model, metric = _named(path)
            rows = n or record.rows(f"predictions/{split}/{model}/")
            yield Row(point, seed, split, slice_, model, metric, leaf["mean"], leaf["low"], leaf["high"], rows)
    yield from _paces(run)


def _leaves(node: object, path: tuple[str, ...], n: int) -> Iterator[tuple[tuple[str, ...], Mapping[str, float], int]]:
    """Every ``{mean, low, high}`` below a node, its path, and the ``rows`` (or ``users``) nearest above it."""
    if not isinstance(node, Mapping):
        return
    if {"mean", "low", "high"} <= node.keys():
        if node["mean"] is not None:
            yield path, {key: NAN if node[key] is None else float(node[key]) for key in ("mean", "low", "high")}, n
        return
    rows = node.get("rows", node.get("users", n))  # of a ranking, lists: one per user
    for key, child in node.items():
        yield from _leaves(child, (*path, key), rows if isinstance(rows, int) else n)


def _named(path: Sequence[str]) -> tuple[str, str, str, str]:
    """Split, slice, model and metric of a figure at ``path``: the last two are model and metric, one is the split."""
    *places, model, metric = path
    split = next((place for place in places if place in ("train", "validation", "test")), "test")
    return split, "/".join(p for p in places if p not in (split, "splits", "slices")), model, metric


def _paces(run: Run) -> Iterator[Row]:
    """``seconds`` of stages; ``samples_per_s`` of training (the whole stage) and of one scorer."""
    if not run.folder.exists("timings.json"):
        return
    timings = json.loads(run.folder.read("timings.json"))
    samples = _training_samples(run)
    for stage, seconds in timings.get("seconds", {}).items():
        yield Row(run.point.name, run.seed, "training", "", stage, "seconds", seconds)
        n = samples.get(stage, 0)
        if n and seconds:
            yield Row(run.point.name, run.seed, "training", "", stage, "samples_per_s", n / seconds, n=n)
    for model, rate in timings.get("samples_per_s", {}).items():
        yield Row(run.point.name, run.seed, "scoring", "", model, "samples_per_s", rate)


def _training_samples(run: Run) -> dict[str, int]:
    """Samples that a training stage went through in the time that ``timings.json`` says, by the stage's name.

    After a restart that is the last process's time; what others had done before it is not counted.
    """
    home = run.folder.child("training")
    stages = {"crm": "crm", **{name: f"adapter {name}" for name in run.config.adapters}}
    return {
        stage: round(json.loads(home.read(f"{name}.json"))["steps"] * run.config.training(name).batch_size)
        for name, stage in stages.items()
        if home.exists(f"{name}.json")
    }


def compare(config: Config, runs: Sequence[Run], rows: Sequence[Row]) -> list[Difference]:
    """Paired differences of ``study.compare``, on the split and by the metrics that the study shows.

    A side that names no point stands for every point.
    """
    study = config.study
    values = {(r.point, r.seed, r.model, r.metric): r.value for r in rows if (r.split, r.slice) == (study.split, "")}
    names = list(dict.fromkeys(run.point.name for run in runs))
    found = []
    for better, than in study.compare:
        for point in [""] if "@" in better and "@" in than else names:
            sides = [_side(side, point) for side in (better, than)]
            for metric in study.metrics:
                seeds = _by_seed(config, runs, values, sides, metric)
                if seeds:
                    found.append(Difference(f"{better} − {than}", point, metric, seeds))
    return found


def _side(side: str, point: str) -> tuple[str, str]:
    """Model and point of one side of a comparison."""
    model, _, named = side.partition("@")
    return model, named or point


def _by_seed(
    config: Config,
    runs: Sequence[Run],
    values: Mapping[tuple[str, int, str, str], float],
    sides: Sequence[tuple[str, str]],
    metric: str,
) -> dict[int, Interval]:
    folders = {(run.point.name, run.seed): run.folder for run in runs}
    found = {}
    for seed in config.study.seeds:
        keys = [(point, seed, model, metric) for model, point in sides]
        if not all(key in values for key in keys):
            continue
        found[seed] = Interval(values[keys[0]] - values[keys[1]], NAN, NAN)
        if metric in METRICS:
            a, b = (_predictions(folders[point, seed], config.study.split, model) for model, point in sides)
            if all(a[column].equals(b[column]) for column in ("sample_id", "user", "label")):
                labels, users = a["label"].to_numpy(), a["user"].to_numpy()
                scores = a["score"].to_numpy(), b["score"].to_numpy()
                found[seed] = paired_difference(labels, *scores, users, config.evaluate, metric)
    return found


def _predictions(run: Folder, split: str, model: str) -> pa.Table:
    """Rows of ``contract.schema.predictions`` in order of ``sample_id``."""
    evaluation = run.child("evaluation")
    entries = read_manifest(evaluation, EVALUATION).select(f"predictions/{split}/{model}/")
    return read_parts(evaluation, entries).sort_by("sample_id")
