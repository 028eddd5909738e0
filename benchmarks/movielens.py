"""MovieLens-1M end to end: the CRM on all samples, LoRA and RecLoRA on 8,000, the same 3,000 test rows for all.

    make bench NAME=movielens RAW=path/to/ml-1m            one JSON object last

Beside them: two running averages (nothing is trained) and late fusion (a small head on the tuned language model's
pooled state and the CRM's state). The encoder is all-MiniLM-L6-v2: --encoder, else a folder models/all-MiniLM-L6-v2
beside or above RAW, else the hub.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reclora_dist.backbone.load import mean_pool
from reclora_dist.cli.compose import load
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import digested, verified
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVALUATION, SHARDS
from reclora_dist.evaluate.metrics import binary_metrics, paired_difference
from reclora_dist.evaluate.scorer import Scorer

ROOT = Path(__file__).resolve().parents[1]
NAME = "all-MiniLM-L6-v2"


def main() -> None:
    """Run the pipeline, then late fusion on its outputs; print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder with ratings.dat, movies.dat, users.dat")
    parser.add_argument("--encoder", default="", help="folder or hub id of the encoder")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/movielens-1m", help="folder of the run")
    parser.add_argument("--set", nargs="*", default=[], help="further settings, e.g. adapters.reclora.experts=8")
    arguments = parser.parse_args()
    started = time.perf_counter()
    encoder = arguments.encoder or find_encoder(arguments.raw.resolve())
    overrides = ["data=movielens_1m", "backbone=encoder", "adapters=reclora", "experiment=movielens"]
    overrides += [
        f"backbone.path={encoder}",
        f"events.source.path={arguments.raw.resolve()}",
        f"paths.run={arguments.run.resolve()}",
        *arguments.set,
    ]
    subprocess.run([sys.executable, "-m", "reclora_dist.cli.pipeline", *overrides], check=True, cwd=ROOT)
    config = load(overrides)
    fusion = late_fusion(config)
    print(json.dumps(figures(config, fusion, time.perf_counter() - started)))


def find_encoder(raw: Path) -> str:
    """A local copy of the encoder beside or above the data, or its hub id."""
    local = [parent / "models" / NAME for parent in raw.parents if (parent / "models" / NAME / "config.json").exists()]
    return str(local[0]) if local else f"sentence-transformers/{NAME}"


def late_fusion(config: Config, epochs: int = 20) -> dict:
    """A head on [pooled state of the LoRA-tuned encoder; CRM state], trained on the same 8,000 samples.

    The epoch is chosen on the validation rows; the test rows are scored once.
    """
    torch.manual_seed(config.lora_train.seed)
    torch.set_num_threads(2)
    scorer = Scorer.load(folder(config, "adapters/lora"), threads=2)
    data = {split: features(scorer, config, split) for split in ("train", "validation", "test")}
    mean, deviation = data["train"][0].mean(0), data["train"][0].std(0) + 1e-6
    head = nn.Sequential(nn.Linear(len(mean), 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    x, y = (data["train"][0] - mean) / deviation, data["train"][1]
    best, best_loss = None, float("inf")
    for _ in range(epochs):
        head.train()
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.binary_cross_entropy_with_logits(head(x[rows]).squeeze(-1), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        head.eval()
        with torch.no_grad():
            held = head((data["validation"][0] - mean) / deviation).squeeze(-1)
            validation = nn.functional.binary_cross_entropy_with_logits(held, data["validation"][1]).item()
            if validation < best_loss:
                best_loss, best = validation, torch.sigmoid(head((data["test"][0] - mean) / deviation).squeeze(-1))
    return fusion_metrics(config, best.double().numpy())


@torch.no_grad()
def features(scorer: Scorer, config: Config, split: str) -> tuple[Tensor, Tensor]:
    """[pooled; state] float32 [rows, width] and labels float32 [rows] of a split's text rows."""
    shards = manifest(config, "shards", SHARDS)
    table = read_parts(folder(config, "shards"), shards.select(f"text/split={split}/"))
    parts = []
    for start in range(0, table.num_rows, 256):
        batch = scorer.collate(table.slice(start, 256))
        scorer.model.conditioning.mixture = None
        encoder = scorer.model.backbone.model
        hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        parts.append(torch.cat([mean_pool(hidden, batch.attention_mask), scorer.model.crm(batch.crm).state], dim=1))
    return torch.cat(parts), torch.from_numpy(table["label"].to_numpy().astype(np.float32))


def fusion_metrics(config: Config, scores: np.ndarray) -> dict:
    """Metrics of late fusion and its difference to RecLoRA on the test rows."""
    record = manifest(config, "evaluation", EVALUATION)
    table = read_parts(folder(config, "evaluation"), record.select("predictions/test/reclora/"))
    labels, users = table["label"].to_numpy(), table["user"].to_numpy()
    metrics = binary_metrics(labels, scores, users, config.evaluate)
    difference = paired_difference(labels, table["score"].to_numpy(), scores, users, config.evaluate, "auc")
    return {"metrics": metrics, "reclora_minus_fusion": difference}


def figures(config: Config, fusion: dict, seconds: float) -> dict:
    """The bench's JSON object."""
    record = manifest(config, "evaluation", EVALUATION)
    source = folder(config, "evaluation")
    found = json.loads(verified(source, digested(source, record, "metrics.json")))
    whole, rows = found["all_rows"]["test"]["crm"], found["splits"]["test"]
    result = {"crm_auc": whole["auc"]["mean"], "crm_logloss": whole["logloss"]["mean"], "crm_rows": whole["rows"]}
    result |= {f"{m}_auc": rows[m]["auc"]["mean"] for m in ("lora", "reclora", "running_averages")}
    result |= {f"{m}_logloss": rows[m]["logloss"]["mean"] for m in ("lora", "reclora", "running_averages")}
    result["crm_auc_on_text_rows"] = rows["crm"]["auc"]["mean"]
    result["late_fusion_auc"] = fusion["metrics"]["auc"].mean
    result["late_fusion_logloss"] = fusion["metrics"]["logloss"].mean
    for d in found["differences"]:
        if d["split"] == "test" and d["metric"] == "auc":
            result[f"{d['better']}_minus_{d['than']}"] = {key: d[key] for key in ("mean", "low", "high")}
    difference = fusion["reclora_minus_fusion"]
    result["reclora_minus_late_fusion"] = {key: getattr(difference, key) for key in ("mean", "low", "high")}
    timings = json.loads((folder(config, "").local() / "timings.json").read_text())
    result["stage_seconds"] = timings["seconds"]
    result["peak_memory_mib"] = timings["peak_memory_mib"]
    result["seconds"] = round(seconds, 1)
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in result.items()}


if __name__ == "__main__":
    main()
