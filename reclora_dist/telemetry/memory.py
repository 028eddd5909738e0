"""Peak memory of this process and all its descendants: workers, JVMs, servers."""

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import psutil

INTERVAL_S = 1.0
GROWTH = 1.01
"""How much more the resident sizes must be before shared pages are counted again."""


class PeakMemory:
    """Samples the process tree while its block runs; ``mib`` is the largest sum seen.

    Pages that processes share are divided among them (PSS), so a shared object store counts once. To know them the
    kernel goes through all pages, a third of a core for the processes of a pipeline; so they are only counted when the
    resident sizes, which cost nothing, add up to more than ever before.
    """

    def __init__(self) -> None:
        self.mib = 0
        self._resident = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-memory")

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.sample()

    def sample(self) -> None:
        """Look at the processes once."""
        resident = _sum(_rss)
        if resident > GROWTH * self._resident:
            self._resident = resident
            self.mib = max(self.mib, tree_mib())


def tree_mib() -> int:
    """Memory of this process and its descendants now, in MiB."""
    return _sum(_pss) >> 20


def _sum(size: Callable[[psutil.Process], int]) -> int:
    """Of this process and its descendants; 0 for one that has just ended."""
    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            total += size(process)
    return total


def _rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _pss(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", memory.rss))
