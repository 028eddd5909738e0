"""Metrics through Ray's own export: every node serves them to Prometheus at its metrics port."""

import threading
import time
import weakref
from functools import cache
from typing import Any

from ray.util import metrics

from reclora_dist.telemetry.meters import check
from reclora_dist.telemetry.names import Metric

_REFRESH_S = 1.0


class RayMeters:
    """Meters of a process that is connected to a Ray cluster.

    Samples appear at the node's endpoint within about ten seconds, as ``names.series`` spells them. Ray forgets a gauge
    that was not set for two export intervals, so each is set again every second as long as this object lives: keep it
    for as long as its gauges should be seen.
    """

    def __init__(self) -> None:
        self._gauges: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RayMeters, ()

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Add ``value`` to a counter; nothing happens for 0.

        Raises:
            ValueError: the metric is of another kind, the labels are not exactly its own, or the value is negative.
        """
        check(metric, "counter", labels)
        if value:  # Ray refuses to add 0
            _counter(metric).inc(float(value), labels)

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Set a gauge to ``value`` and keep it there.

        Raises:
            ValueError: the metric is of another kind, or the labels are not exactly its own.
        """
        check(metric, "gauge", labels)
        with self._lock:
            first = not self._gauges
            self._gauges[metric, frozenset(labels.items())] = float(value)
            _gauge(metric).set(float(value), labels)
        if first:
            threading.Thread(target=_keep, args=(weakref.ref(self),), name="reclora-gauges", daemon=True).start()

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Put ``value`` into a histogram.

        Raises:
            ValueError: the metric is of another kind, or the labels are not exactly its own.
        """
        check(metric, "histogram", labels)
        _histogram(metric).observe(float(value), labels)

    def refresh(self) -> None:
        """Set every gauge to its last value again."""
        with self._lock:  # so that an old value never follows a new one
            for (metric, labels), value in self._gauges.items():
                _gauge(metric).set(value, dict(labels))


def _keep(reference: "weakref.ref[RayMeters]") -> None:
    """Refresh the gauges until their meters are gone."""
    while (meters := reference()) is not None:
        meters.refresh()
        del meters
        time.sleep(_REFRESH_S)


# One Ray metric per name and process: a second one of the same name would start its count anew.
@cache
def _counter(metric: Metric) -> metrics.Counter:
    return metrics.Counter(metric.name, metric.help, metric.labels)


@cache
def _gauge(metric: Metric) -> metrics.Gauge:
    return metrics.Gauge(metric.name, metric.help, metric.labels)


@cache
def _histogram(metric: Metric) -> metrics.Histogram:
    return metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
