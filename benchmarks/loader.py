"""How fast training gets its batches, against the floor of the file format and against the rate at which they are used.

    make bench NAME=loader            one JSON object last

Shards of the demo's log with more users are made first (by the pipeline, skipped if they are there). Then, in turns,
in one process: rows per second of plain pyarrow reading the same columns of the same row groups in the same order (the
floor), of ready CRM batches by both readers, of the same batches out of `ray.data`, of ready text batches; and the
samples per second that a training step of the demo's RecLoRA takes, forward and backward, on one thread.

`crm_vs_pyarrow`: CRM batches over the floor, goal 0.8. `text_vs_consumer`: text batches over what the model takes on
two cores (twice the one thread), goal 20. `petastorm_vs_arrow`: the readers' rates. That the readers' batches are equal
is checked first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from reclora_dist.cli.compose import load
from reclora_dist.config.run import backbone_path, folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.contract.schema import CRM, SHARDS
from reclora_dist.crm.build import load_crm
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.data.plan import EpochPlan, row_groups
from reclora_dist.evaluate.scorer import text_collator
from reclora_dist.train import stages
from reclora_dist.train.context import Context
from reclora_dist.train.data import Data
from reclora_dist.train.engine import TorchEngine, build_optimiser

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10_000, help="users of the log; 55 samples each")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured, in turns")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/loader", help="the run; it stays there")
    arguments = parser.parse_args()
    overrides = [f"paths.run={arguments.folder.resolve()}", f"synthesise.users={arguments.users}", "adapters=reclora"]
    overrides += ["shards.text_train=20000", "crm_train.batch_size=4096", "lora_train.batch_size=128"]
    for command in ("prepare", "train"):
        more = [] if command == "prepare" else ["~adapters.reclora"]
        subprocess.run([sys.executable, "-m", f"reclora_dist.cli.{command}", *overrides, *more], check=True, cwd=ROOT)
    torch.set_num_threads(1)
    config = load(overrides)
    check_equal(config)
    ways: dict[str, Callable[[], float]] = {
        "pyarrow": lambda: floor(config),
        "crm": lambda: rate(crm_data(config, "arrow").batches(0, 0)),
        "crm_petastorm": lambda: rate(crm_data(config, "petastorm").batches(0, 0)),
        "crm_ray_data": ray_data(config),
        "text": lambda: rate(text_data(config).batches(0, 0)),
        "consumer": consumer(config),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name, way in ways.items():
            found[name].append(way())
            print(f"round {number + 1}: {name} {found[name][-1]:,.0f} rows/s", flush=True)
    rates = {name: round(statistics.median(values)) for name, values in found.items()}
    ratios = {
        "crm_vs_pyarrow": ("crm", "pyarrow", 1),
        "crm_vs_ray_data": ("crm", "crm_ray_data", 1),
        "petastorm_vs_arrow": ("crm_petastorm", "crm", 1),
        "text_vs_consumer": ("text", "consumer", 2),
    }
    result = {}
    for name, (ours, theirs, threads) in ratios.items():
        turns = [a / (threads * b) for a, b in zip(found[ours], found[theirs], strict=True)]
        result[name] = round(statistics.median(turns), 3)
        result[f"{name}_range"] = [round(min(turns), 3), round(max(turns), 3)]
    print(json.dumps({**result, "rows_per_second": rates}))


def crm_data(config: Config, reader: str) -> Data:
    """CRM batches of all training rows for one worker."""
    config = replace(config, reader=replace(config.reader, kind=reader))
    return Data(config, manifest(config, "shards", SHARDS), "crm", CRM_COLUMNS, crm_batch, config.crm_train, Context())


def text_data(config: Config) -> Data:
    """Text batches of all training rows for one worker."""
    collate = text_collator(stages.adapter_config(config, "reclora"), folder(config, "events"), backbone_path(config))
    shards = manifest(config, "shards", SHARDS)
    return Data(config, shards, "text", TEXT_COLUMNS, collate, config.lora_train, Context())


def rate(steps: Iterator[list]) -> float:
    """Rows per second of all steps."""
    since, rows = time.perf_counter(), 0
    for micro_batches in steps:
        rows += sum(len(batch) for batch, _ in micro_batches)
    return rows / (time.perf_counter() - since)


def floor(config: Config) -> float:
    """pyarrow alone: the columns of all row groups, in the order of an epoch, on one thread."""
    place, entries = folder(config, "shards"), manifest(config, "shards", SHARDS).select("crm/split=train/")
    plan = EpochPlan(row_groups(entries), config.crm_train.seed, 0, 0, 1, config.crm_train.batch_size)
    since, rows = time.perf_counter(), 0
    files = {part.file: pq.ParquetFile(place.open(entries[part.file].path)) for part in plan.slices()}
    for part in plan.slices():
        rows += files[part.file].read_row_group(part.group, list(CRM_COLUMNS), use_threads=False).num_rows
    return rows / (time.perf_counter() - since)


def ray_data(config: Config) -> Callable[[], float]:
    """The same batches by ``ray.data``, files and rows shuffled likewise; its workers run beside this process."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    place, entries = folder(config, "shards"), manifest(config, "shards", SHARDS).select("crm/split=train/")
    paths = [place.path(entry.path) for entry in entries]

    def measure() -> float:
        since, rows = time.perf_counter(), 0
        dataset = ray.data.read_parquet(paths, columns=list(CRM_COLUMNS), shuffle="files")
        size = config.crm_train.batch_size
        for table in dataset.iter_batches(batch_size=size, batch_format="pyarrow", local_shuffle_buffer_size=2 * size):
            rows += len(crm_batch(table))
        return rows / (time.perf_counter() - since)

    return measure


def consumer(config: Config) -> Callable[[], float]:
    """Samples per second of training steps of the demo's RecLoRA, on one thread."""
    model = stages.build_model(
        config, config.adapters["reclora"], load_crm(folder(config, "crm"), manifest(config, "crm", CRM))
    )
    optimiser = build_optimiser(model, config.lora_train, fused=True)
    engine = TorchEngine(model, optimiser, stages.text_loss, config.lora_train, Context())
    steps = text_data(config).batches(0, 0)
    batches = [next(steps) for _ in range(4)]
    steps.close()

    def measure() -> float:
        since = time.perf_counter()
        for micro_batches in batches:
            engine.step(micro_batches, 1e-3)
        return sum(len(batch) for step in batches for batch, _ in step) / (time.perf_counter() - since)

    return measure


def check_equal(config: Config) -> None:
    """The readers give the same batches, bit for bit."""
    pairs = zip(crm_data(config, "arrow").batches(0, 0), crm_data(config, "petastorm").batches(0, 0), strict=True)
    for (one,), (other,) in pairs:
        same = all(torch.equal(getattr(one.batch, name), getattr(other.batch, name)) for name in vars(one.batch))
        if not same:
            raise SystemExit("the readers' batches differ")


if __name__ == "__main__":
    main()
