"""Counts of a Spark job for Prometheus: a text file for the node exporter, and an endpoint while the job runs."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, start_http_server, write_to_textfile

from reclora_dist.contract.manifest import Manifest
from reclora_dist.telemetry.names import SPARK_JOB_SECONDS, SPARK_QUARANTINED_ROWS, SPARK_ROWS, Metric


class JobMetrics:
    """The gauges of one run of one job."""

    def __init__(self, job: str, port: int = 0) -> None:
        """Serve the metrics on 127.0.0.1:``port`` unless it is 0."""
        self._job = job
        self._registry = CollectorRegistry()
        self._rows = self._gauge(SPARK_ROWS)
        self._quarantined = self._gauge(SPARK_QUARANTINED_ROWS)
        self._seconds = self._gauge(SPARK_JOB_SECONDS)
        if port:
            start_http_server(port, addr="127.0.0.1", registry=self._registry)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)

    def record(self, manifest: Manifest, seconds: float) -> None:
        """Set every gauge from the manifest of the job's result."""
        folders = {entry.path.rpartition("/")[0] for entry in manifest.files if "/" in entry.path}
        for table in sorted({folder.partition("/day=")[0] for folder in folders}):  # a label per day would never end
            self._rows.labels(job=self._job, table=table).set(manifest.rows(f"{table}/"))
        for reason, rows in manifest.facts.get("quarantine", {}).items():
            self._quarantined.labels(job=self._job, reason=reason).set(rows)
        self._seconds.labels(job=self._job).set(seconds)

    def write(self, path: str) -> None:
        """Write the gauges to the text file ``path``."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(path, self._registry)
