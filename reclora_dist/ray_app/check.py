"""The pipeline's last stage: serve the adapter, ask it over HTTP, compare with the evaluation, find the metrics."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from reclora_dist.config.run import RunFailed, folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import service_target
from reclora_dist.contract.manifest import add_file
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVALUATION, EVENTS
from reclora_dist.ray_app import service
from reclora_dist.ray_app.evaluate import split_rows
from reclora_dist.ray_app.scrape import Scraper

ANSWERS = "answers.json"
CANDIDATES = 5
EVALUATED = 200
TOLERANCE = 1e-4
EXPORT_PATIENCE_S = 40.0
"""Ray exports every 10 s."""

START_PATIENCE_S = 600.0
"""Seconds that an evaluation may wait for its process; how long it then runs depends on the model."""


def adapter_to_serve(config: Config) -> str:
    """Folder of the adapter that the service takes: the configured one, else the first that ``compare`` names."""
    if config.serve.adapter:
        return config.serve.adapter
    if not config.adapters:
        raise ValueError("the config has no adapters; add one, or give serve.adapter a folder")
    better = [pair[0] for pair in config.compare if pair[0] in config.adapters]
    return folder(config, f"adapters/{(better or list(config.adapters))[0]}").uri


def check_service(config: Config, scraper: Scraper, expected: set[str]) -> None:
    """Serve, score a test sample and others, run an evaluation, scrape; write ``service/answers.json``.

    Args:
        expected: names of the series that have to be found.

    Raises:
        RunFailed: an answer differs from the evaluation's score, a metric is missing, or no evaluation starts.
        ValueError: the service cannot be started, see ``service.running``.
    """
    with service.running(adapter_to_serve(config), config.serve, config.evaluate, scraper.cluster) as url:
        print(f"service: {url} (API: {url}/docs)", flush=True)
        answers = {"healthz": _call(f"{url}/healthz"), "score": _score(config, url), "evaluation": _evaluate(url)}
        missing = scraper.missing(expected, EXPORT_PATIENCE_S)
    print(f"metrics: {len(expected) - len(missing)} of {len(expected)} series found by a scrape", flush=True)
    if missing:
        raise RunFailed(f"no scrape of the cluster found {', '.join(missing)}")
    target = service_target(config)
    target.commit([add_file(target.folder, ANSWERS, json.dumps(answers, indent=1).encode())])


def _score(config: Config, url: str) -> dict[str, Any]:
    """Ask for a test sample's item among others; the service must say what the evaluation said."""
    rows = split_rows(config, "test")
    row = rows.slice(0, 1).to_pylist()[0]
    events, source = manifest(config, "events", EVENTS), folder(config, "events")
    items = read_parts(source, events.select("items/"), ["item", "item_id", "title"])
    users = read_parts(source, events.select("users/"), ["user", "user_id"])
    user = _name(users, "user", row["user"], "user_id")
    others = items["item_id"].to_pylist()[:CANDIDATES]
    target = _name(items, "item", row["item"], "item_id")
    candidates = [target, *[i for i in others if i != target][: CANDIDATES - 1]]
    body = {"user": user, "candidates": candidates, "time": row["time"]}
    answer = _call(f"{url}/v1/score", body)
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    for entry in answer["scores"]:
        print(f"service: user {user} · {titles[entry['item']]}: {entry['score']:.3f}", flush=True)
    _compare(config, answer["scores"][0]["score"], row["sample_id"])
    return {"request": body, "response": answer}


def _compare(config: Config, score: float, sample: int) -> None:
    model = adapter_to_serve(config).rpartition("/")[2]
    record = manifest(config, "evaluation", EVALUATION)
    entries = record.select(f"predictions/test/{model}/")
    if not entries:
        return  # an adapter from elsewhere, which this run has not evaluated
    table = read_parts(folder(config, "evaluation"), entries)
    expected = table["score"].to_numpy()[np.flatnonzero(table["sample_id"].to_numpy() == sample)[0]]
    if abs(score - expected) > TOLERANCE:
        raise RunFailed(f"sample {sample}: the service says {score:.6f}, the evaluation {expected:.6f}")


def _name(table: pa.Table, key: str, position: int, column: str) -> str:
    place = int(np.flatnonzero(table[key].to_numpy() == position)[0])
    return str(table[column][place].as_py())


def _evaluate(url: str) -> Mapping[str, Any]:
    job = _call(f"{url}/v1/evaluations", {"split": "validation", "limit": EVALUATED})
    deadline = time.monotonic() + START_PATIENCE_S
    while job["status"] in ("pending", "running"):
        if job["status"] == "pending" and time.monotonic() > deadline:
            raise RunFailed(
                f"the service's evaluation has waited {START_PATIENCE_S:g} s for a free CPU (and serve.gpus GPUs) on "
                "the cluster: give it more, or lower serve.replicas or serve.threads"
            )
        time.sleep(0.5)
        job = _call(f"{url}/v1/evaluations/{job['id']}")
    if job["status"] != "done":
        raise RunFailed(f"the service's evaluation ended as {job['status']}: {job}")
    auc = job["metrics"]["auc"]["mean"]
    print(f"service: evaluation of {EVALUATED} validation samples: AUC {auc:.4f}", flush=True)
    return dict(job)


def _call(url: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RunFailed(f"{url}: HTTP {error.code}: {error.read().decode()}") from error
