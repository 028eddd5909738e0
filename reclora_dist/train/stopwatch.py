"""Seconds that a device spends on a part of every step."""

import time
from types import TracebackType

import torch


class Stopwatch:
    """Sums the time of its ``with`` blocks. On a GPU the time of the work they queue, not of queueing it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = [] if device.type == "cuda" else None
        self._seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._events is not None:
            self._events.append((_event(), torch.cuda.Event(enable_timing=True)))
        self._since = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events:
            self._events[-1][1].record()
        self._seconds += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """The sum; read it when the device has done the work, else it waits."""
        if not self._events:
            return self._seconds
        self._events[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._events)) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
