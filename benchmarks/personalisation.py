"""Does the gate matter? The demo on three seeds: RecLoRA against plain LoRA and against a uniform gate, paired.

    make bench NAME=personalisation            one JSON object last

Each seed makes another log, other samples and other initial weights. The log plants tastes that only the long history
shows, so a lead is expected; the bench shows that it does not hang on one seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDED = ("synthesise", "shards", "backbone", "crm_train", "lora_train", "evaluate")


def main() -> None:
    """Run the demo for every seed and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/personalisation", help="folder of the runs")
    arguments = parser.parse_args()
    summaries = [run(seed, arguments.runs / f"seed-{seed}") for seed in range(arguments.seeds)]
    print(json.dumps(figures(summaries)))


def run(seed: int, folder: Path) -> dict:
    """The summary of the demo with one seed; a finished run is read, not repeated."""
    overrides = [f"paths.run={folder}", *(f"{section}.seed={seed}" for section in SEEDED), "serve.check=false"]
    subprocess.run([sys.executable, "-m", "reclora_dist.cli.pipeline", *overrides], check=True, cwd=ROOT)
    return json.loads((folder / "summary.json").read_text())


def figures(summaries: list[dict]) -> dict:
    """AUC per model and the paired differences, seed by seed and on average."""
    result: dict = {"seeds": len(summaries)}
    for model in ("crm", "lora", "uniform", "reclora"):
        result[f"{model}_auc"] = [summary[model]["auc"] for summary in summaries]
    for difference in ("reclora_minus_lora", "reclora_minus_uniform"):
        found = [summary[difference] for summary in summaries]
        means = [interval["mean"] for interval in found]
        result[difference] = {
            "per_seed": found,
            "mean": round(statistics.mean(means), 6),
            "standard_deviation": round(statistics.stdev(means), 6) if len(means) > 1 else None,
            "every_interval_above_0": all(interval["low"] > 0 for interval in found),
        }
    result["seconds"] = [round(sum(summary["seconds"].values()), 1) for summary in summaries]
    return result


if __name__ == "__main__":
    main()
