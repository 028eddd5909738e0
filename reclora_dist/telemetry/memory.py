"""Peak memory of this process and all its descendants: workers, JVMs, servers."""

import threading
from types import TracebackType

import psutil

INTERVAL_S = 1.0


class PeakMemory:
    """Samples the process tree while its block runs; ``mib`` is the largest sum seen.

    Pages that processes share are divided among them (PSS), so a shared object store counts once.
    """

    def __init__(self) -> None:
        self.mib = 0
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
            self.mib = max(self.mib, tree_mib())


def tree_mib() -> int:
    """Memory of this process and its descendants now, in MiB."""
    own = psutil.Process()
    return sum(_pss(process) for process in [own, *own.children(recursive=True)]) >> 20


def _pss(process: psutil.Process) -> int:
    """Proportional set size in bytes; 0 for a process that has just ended."""
    try:
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))
    except psutil.Error:
        return 0
