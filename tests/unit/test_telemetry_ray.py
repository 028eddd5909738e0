"""``RayMeters`` without a cluster."""

import copy
import gc
import threading
import time

import pytest

from reclora_dist.ray_app import meters as ray_meters
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.telemetry import names
from reclora_dist.telemetry.names import Metric


class Gauge:
    """Stands where Ray's gauge is and remembers what it was set to."""

    def __init__(self) -> None:
        self.set_to: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.set_to.append((value, tags))


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> Gauge:
    gauge = Gauge()

    def only(_: Metric) -> Gauge:
        return gauge

    monkeypatch.setattr(ray_meters, "_gauge", only)
    monkeypatch.setattr(ray_meters, "_REFRESH_S", 0.01)
    return gauge


def test_a_gauge_is_set_again_and_again_to_its_last_value(gauge: Gauge) -> None:
    meters = RayMeters()
    meters.set(names.TRAIN_LOSS, 2, stage="crm")
    meters.set(names.TRAIN_LOSS, 1, stage="crm")
    deadline = time.monotonic() + 5
    last = (1.0, {"stage": "crm"})
    while gauge.set_to.count(last) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert gauge.set_to[-1] == last
    assert gauge.set_to.count(last) >= 3


def test_refreshing_ends_with_the_meters(gauge: Gauge) -> None:
    meters = RayMeters()
    meters.set(names.TRAIN_LOSS, 1, stage="crm")
    keepers = [thread for thread in threading.enumerate() if thread.name == "reclora-gauges"]
    del meters
    gc.collect()
    for thread in keepers:
        thread.join(5)
        assert not thread.is_alive()


def test_wrong_samples_are_refused_before_ray_sees_them(gauge: Gauge) -> None:
    with pytest.raises(ValueError, match=r"takes the labels \['stage'\], not \['model'\]"):
        RayMeters().set(names.TRAIN_LOSS, 1, model="m")
    with pytest.raises(ValueError, match=r"is a gauge, not a counter; use set\(\)"):
        RayMeters().add(names.TRAIN_LOSS, 1, stage="crm")
    assert not gauge.set_to


def test_meters_travel_to_workers() -> None:
    meters = RayMeters()
    meters._gauges[names.TRAIN_LOSS, frozenset()] = 1.0
    assert copy.copy(meters)._gauges == {}  # copied as pickle does
    assert isinstance(copy.copy(RayMeters()), RayMeters)
