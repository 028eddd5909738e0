import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reclora_dist.telemetry import memory, names
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import ALL, Metric, series

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
QUERY = re.compile(r"\b(?:ray_)?reclora_(?!dist\b)[a-z0-9_]+")


def test_every_metric_is_listed_once() -> None:
    constants = {value for value in vars(names).values() if isinstance(value, Metric)}
    assert constants == set(ALL)
    assert len({metric.name for metric in ALL}) == len(ALL)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_metrics_keep_the_rules_of_prometheus_and_ray(metric: Metric) -> None:
    assert re.fullmatch(r"reclora_[a-z]+(_[a-z]+)*", metric.name)
    assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum")), "the exporter adds the suffix"
    assert "route" not in metric.labels, "Ray fails on a tag of that name"
    assert metric.help and not metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets)) and all(b > 0 for b in metric.buckets)


def test_series_are_spelled_as_ray_exports_them() -> None:
    assert series(names.TRAIN_STEPS) == ("ray_reclora_train_steps_total",)
    assert series(names.TRAIN_LOSS) == ("ray_reclora_train_loss",)
    assert series(names.SERVE_BATCH_ROWS)[0] == "ray_reclora_serve_batch_rows_bucket"
    assert series(names.SPARK_ROWS) == ("reclora_spark_rows",)


def test_meters_refuse_another_kind_and_other_labels() -> None:
    meters = NullMeters()
    meters.add(names.TRAIN_STEPS, stage="crm")
    meters.set(names.EVALUATION_METRIC, 0.5, model="lora", split="test", metric="auc")
    meters.observe(names.SERVE_BATCH_ROWS, 3)
    with pytest.raises(ValueError, match=r"reclora_train_steps is a counter, not a gauge; use add\(\)"):
        meters.set(names.TRAIN_STEPS, 1, stage="crm")
    with pytest.raises(ValueError, match=r"takes the labels \['stage'\], not \[\]; give exactly those"):
        meters.set(names.TRAIN_LOSS, 1)


@pytest.mark.parametrize("path", sorted(p for p in MONITORING.rglob("*") if p.is_file()), ids=lambda path: path.name)
def test_dashboards_and_alerts_ask_only_for_metrics_that_exist(path: Path) -> None:
    known = {name for metric in ALL for name in series(metric)}
    asked = {match.group() for match in QUERY.finditer(path.read_text())}
    assert asked <= known, f"{path.name} asks for {sorted(asked - known)}: correct it, or add the metric to names.py"


def test_every_metric_is_on_the_dashboard() -> None:
    text = (MONITORING / "grafana" / "reclora.json").read_text()
    missing = [metric.name for metric in ALL if not any(name in text for name in series(metric))]
    assert not missing


def test_alerts_say_what_to_do() -> None:
    groups = yaml.safe_load((MONITORING / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert {"summary", "description"} <= set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]


def test_peak_memory_holds_the_children_and_counts_pages_only_at_a_new_high(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, allocate = memory.PeakMemory(), "x = bytearray(200 << 20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", allocate], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        peak.sample()
        child.communicate(b"\n")
    assert peak.mib > 200
    monkeypatch.setattr(memory, "tree_mib", lambda: pytest.fail("counted though nothing has grown"))
    peak.sample()
    assert peak.mib > 200
