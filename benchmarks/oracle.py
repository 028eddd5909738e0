"""How much of what can be known does RecLoRA reach with a tenth of the samples? On a log whose truth is known.

    make bench NAME=oracle            one JSON object last

Runs the study `oracle` (configs/study/oracle.yaml; its tables and plots lie in the folder of the runs). The generated
log publishes the probability of liking behind every event, so the best possible AUC on the test rows is known. Plain
LoRA is trained on all samples, RecLoRA on a tenth of them; both see the same test rows. `share` is the part of the way
from plain LoRA on all samples to the best possible AUC that RecLoRA goes; goals: above 0 with its interval, and .8. It
is trained on the labels (`reclora`), and on the probabilities of a mean of LoRA's and the CRM's logit (`taught`).
What users like must be guessed from their past, so 1 cannot be reached. `impersonal`: where all users like the same,
the lead of a gate that reads the user only over the same model with other users' mixtures; goal: 0 ± .002. The leads
over LoRA, with as many samples, stand beside it: RecLoRA's own gate reads the item, too, and so what the CRM learnt of
it from ten times the samples.
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
from reclora_dist.evaluate.metrics import Interval, binary_metrics, paired_difference

ROOT = Path(__file__).resolve().parents[1]
RECLORAS = ("reclora", "taught")


def main() -> None:
    """Run the study, then compare with the truth and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/studies/oracle", help="folder of the runs")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of all runs")
    arguments = parser.parse_args()
    settings, runs, seeds = ["study=oracle", *arguments.set], arguments.runs.resolve(), list(range(arguments.seeds))
    study = [sys.executable, "-m", "reclora_dist.cli.study", *settings, f"paths.run={runs}", f"study.seeds={seeds}"]
    subprocess.run(study, check=True, cwd=ROOT)
    found = [measured(settings, runs, seed) for seed in seeds]
    shares = {model: [seed["share"][model] for seed in found] for model in RECLORAS}
    print(json.dumps({"share": shares, "seeds": found}))


def measured(settings: list[str], runs: Path, seed: int) -> dict:
    """AUC of the models and of the truth on the test rows of one seed."""
    tenth, whole, impersonal = (
        load([*settings, f"paths.run={runs / point / f'seed-{seed}'}"]) for point in ("tenth", "whole", "impersonal")
    )
    models = {model: predictions(tenth, model) for model in ("lora", "uniform", "blend", *RECLORAS, "crm")}
    rows, every = models["reclora"], predictions(whole, "lora")
    if not rows["sample_id"].equals(every["sample_id"]):
        raise SystemExit("the runs scored other test rows; use the same settings for both")
    labels, users = rows["label"].to_numpy(), rows["user"].to_numpy()
    scores = {f"{model}_tenth": table["score"].to_numpy() for model, table in models.items()}
    scores |= {"lora_whole": every["score"].to_numpy(), "truth": truth(tenth, rows)}
    evaluate = tenth.evaluate
    auc = {name: round(binary_metrics(labels, s, users, evaluate)["auc"].mean, 5) for name, s in scores.items()}
    few_to_many, share = {}, {}
    for model in RECLORAS:
        ours = scores[f"{model}_tenth"]
        few_to_many[model] = vars(paired_difference(labels, ours, scores["lora_whole"], users, evaluate))
        way = (auc[f"{model}_tenth"] - auc["lora_whole"]) / (auc["truth"] - auc["lora_whole"])
        share[model] = round(way, 4)
    pairs = [("user", "user (shuffled)"), ("user", "lora"), ("reclora", "lora")]
    leads = {f"{better} - {than}": vars(lead(impersonal, better, than)) for better, than in pairs}
    return {
        "auc": auc,
        "tenth_minus_lora_whole": few_to_many,
        "share": share,
        "impersonal": leads,
    }


def lead(config: Config, better: str, than: str) -> Interval:
    """AUC of a model minus that of another on the same test rows."""
    rows, other = predictions(config, better), predictions(config, than)
    labels, users = rows["label"].to_numpy(), rows["user"].to_numpy()
    return paired_difference(labels, rows["score"].to_numpy(), other["score"].to_numpy(), users, config.evaluate)


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
