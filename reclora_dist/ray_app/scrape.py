"""What a cluster exports to Prometheus, seen as Prometheus sees it."""

import threading
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from reclora_dist.ray_app.session import Cluster
from reclora_dist.telemetry import names

INTERVAL_S = 3.0


class Scraper:
    """Polls a cluster's Prometheus endpoints while its block runs, as Prometheus would; ``found`` grows.

    A gauge goes a few seconds after the process that set it, so one scrape at the end would miss the training's.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.found: set[str] = set()
        self.cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True, name="scraper")

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def missing(self, expected: set[str], patience_s: float) -> list[str]:
        """Those of ``expected`` that do not turn up within ``patience_s`` seconds."""
        deadline = time.monotonic() + patience_s
        while expected - self.found and time.monotonic() < deadline:
            time.sleep(0.5)
        return sorted(expected - self.found)

    def _poll(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.found |= scrape(self.cluster)


def series_of(*rooms: str) -> set[str]:
    """Names of the series that ``rooms`` (``train``, ``evaluation``, ``serve``) export."""
    metrics = [metric for metric in names.ALL if metric.name.split("_")[1] in rooms]
    return {name for metric in metrics for name in names.series(metric)}


def scrape(cluster: Cluster) -> set[str]:
    """Names of this project's series at the nodes' Prometheus endpoints."""
    found: set[str] = set()
    for target in cluster.metrics:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
                text = response.read().decode()
        except OSError:  # a node that is starting or leaving; Prometheus would try again, too
            continue
        for family in text_string_to_metric_families(text):
            found |= {sample.name for sample in family.samples if "reclora_" in sample.name}
    return found
