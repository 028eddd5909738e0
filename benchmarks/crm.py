"""Training of the conventional model against FuxiCTR's, on MovieLens-1M: samples per second and validation AUC.

    make bench NAME=crm RAW=path/to/ml-1m            one JSON object last

Both train DIN on all training samples with the 60 newest events of each user, with equal widths, batch size and
number of epochs, on two threads; FuxiCTR (its own model, loader, loop and evaluation) in a process of its own with a
loading process beside it, in turns with ours. Both read items, their fields, the user's fields and the rating of each
past event (FuxiCTR's as a feature of the item, unknown for the target), and no running statistics. Learning rates:
FuxiCTR's default of 1e-3 without a schedule, ours.

`samples_vs_fuxictr`: goal 3. `auc_difference`: ours minus theirs at the end, goal 0 or better. `step_ms`: a training
step of ours on random batches as large, by the number of items in the log, with a row of embeddings for each and with
them hashed to 50,000 rows. Needs the extra `bench`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from reclora_dist.cli.compose import load
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import CRM, EVENTS, SHARDS
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.inputs import Vocabulary
from reclora_dist.crm.sim import Sim
from reclora_dist.train import stages
from reclora_dist.train.context import Context
from reclora_dist.train.engine import MicroBatch, TorchEngine, build_optimiser

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
LOGS = (4_000, 100_000, 1_000_000)


def main() -> None:
    """Prepare the data, train in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder with ratings.dat, movies.dat, users.dat")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/crm", help="folder of the run")
    parser.add_argument("--rounds", type=int, default=2, help="how often each trains, in turns")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, e.g. crm_train.batch_size=1024")
    arguments = parser.parse_args()
    overrides = ["data=movielens_1m", "crm=din", "crm.statistics=false", "crm_train.batch_size=4096", "ray.workers=0"]
    overrides += [f"events.source.path={arguments.raw.resolve()}", f"paths.run={arguments.run.resolve()}"]
    overrides += [f"crm_train.epochs={arguments.epochs}", "crm_train.log_every=50", *arguments.set]
    subprocess.run([sys.executable, "-m", "reclora_dist.cli.prepare", *overrides], check=True, cwd=ROOT)
    config = load(overrides)
    rival = arguments.run / "fuxictr"
    write_rival(config, rival)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(train(config))
        print(f"ours: {json.dumps(ours[-1])}", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks/rivals/fuxictr_din.py"), str(rival)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        theirs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"FuxiCTR: {json.dumps(theirs[-1])}", flush=True)
    print(json.dumps({**summary(ours, theirs), "step_ms": {str(items): step_ms(config, items) for items in LOGS}}))


def step_ms(config: Config, items: int, steps: int = 5) -> dict[str, float]:
    """Milliseconds of a training step on a log of ``items`` items: median of ``steps``."""
    torch.set_num_threads(THREADS)
    size, long = config.crm_train.batch_size, config.retrieval.long
    draw = torch.Generator().manual_seed(0)
    batch = CrmBatch(
        sample_id=torch.arange(size),
        item=torch.randint(1, items + 1, (size,), generator=draw),
        user=torch.ones(size, dtype=torch.int64),
        label=torch.randint(0, 2, (size,), generator=draw).float(),
        user_fields=torch.zeros(size, 0, dtype=torch.int64),
        statistics=torch.zeros(size, 4),
        items=torch.randint(1, items + 1, (size, long), generator=draw),
        levels=torch.randint(1, 6, (size, long), generator=draw),
        length=torch.full((size,), long),
    )
    found = {}
    for name, rows in (("a row each", 0), ("hashed", 50_000)):
        torch.manual_seed(0)
        crm = replace(config.crm, item_rows=rows, ignore=())
        model = Sim(crm, Vocabulary(items, 1, 5, (), (18,)), torch.ones(items + 1, 1, dtype=torch.int64))
        optimiser = build_optimiser(model, config.crm_train, fused=True)
        engine = TorchEngine(model, optimiser, stages.crm_loss, config.crm_train, Context())
        spent = []
        for _ in range(steps + 1):
            since = time.perf_counter()
            engine.step([MicroBatch(batch, 1.0)], 1.0)
            spent.append(time.perf_counter() - since)
        found[name] = round(1e3 * statistics.median(spent[1:]), 1)
    return found


def summary(ours: Sequence[dict], theirs: Sequence[dict]) -> dict:
    """The figures with goals, and what they are made of."""
    rates = [statistics.mean(e["samples_per_second"] for e in run["epochs"]) for run in theirs]
    ratios = [run["samples_per_second"] / rate for run, rate in zip(ours, rates, strict=True)]
    auc = [[entry["validation_auc"] for entry in run["history"]] for run in ours]
    other = [[epoch["auc"] for epoch in run["epochs"]] for run in theirs]
    return {
        "samples_vs_fuxictr": round(statistics.median(ratios), 3),
        "samples_vs_fuxictr_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "auc_difference": round(auc[0][-1] - other[0][-1], 5),
        "auc": {"ours": auc[0], "fuxictr": other[0]},
        "samples_per_second": {"ours": [run["samples_per_second"] for run in ours], "fuxictr": rates},
        "mfu": ours[0]["mfu"],
        "data_wait_share": ours[0]["data_wait_share"],
    }


def train(config: Config) -> dict:
    """Ours, from the shards to the saved model."""
    torch.set_num_threads(THREADS)
    for name in ("crm", "checkpoints"):
        shutil.rmtree(folder(config, name).local(), ignore_errors=True)
    stages.train_crm(config, Context())
    costs: dict = json.loads(folder(config, "training").read("crm.json"))
    return {**costs, "history": read_manifest(folder(config, "crm"), CRM).facts["history"]}


def write_rival(config: Config, home: Path) -> None:
    """The same samples in FuxiCTR's layout: each names its user and how many of that user's events are earlier.

    Events of the same moment are no history in ours, so they are none in theirs.
    """
    home.mkdir(parents=True, exist_ok=True)
    events, shards = manifest(config, "events", EVENTS), manifest(config, "shards", SHARDS)
    columns = ["sample_id", "user", "item", "level", "time"]
    sequences = read_parts(folder(config, "events"), events.select("events/"), columns)
    sequences = sequences.sort_by("sample_id")  # user, then place among the user's events
    users, first = np.unique(sequences["user"].to_numpy(), return_index=True)
    ratings = len(events.facts["rating_levels"]) + 1  # each item once per rating, 0 where it is not known
    rated = sequences["item"].to_numpy().astype(np.int64) * ratings + sequences["level"].to_numpy()
    lists = pa.array(np.split(rated, first[1:]))
    times = np.split(sequences["time"].to_numpy(), first[1:])
    earlier = np.concatenate([np.searchsorted(own, own, "left") for own in times])
    whole = [[] for _ in range(int(users.max()) + 1)]
    for user, items in zip(users.tolist(), lists.to_pylist(), strict=True):
        whole[user] = items
    pq.write_table(pa.table({"full_item_seq": pa.array(whole, pa.list_(pa.int64()))}), home / "user_info.parquet")

    items = read_parts(folder(config, "events"), events.select("items/"), ["item", "fields"]).sort_by("item")
    fields = np.stack(items["fields"].to_numpy(zero_copy_only=False)) if items.num_rows else np.zeros((0, 0))
    numbers = np.concatenate([[0], items["item"].to_numpy()]).astype(np.int64)
    rated_items = {"item": np.repeat(numbers, ratings), "level": np.tile(np.arange(ratings), len(numbers))}
    for i in range(fields.shape[1]):
        rated_items[f"item_{i}"] = np.repeat(np.concatenate([[0], fields[:, i]]).astype(np.int64), ratings)
    index = rated_items["item"] * ratings + rated_items["level"]
    pq.write_table(pa.table({"item_index": index, **rated_items}), home / "item_info.parquet")

    for split in ("train", "validation"):
        table = read_parts(folder(config, "shards"), shards.select(f"crm/split={split}/"))
        place = earlier[np.searchsorted(sequences["sample_id"].to_numpy(), table["sample_id"].to_numpy())]
        own = np.stack(table["user_fields"].to_numpy(zero_copy_only=False))
        rows = {"label": table["label"].cast(pa.int64()), "user_index": table["user"].cast(pa.int64())}
        rows |= {"item_index": pc.multiply(table["item"].cast(pa.int64()), ratings), "seq_len": place}
        rows |= {f"user_{i}": pa.array(own[:, i].astype(np.int64)) for i in range(own.shape[1])}
        pq.write_table(pa.table(rows), home / f"{split}.parquet")
    facts = events.facts
    sizes = {"item": (facts["items"], "item"), "level": (ratings - 1, "item")}
    sizes |= {f"item_{i}": (len(values), "item") for i, values in enumerate(facts["item_fields"].values())}
    profile = enumerate(facts["user_fields"].items())
    sizes |= {f"user_{i}": (len(values), "user") for i, (name, values) in profile if name not in config.crm.ignore}
    _write_settings(config, home, sizes)


def _write_settings(config: Config, home: Path, sizes: dict[str, tuple[int, str]]) -> None:
    features = [{name: {"source": "", "type": "meta"}} for name in ("user_index", "item_index", "seq_len")]
    for name, (size, source) in sizes.items():
        spec = {"source": source, "type": "categorical", "padding_idx": 0, "vocab_size": size + 1}
        features.append({name: spec})
    feature_map = {"dataset_id": "log", "labels": ["label"], "features": features}
    (home / "feature_map.json").write_text(json.dumps(feature_map))
    settings = {
        "threads": THREADS, "loaders": 1, "seed": config.crm_train.seed, "epochs": config.crm_train.epochs, "lr": 1e-3,
        "batch_size": config.crm_train.batch_size, "long": config.retrieval.long, "embedding": config.crm.embedding,
        "dnn": list(config.crm.dnn), "attention": list(config.crm.attention), "dropout": config.crm.dropout,
    }  # fmt: skip
    (home / "settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
