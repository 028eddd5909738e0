"""Work that is done ahead of its use, by one thread."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

T = TypeVar("T")
_END: Final[Any] = object()


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items, up to ``depth`` of them made by a thread before they are asked for; 0 makes them when asked.

    An error of ``items`` is raised here, in its place. The thread ends, and ``items`` is closed, when this generator is
    exhausted or closed.
    """
    if depth == 0:
        yield from items
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = deque(pool.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, items, _END))
                yield item
        finally:
            for future in pending:
                future.cancel()
            pool.submit(items.close)
