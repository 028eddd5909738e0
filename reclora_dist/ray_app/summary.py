"""What a run amounts to: ``summary.json``, the report, and the table on the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.report import Report, write_report
from reclora_dist.ray_app.evaluate import ranking_result, results, slice_results

PLANTED = (
    "The log is synthetic: it plants hidden styles of items that no text names, and tastes for them (partly shared by "
    "all users, mostly personal) that only the long id history shows. RecLoRA's lead over plain LoRA is built into the "
    "data: it shows that the method works, not how much it gives on yours."
)
SAME_ROWS = "All models score the same test rows; intervals resample users; the test split chose nothing."


def write_summary(config: Config, timings: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``summary.json`` and ``report/``, print the table, return the summary."""
    home, rates = Folder(config.paths.run), timings.get("samples_per_s", {})
    models, differences = results(config, "test", rates)
    summary: dict[str, Any] = {
        model.name: {
            **{key: round(model.metrics[key].mean, 6) for key in ("auc", "logloss", "acc")},
            "samples_per_s": round(rates.get(model.name, 0.0), 1),
        }
        for model in models
    }
    for d in differences:
        if d.metric == "auc":
            interval = {key: round(getattr(d.interval, key), 6) for key in ("mean", "low", "high")}
            summary[f"{d.better}_minus_{d.than}"] = interval
    summary["training"] = _training(config)
    summary["seconds"] = timings.get("seconds", {})
    summary["peak_memory_mib"] = timings.get("peak_memory_mib", 0)
    notes = [SAME_ROWS] + ([PLANTED] if config.synthesise else [])
    title = f"{Path(config.paths.run).name}: test split"
    slices, all_rows = slice_results(config, "test")
    report = Report(title, models, differences, notes, summary["seconds"], slices, all_rows, ranking_result(config))
    write_report(home.child("report"), report)
    home.write("summary.json", json.dumps(summary, indent=1).encode())
    _print_table(config, summary, [model.name for model in models])
    return summary


def _training(config: Config) -> dict[str, Any]:
    """What the training of each stage cost, as far as it was trained in this run folder."""
    home = folder(config, "training")
    names = [name for name in ("crm", *config.adapters) if home.exists(f"{name}.json")]
    return {name: json.loads(home.read(f"{name}.json")) for name in names}


def _print_table(config: Config, summary: Mapping[str, Any], models: list[str]) -> None:
    print(f"\n{'model':<18}{'AUC':>8}{'LogLoss':>10}{'ACC':>8}{'samples/s':>12}")
    for model in models:
        row = summary[model]
        print(f"{model:<18}{row['auc']:>8.4f}{row['logloss']:>10.4f}{row['acc']:>8.4f}{row['samples_per_s']:>12,.0f}")
    for better, than in config.compare:
        d = summary[f"{better}_minus_{than}"]
        print(f"AUC {better} − {than}: {d['mean']:+.4f} (95 % interval {d['low']:+.4f} to {d['high']:+.4f})")
    total = sum(summary["seconds"].values())
    print(f"stages took {total:.0f} s, peak memory {summary['peak_memory_mib']:,} MiB")
    print(f"report: {folder(config, 'report').path('report.html')}")
    print(f"summary: {Folder(config.paths.run).path('summary.json')}", flush=True)
