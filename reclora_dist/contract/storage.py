"""A folder on any file system that fsspec opens: local paths, s3://, gs://, hdfs://."""

import errno
import os
import posixpath
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""How long storage that failed is left alone before it is tried again: twice as long each time, up to a bound."""

WRITTEN_IN_PLACE = ("hdfs",)
"""Remote file systems that show a file while it is written, and can rename it."""


class StorageFullError(ValueError):
    """A file could not be written because its disk, or its owner's share of it, is full; the old one is whole."""


@dataclass(frozen=True)
class Folder:
    """One folder, addressed by a URI; every path given to its methods is relative to it and uses ``/``."""

    uri: str

    @property
    def fs(self) -> Any:
        """The fsspec file system that holds the folder."""
        return fsspec.core.url_to_fs(self.uri)[0]

    def path(self, name: str = "") -> str:
        """Absolute path of ``name`` as the folder's file system spells it."""
        root: str = fsspec.core.url_to_fs(self.uri)[1]
        return posixpath.join(root, name) if name else root

    def absolute(self) -> "Folder":
        """The same folder for a process with another working directory, as executors have."""
        return self if "://" in self.uri else Folder(os.path.abspath(self.uri))

    def child(self, name: str) -> "Folder":
        """The sub-folder ``name``."""
        return Folder(posixpath.join(self.uri, name))

    def resolve(self, uri: str) -> "Folder":
        """The folder that ``uri`` names; one that starts with a dot is relative to this folder."""
        if not uri.startswith("."):
            return Folder(uri)
        scheme, separator, path = self.uri.rpartition("://")
        return Folder(scheme + separator + posixpath.normpath(posixpath.join(path, uri)))

    def relative(self, other: "Folder") -> str:
        """How ``resolve`` finds ``other`` from here: by a relative path, if both are on one file system."""
        here, there = self.uri.rpartition("://"), other.uri.rpartition("://")
        if here[0] != there[0]:
            return other.uri
        path = posixpath.relpath(there[2], here[2])
        return path if path.startswith(".") else f"./{path}"

    def holds(self, other: "Folder") -> bool:
        """Whether ``other`` is this folder or lies below it."""
        return type(self.fs) is type(other.fs) and other._real().startswith(self._real())

    def _real(self) -> str:
        """The path without symbolic links, ending in a slash."""
        path = self.path()
        return (os.path.realpath(path) if isinstance(self.fs, LocalFileSystem) else path).rstrip("/") + "/"

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        return bool(self.fs.exists(self.path(name)))

    def open(self, name: str) -> IO[bytes]:
        """Open ``name`` for reading bytes."""
        return cast(IO[bytes], self.fs.open(self.path(name), "rb"))

    def read(self, name: str) -> bytes:
        """All bytes of ``name``."""
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write ``name`` so that a reader sees the old file or the new one, never half of one.

        HDFS cannot replace a file: for a moment there is none, if there was one.

        Raises:
            StorageFullError: there is no room for it.
        """
        target = self.path(name)
        try:
            self._publish(target, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFullError(
                f"no space left on device writing {target!r}: free space or choose another folder"
            ) from error

    def _publish(self, target: str, content: bytes) -> None:
        fs = self.fs
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        local = isinstance(fs, LocalFileSystem)
        if not local and fs.protocol not in WRITTEN_IN_PLACE:
            fs.pipe_file(target, content)  # object stores publish an object when it is complete
            return
        partial = f"{target}.{uuid.uuid4().hex[:8]}.partial"
        try:
            if local:
                _write_synced(partial, content)
                os.replace(partial, target)
            else:
                fs.pipe_file(partial, content)
                fs.mv(partial, target)
        except OSError:
            if fs.exists(partial):
                fs.rm_file(partial)  # what is left of it would keep a full disk full
            raise

    def files(self, name: str = "") -> list[str]:
        """All files below ``name``, sorted, relative to the folder; empty where there is none."""
        root = self.path()
        found = self.fs.find(self.path(name)) if self.fs.exists(self.path(name)) else []
        return sorted(posixpath.relpath(file, root) for file in found)

    def delete(self, name: str) -> None:
        """Remove the file ``name``; nothing happens where it is not there."""
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def local(self) -> Path:
        """The folder as a local path.

        Raises:
            ValueError: the folder is on a remote file system.
        """
        if not isinstance(self.fs, LocalFileSystem):
            raise ValueError(f"{self.uri!r} is not a local folder; copy it to a local disk first")
        return Path(self.path())


def patiently(action: Callable[[], T], patience: float, say: Callable[[str], None]) -> T:
    """What ``action`` returns; it is tried again for ``patience`` seconds while the storage fails.

    Args:
        say: takes a line about each failure that is followed by another try.

    Raises:
        OSError, StorageFullError: the last failure.
    """
    deadline, wait = monotonic() + patience, FIRST_WAIT_S
    while True:
        try:
            return action()
        except (OSError, StorageFullError) as error:
            if monotonic() + wait > deadline:
                raise
            say(f"{error}; trying again in {wait:.0f} s")
        sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def _write_synced(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
