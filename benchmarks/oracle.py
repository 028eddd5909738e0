"""How much of what can be known does RecLoRA reach with a tenth of the samples? On a log whose truth is known.

    make bench NAME=oracle            one JSON object last

The generated log publishes the probability of liking behind every event (`synthesise.truth`), so the best possible AUC
on the test rows is known. Plain LoRA is trained on all samples, RecLoRA on a tenth of them; both see the same test rows
and the same CRM. `share` is the part of the way from plain LoRA on all samples to the best possible AUC that RecLoRA
goes; goals: above 0 with its interval, and .8. What users like must be guessed from their past, so 1 cannot be reached.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from reclora_dist.cli.compose import load
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVALUATION, EVENTS, SHARDS
from reclora_dist.evaluate.metrics import binary_metrics, paired_difference

ROOT = Path(__file__).resolve().parents[1]
SEEDED = ("synthesise", "shards", "backbone", "crm_train", "lora_train", "evaluate")
RUNS = {
    "tenth": ["shards.text_train=0.1"],
    "all": ["shards.text_train=1.0", "~adapters.uniform", "~adapters.reclora", "compare=[]"],
}
"""What each run changes: a tenth of the samples for all adapters of the demo, all of them for plain LoRA."""


def main() -> None:
    """Run both for every seed and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/oracle", help="folder of the runs")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of both runs")
    arguments = parser.parse_args()
    found = [measured(seed, arguments.runs / f"seed-{seed}", arguments.set) for seed in range(arguments.seeds)]
    print(json.dumps({"share": [seed["share"] for seed in found], "seeds": found}))


def measured(seed: int, home: Path, more: list[str]) -> dict:
    """AUC of the models and of the truth on the test rows of one seed."""
    seeds = [f"{section}.seed={seed}" for section in SEEDED]
    configs = {name: run([*changes, *seeds, *more], home / name) for name, changes in RUNS.items()}
    tenth = {model: predictions(configs["tenth"], model) for model in ("lora", "uniform", "reclora", "crm")}
    rows = tenth["reclora"]
    every = predictions(configs["all"], "lora")
    if not rows["sample_id"].equals(every["sample_id"]):
        raise SystemExit("the two runs scored other test rows; use the same settings for both")
    labels, users = rows["label"].to_numpy(), rows["user"].to_numpy()
    scores = {f"{model}_tenth": table["score"].to_numpy() for model, table in tenth.items()}
    scores |= {"lora_all": every["score"].to_numpy(), "truth": truth(configs["tenth"], rows)}
    evaluate = configs["tenth"].evaluate
    auc = {name: round(binary_metrics(labels, s, users, evaluate)["auc"].mean, 5) for name, s in scores.items()}
    lead = paired_difference(labels, scores["reclora_tenth"], scores["lora_all"], users, evaluate)
    share = (auc["reclora_tenth"] - auc["lora_all"]) / (auc["truth"] - auc["lora_all"])
    return {"auc": auc, "reclora_tenth_minus_lora_all": vars(lead), "share": round(share, 4)}


def run(overrides: list[str], home: Path) -> Config:
    """The pipeline to its end; finished stages are skipped."""
    arguments = ["synthesise.truth=true", "serve.check=false", f"paths.run={home.resolve()}", *overrides]
    subprocess.run([sys.executable, "-m", "reclora_dist.cli.pipeline", *arguments], check=True, cwd=ROOT)
    return load(arguments)


def predictions(config: Config, model: str) -> pa.Table:
    """The test rows that a model scored, in order of their sample."""
    record = manifest(config, "evaluation", EVALUATION)
    return read_parts(folder(config, "evaluation"), record.select(f"predictions/test/{model}/")).sort_by("sample_id")


def truth(config: Config, rows: pa.Table) -> np.ndarray:
    """The published probability of liking behind each row, float64 [rows]; a user rates an item once."""
    shards, events = manifest(config, "shards", SHARDS), manifest(config, "events", EVENTS)
    samples = read_parts(folder(config, "shards"), shards.select("text/split=test/"), ["sample_id", "user", "item"])
    for name in ("user", "item"):
        names = read_parts(folder(config, "events"), events.select(f"{name}s/"), [name, f"{name}_id"])
        samples = samples.join(names, name)
    raw = ds.dataset(folder(config, "raw").path("events")).to_table(columns=["user_id", "item_id", "probability"])
    joined = rows.select(["sample_id"]).join(samples.join(raw, ["user_id", "item_id"]), "sample_id")
    return joined.sort_by("sample_id")["probability"].to_numpy()


if __name__ == "__main__":
    main()
