"""The evaluation stage: every model scores the same rows, in Ray tasks; metrics, differences, predictions."""

import dataclasses
import io
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from reclora_dist.config.check import shuffled_names
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import evaluation_target
from reclora_dist.contract.arrays import read_array
from reclora_dist.contract.manifest import FileEntry, add_file, verified
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import CRM, EVALUATION, EVENTS, SHARDS, VECTORS, predictions
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import load_crm
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.evaluate.baselines import running_averages
from reclora_dist.evaluate.metrics import Interval, binary_metrics, paired_difference
from reclora_dist.evaluate.report import Difference, ModelResult
from reclora_dist.evaluate.scorer import Scorer, crm_probability, shuffled
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import Meters

SPLITS = ("validation", "test")
RESULTS = "metrics.json"
MIXTURE_ROWS = 512

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A model's scores on a split, the pace of one worker, and some gate mixtures (None without a gate)."""

    scores: Scores
    samples_per_second: float
    mixtures: npt.NDArray[np.float32] | None = None


def evaluate_run(config: Config, meters: Meters) -> dict[str, float]:
    """Score validation and test, write ``evaluation/`` (predictions and ``metrics.json``); no choice is made here.

    Returns:
        Samples per second of each model on one worker.
    """
    target = evaluation_target(config)
    files: list[FileEntry] = []
    results: dict[str, Any] = {"splits": {}, "all_rows": {}, "differences": []}
    rates: dict[str, float] = {}
    for split in SPLITS:
        rows = split_rows(config, split)
        scored = _score(config, rows, split)
        files += [_write_predictions(target.folder, split, model, rows, s) for model, s in scored.items()]
        results["splits"][split] = _metrics(
            config, rows, {model: s.scores for model, s in scored.items()}, split, meters
        )
        results["differences"] += list(_differences(config, rows, scored, split))
        results["all_rows"][split] = {"crm": _crm_on_all_rows(config, split)}
        mixtures = {model: s.mixtures for model, s in scored.items() if s.mixtures is not None}
        files += [_write_mixtures(target.folder, split, model, found) for model, found in mixtures.items()]
        rates = {model: s.samples_per_second for model, s in scored.items()}
    files.append(add_file(target.folder, RESULTS, json.dumps(results, indent=1).encode()))
    target.commit(files)
    return rates


def split_rows(config: Config, split: str) -> pa.Table:
    """The text rows of a split: what every model is compared on."""
    shards = manifest(config, "shards", SHARDS)
    return read_parts(folder(config, "shards"), shards.select(f"text/split={split}/"), [*TEXT_COLUMNS, "time"])


def _score(config: Config, rows: pa.Table, split: str) -> dict[str, Scored]:
    """Scores of all models, the adapters' in Ray tasks."""
    workers = max(1, config.ray.workers)
    cuts = np.linspace(0, rows.num_rows, workers + 1).astype(int)
    shared = [ray.put(rows.slice(a, b - a)) for a, b in itertools.pairwise(cuts)]
    others = shuffled(rows, config.evaluate.seed)
    donors = [ray.put(others.slice(a, b - a)) for a, b in itertools.pairwise(cuts)]
    task = _score_adapter.options(num_cpus=config.ray.cpus_per_worker, num_gpus=config.ray.gpus_per_worker)
    pending = {
        name: [
            task.remote(folder(config, f"adapters/{name}").uri, part, config.ray.threads, config.evaluate.batch_size)
            for part in shared
        ]
        for name in config.adapters
    }
    for name, control in shuffled_names(config).items():
        uri, threads, size = folder(config, f"adapters/{name}").uri, config.ray.threads, config.evaluate.batch_size
        pairs = zip(shared, donors, strict=True)
        pending[control] = [task.remote(uri, part, threads, size, donor) for part, donor in pairs]
    adapters = {}
    for name, references in pending.items():
        adapters[name] = _joined(ray.get(references))
        print(f"evaluation: {name} scored {rows.num_rows:,} {split} rows", flush=True)
    # these two in the end: beside the tasks of the others their rates would say little
    return {"running_averages": _baseline(config, rows), "crm": _crm(config, rows), **adapters}


@ray.remote
def _score_adapter(
    adapter: str, rows: pa.Table, threads: int, batch_size: int, donors: pa.Table | None = None
) -> Scored:
    scorer = Scorer.load(Folder(adapter), threads, batch_size)
    started = time.perf_counter()
    scores = scorer.score(rows, donors)
    rate = rows.num_rows / (time.perf_counter() - started)
    shown = donors is None and scorer.config.lora.weighs
    mixtures = scorer.mixtures(rows.slice(0, MIXTURE_ROWS)) if shown else None
    return Scored(scores, rate, mixtures)


def _joined(parts: Sequence[Scored]) -> Scored:
    mixtures = [part.mixtures for part in parts if part.mixtures is not None]
    rate = float(np.mean([part.samples_per_second for part in parts]))
    return Scored(np.concatenate([part.scores for part in parts]), rate, np.concatenate(mixtures) if mixtures else None)


def _baseline(config: Config, rows: pa.Table) -> Scored:
    facts = manifest(config, "shards", SHARDS).facts
    likes = np.array([0, *facts["level_likes"]], np.float64)
    started = time.perf_counter()
    scores = running_averages(rows, read_vectors(config), likes)
    return Scored(scores, rows.num_rows / (time.perf_counter() - started))


def read_vectors(config: Config) -> npt.NDArray[np.float32]:
    """The run's item vectors, float32 [items + 1, dimension]."""
    vectors: npt.NDArray[np.float32] = read_array(
        folder(config, "vectors"), manifest(config, "vectors", VECTORS), "vectors"
    )
    return vectors


@torch.inference_mode()
def _crm(config: Config, rows: pa.Table) -> Scored:
    items = manifest(config, "events", EVENTS).select("items/")
    fields = read_parts(folder(config, "events"), items, ("item", "fields"))
    model = load_crm(folder(config, "crm"), manifest(config, "crm", CRM), fields)
    started = time.perf_counter()
    parts = [
        crm_probability(model, crm_batch(rows.slice(start, 4096))).numpy() for start in range(0, rows.num_rows, 4096)
    ]
    return Scored(np.concatenate(parts), rows.num_rows / (time.perf_counter() - started))


def _crm_on_all_rows(config: Config, split: str) -> dict[str, Any]:
    """The CRM's metrics on the whole split, of which the text rows are a sample."""
    shards = manifest(config, "shards", SHARDS)
    rows = read_parts(folder(config, "shards"), shards.select(f"crm/split={split}/"), CRM_COLUMNS)
    metrics = binary_metrics(_labels(rows), _crm(config, rows).scores, _users(rows), config.evaluate)
    return {"rows": rows.num_rows, **{key: dataclasses.asdict(value) for key, value in metrics.items()}}


def _metrics(
    config: Config, rows: pa.Table, scores: Mapping[str, Scores], split: str, meters: Meters
) -> dict[str, Any]:
    result = {}
    for model, values in scores.items():
        metrics = binary_metrics(_labels(rows), values, _users(rows), config.evaluate)
        result[model] = {key: dataclasses.asdict(value) for key, value in metrics.items()}
        meters.add(names.EVALUATION_SAMPLES, len(values), model=model, split=split)
        for key, value in metrics.items():
            meters.set(names.EVALUATION_METRIC, value.mean, model=model, split=split, metric=key)
    return result


def _differences(config: Config, rows: pa.Table, scored: Mapping[str, Scored], split: str) -> Iterator[dict[str, Any]]:
    for better, than in config.compare:
        for metric in ("auc", "logloss"):
            interval = paired_difference(
                _labels(rows), scored[better].scores, scored[than].scores, _users(rows), config.evaluate, metric
            )
            pair = {"split": split, "better": better, "than": than, "metric": metric}
            yield {**pair, **dataclasses.asdict(interval)}


def _labels(rows: pa.Table) -> npt.NDArray[np.int8]:
    labels: npt.NDArray[np.int8] = rows["label"].to_numpy()
    return labels


def _users(rows: pa.Table) -> npt.NDArray[np.int32]:
    users: npt.NDArray[np.int32] = rows["user"].to_numpy()
    return users


def _write_predictions(target: Folder, split: str, model: str, rows: pa.Table, scored: Scored) -> FileEntry:
    columns = [rows["sample_id"], rows["user"], rows["label"], pa.array(scored.scores)]
    table = pa.table(columns, schema=predictions)
    return write_part(target, f"predictions/{split}/{model}/", 0, table, 100_000)


def _write_mixtures(target: Folder, split: str, model: str, mixtures: npt.NDArray[np.float32]) -> FileEntry:
    buffer = io.BytesIO()
    np.save(buffer, mixtures, allow_pickle=False)
    return add_file(target, f"mixtures/{split}/{model}.npy", buffer.getvalue())


def results(config: Config, split: str, rates: Mapping[str, float]) -> tuple[list[ModelResult], list[Difference]]:
    """What a report shows of a split, read back from ``evaluation/``."""
    source, record = folder(config, "evaluation"), manifest(config, "evaluation", EVALUATION)
    read = {entry.path: entry for entry in record.files}
    found = json.loads(verified(source, read[RESULTS]))
    models = []
    for model, metrics in found["splits"][split].items():
        table = read_parts(source, record.select(f"predictions/{split}/{model}/"))
        mixtures = read.get(f"mixtures/{split}/{model}.npy")
        loaded = None if mixtures is None else np.load(io.BytesIO(verified(source, mixtures)), allow_pickle=False)
        intervals = {key: Interval(**value) for key, value in metrics.items()}
        scores = table["score"].to_numpy()
        models.append(ModelResult(model, intervals, _labels(table), scores, rates.get(model), loaded))
    differences = [
        Difference(d["better"], d["than"], d["metric"], Interval(d["mean"], d["low"], d["high"]))
        for d in found["differences"]
        if d["split"] == split
    ]
    return models, differences
