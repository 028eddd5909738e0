"""The evaluation stage: every model scores the same rows, in Ray tasks; metrics, differences, predictions."""

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
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from reclora_dist.config.check import shuffled_names
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import evaluation_target
from reclora_dist.contract.arrays import read_array
from reclora_dist.contract.manifest import FileEntry, add_digested, digested, verified
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import CRM, EVALUATION, EVENTS, SHARDS, STATISTICS, VECTORS, candidates, predictions
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import Crm, load_crm
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch, matrix
from reclora_dist.data.features import FeatureStore
from reclora_dist.evaluate.baselines import running_averages
from reclora_dist.evaluate.metrics import METRICS, binary_metrics, mean_interval, paired_difference
from reclora_dist.evaluate.ranking import CANDIDATES, RANKING_METRICS, candidate_rows, draw_candidates, ranking_values
from reclora_dist.evaluate.report import Difference, ModelResult, RankingResult, SliceResult
from reclora_dist.evaluate.scorer import Scorer, crm_probability, shuffled
from reclora_dist.evaluate.slices import (
    Rows,
    Training,
    as_json,
    from_json,
    slice_differences,
    slice_metrics,
    slices,
)
from reclora_dist.ray_app.session import reserved_device
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import Meters

SPLITS = ("validation", "test")
RANKING = "ranking"
RESULTS = "metrics.json"
UNDEFINED: Mapping[str, float | None] = dict.fromkeys(("mean", "low", "high"))
"""What stands in the results for a difference without a value."""
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
    results |= {"slices": {}, "slices_of_all_rows": {}, "slice_differences": []}
    rates: dict[str, float] = {}
    training = read_training(config)
    if config.evaluate.ranking_users:
        results[RANKING], written = _rank(config, target.folder, training.like_rate)
        files += written
    for split in SPLITS:
        rows = split_rows(config, split)
        scored = _score(config, rows, split, training.like_rate)
        files += [_write_predictions(target.folder, split, model, rows, s) for model, s in scored.items()]
        scores = {model: s.scores for model, s in scored.items()}
        results["splits"][split] = _metrics(config, rows, scores, split, meters)
        results["differences"] += list(_differences(config, rows, scored, split))
        results["slices"][split], between = _slices(config, rows, scores, training)
        results["slice_differences"] += [{"split": split, **difference} for difference in between]
        whole, results["slices_of_all_rows"][split] = _crm_on_all_rows(config, split, training)
        results["all_rows"][split] = {"crm": whole}
        mixtures = {model: s.mixtures for model, s in scored.items() if s.mixtures is not None}
        files += [_write_mixtures(target.folder, split, model, found) for model, found in mixtures.items()]
        rates = {model: s.samples_per_second for model, s in scored.items()}
    files.append(add_digested(target.folder, RESULTS, json.dumps(results, indent=1, allow_nan=False).encode()))
    target.commit(files)
    return rates


def split_rows(config: Config, split: str) -> pa.Table:
    """The text rows of a split: what every model is compared on."""
    shards = manifest(config, "shards", SHARDS)
    return read_parts(folder(config, "shards"), shards.select(f"text/split={split}/"), [*TEXT_COLUMNS, "time"])


def _score(config: Config, rows: pa.Table, split: str, like_rate: float) -> dict[str, Scored]:
    """Scores of all models, the adapters' in Ray tasks."""
    workers = max(1, config.ray.workers)
    cuts = np.linspace(0, rows.num_rows, workers + 1).astype(int)
    shared = [ray.put(rows.slice(a, b - a)) for a, b in itertools.pairwise(cuts)]
    # Not by options(): named here, GPUs make Ray end the process with the task, which else would keep their memory.
    # Without GPUs it stays for the next task, and what it has imported.
    task = ray.remote(num_cpus=config.ray.cpus_per_worker, num_gpus=config.ray.gpus_per_worker)(_score_adapter)
    pending = {
        name: [
            task.remote(folder(config, f"adapters/{name}").uri, part, config.ray.threads, config.evaluate.batch_size)
            for part in shared
        ]
        for name in config.adapters
    }
    if controls := shuffled_names(config):
        others = shuffled(rows, config.evaluate.seed)
        donors = [ray.put(others.slice(a, b - a)) for a, b in itertools.pairwise(cuts)]
        for name, control in controls.items():
            uri, threads, size = folder(config, f"adapters/{name}").uri, config.ray.threads, config.evaluate.batch_size
            pairs = zip(shared, donors, strict=True)
            pending[control] = [task.remote(uri, part, threads, size, donor) for part, donor in pairs]
    adapters = {}
    for name, references in pending.items():
        adapters[name] = _joined(ray.get(references))
        print(f"evaluation: {name} scored {rows.num_rows:,} {split} rows", flush=True)
    # these two in the end: beside the tasks of the others their rates would say little
    return {"running_averages": _baseline(config, rows, like_rate), "crm": _crm(_load_crm(config), rows), **adapters}


def _score_adapter(
    adapter: str, rows: pa.Table, threads: int, batch_size: int, donors: pa.Table | None = None
) -> Scored:
    scorer = Scorer.load(Folder(adapter), threads, batch_size, reserved_device())
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


def _baseline(config: Config, rows: pa.Table, like_rate: float) -> Scored:
    facts = manifest(config, "shards", SHARDS).facts
    likes = np.array([0, *facts["level_likes"]], np.float64)
    started = time.perf_counter()
    scores = running_averages(rows, read_vectors(config), likes, like_rate)
    return Scored(scores, rows.num_rows / (time.perf_counter() - started))


def read_vectors(config: Config) -> npt.NDArray[np.float32]:
    """The run's item vectors, float32 [items + 1, dimension]."""
    vectors: npt.NDArray[np.float32] = read_array(
        folder(config, "vectors"), manifest(config, "vectors", VECTORS), "vectors"
    )
    return vectors


def _load_crm(config: Config) -> Crm:
    items = manifest(config, "events", EVENTS).select("items/")
    fields = read_parts(folder(config, "events"), items, ("item", "fields"))
    return load_crm(folder(config, "crm"), manifest(config, "crm", CRM), fields)


@torch.inference_mode()
def _crm(model: Crm, rows: pa.Table) -> Scored:
    started = time.perf_counter()
    parts = [
        crm_probability(model, crm_batch(rows.slice(start, 4096))).numpy() for start in range(0, rows.num_rows, 4096)
    ]
    return Scored(np.concatenate(parts), rows.num_rows / (time.perf_counter() - started))


def _crm_on_all_rows(config: Config, split: str, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """The CRM's metrics on the whole split, of which the text rows are a sample, and on its slices."""
    model, source, kept, scores = _load_crm(config), folder(config, "shards"), [], []
    for entry in manifest(config, "shards", SHARDS).select(f"crm/split={split}/"):  # a file is what memory must hold
        part = read_parts(source, [entry], CRM_COLUMNS)
        scores.append(_crm(model, part).scores)
        kept.append(part.select(("label", "user", "item", "statistics")))
    rows, found = pa.concat_tables(kept), {"crm": np.concatenate(scores)}
    metrics = binary_metrics(_labels(rows), found["crm"], _users(rows), config.evaluate)
    parts, _ = _slices(config, rows, found, training)
    return {"rows": rows.num_rows, **{key: as_json(value) for key, value in metrics.items()}}, parts


def read_training(config: Config) -> Training:
    """What training knew, from the item table and the users of the CRM's training rows."""
    events, shards = manifest(config, "events", EVENTS), manifest(config, "shards", SHARDS)
    items = read_parts(folder(config, "events"), events.select("items/"), ["item", "train_events"])
    item_events = np.zeros(events.facts["items"] + 1, np.int64)
    item_events[items["item"].to_numpy()] = items["train_events"].to_numpy()
    users, likes = np.zeros(events.facts["users"] + 1, np.bool_), 0
    for entry in shards.select("crm/split=train/"):
        # two columns of many: only their bytes are fetched, so no digest of the file; whoever trained has checked it
        with folder(config, "shards").open(entry.path) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=["user", "label"]):
                users[batch["user"].to_numpy()] = True
                likes += int(batch["label"].to_numpy().sum(dtype=np.int64))
    return Training(item_events, users, likes / max(1, shards.rows("crm/split=train/")))


def _slices(
    config: Config, rows: pa.Table, scores: Mapping[str, Scores], training: Training
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of every slice, and the differences of compared models that are among ``scores``."""
    history = matrix(rows, "statistics", np.float32)[:, STATISTICS.index("user_events")]
    known = Rows(_labels(rows), _users(rows), rows["item"].to_numpy(), history)
    masks = slices(known, training, config.evaluate)
    pairs = [pair for pair in config.compare if scores.keys() >= set(pair)]
    between = slice_differences(known, scores, masks, pairs, config.evaluate)
    return slice_metrics(known, scores, masks, config.evaluate), list(between)


def _rank(config: Config, target: Folder, like_rate: float) -> tuple[dict[str, Any], list[FileEntry]]:
    """Draw lists of candidates, write them, score them with every model; metrics, and the files."""
    task = _draw.options(num_cpus=config.ray.cpus_per_worker)
    drawn, rows = ray.get(task.remote(config))
    scored = _score(config, rows, RANKING, like_rate)
    files = [write_part(target, "candidates/", 0, drawn, 100_000)]
    files += [_write_predictions(target, RANKING, model, rows, s) for model, s in scored.items()]
    values = {model: ranking_values(s.scores, _labels(rows)) for model, s in scored.items()}
    models = {
        model: {metric: as_json(mean_interval(found[metric], config.evaluate)) for metric in RANKING_METRICS}
        for model, found in values.items()
    }
    between = [
        {"better": better, "than": than, "metric": metric, **(as_json(interval) or UNDEFINED)}
        for better, than in config.compare
        for metric in RANKING_METRICS
        for interval in [mean_interval(values[better][metric] - values[than][metric], config.evaluate)]
    ]
    users = drawn.num_rows // CANDIDATES
    return {"users": users, "candidates": CANDIDATES, "models": models, "differences": between}, files


@ray.remote
def _draw(config: Config) -> tuple[pa.Table, pa.Table]:
    """Candidates of test samples, and their rows; a task, because the whole log lies in its memory."""
    shards = manifest(config, "shards", SHARDS)
    columns = [name for name in candidates.names if name != "label"]
    rows = read_parts(folder(config, "shards"), shards.select("crm/split=test/"), [*columns, "label"])
    store = FeatureStore.load(folder(config, "events"), folder(config, "vectors"))
    drawn = draw_candidates(store, rows.filter(pc.field("label") == 1), config.evaluate)
    return drawn, candidate_rows(store, drawn, config.retrieval)


def _metrics(
    config: Config, rows: pa.Table, scores: Mapping[str, Scores], split: str, meters: Meters
) -> dict[str, Any]:
    result = {}
    for model, values in scores.items():
        try:
            metrics = binary_metrics(_labels(rows), values, _users(rows), config.evaluate)
        except ValueError as error:
            raise ValueError(f"{model} on the {split} split: {error}") from error
        result[model] = {key: as_json(value) for key, value in metrics.items()}
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
            yield {**pair, **(as_json(interval) or UNDEFINED)}


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
    return add_digested(target, f"mixtures/{split}/{model}/part.npy", buffer.getvalue())


def results(config: Config, split: str, rates: Mapping[str, float]) -> tuple[list[ModelResult], list[Difference]]:
    """What a report shows of a split, read back from ``evaluation/``."""
    source, record = folder(config, "evaluation"), manifest(config, "evaluation", EVALUATION)
    found = _found(config)
    models = []
    for model, metrics in found["splits"][split].items():
        table = read_parts(source, record.select(f"predictions/{split}/{model}/"))
        mixtures = record.select(f"mixtures/{split}/{model}/")
        loaded = np.load(io.BytesIO(verified(source, mixtures[0])), allow_pickle=False) if mixtures else None
        intervals = {key: from_json(value or UNDEFINED) for key, value in metrics.items()}
        scores = table["score"].to_numpy()
        models.append(ModelResult(model, intervals, _labels(table), scores, rates.get(model), loaded))
    return models, _read_differences(found["differences"], split=split)


def slice_results(config: Config, split: str) -> tuple[list[SliceResult], list[SliceResult]]:
    """The slices of a split, and those of all its rows, read back from ``evaluation/``."""
    found = _found(config)
    text = [
        _read_slice(name, models, _read_differences(found["slice_differences"], split=split, slice=name))
        for name, models in found["slices"][split].items()
    ]
    return text, [_read_slice(name, models) for name, models in found["slices_of_all_rows"][split].items()]


def ranking_result(config: Config) -> RankingResult | None:
    """The ranking, read back from ``evaluation/``; None where it was off."""
    found = _found(config).get(RANKING)
    if found is None:
        return None
    models = {m: {key: from_json(value) for key, value in values.items()} for m, values in found["models"].items()}
    return RankingResult(found["users"], found["candidates"], models, _read_differences(found["differences"]))


def _found(config: Config) -> dict[str, Any]:
    record = manifest(config, "evaluation", EVALUATION)
    source = folder(config, "evaluation")
    found: dict[str, Any] = json.loads(verified(source, digested(source, record, RESULTS)))
    return found


def _read_slice(name: str, models: Mapping[str, Any], differences: Sequence[Difference] = ()) -> SliceResult:
    defined = {
        model: {metric: from_json(values[metric]) for metric in METRICS if values[metric]}
        for model, values in models.items()
    }
    counts = next(iter(models.values()))
    return SliceResult(name, counts["rows"], counts["users"], defined, differences)


def _read_differences(found: Sequence[Mapping[str, Any]], **where: str) -> list[Difference]:
    """The differences whose keys have the values of ``where``."""
    return [
        Difference(d["better"], d["than"], d["metric"], from_json(d))
        for d in found
        if all(d[key] == value for key, value in where.items())
    ]
