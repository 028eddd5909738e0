"""What training, evaluation and serving need of a metrics library, so that none of them imports one."""

from typing import Protocol

from reclora_dist.telemetry.names import Metric


class Meters(Protocol):
    """Takes the samples of metrics; labels are given by name and must be exactly the metric's."""

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Add ``value`` to a counter."""

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Set a gauge to ``value``."""

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Put ``value`` into a histogram."""


class NullMeters:
    """Meters that check every sample and keep nothing: for runs without a metrics endpoint."""

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Check a counter's sample; see ``check``."""
        check(metric, "counter", labels)

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Check a gauge's sample; see ``check``."""
        check(metric, "gauge", labels)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Check a histogram's sample; see ``check``."""
        check(metric, "histogram", labels)


def check(metric: Metric, kind: str, labels: dict[str, str]) -> None:
    """Refuse a sample that does not fit its metric.

    Raises:
        ValueError: the metric is of another kind, or the labels are not exactly its own.
    """
    if metric.kind != kind:
        method = {"counter": "add", "gauge": "set", "histogram": "observe"}[metric.kind]
        raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}; use {method}()")
    if set(labels) != set(metric.labels):
        raise ValueError(
            f"{metric.name} takes the labels {sorted(metric.labels)}, not {sorted(labels)}; give exactly those"
        )
