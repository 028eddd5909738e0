"""The manifest of a dataset folder: what it holds, what made it, and the digests that prove it.

A stage writes its files under names that carry their content's digest and ``manifest.json`` last: the manifest is the
commit. A stage that dies before it leaves the old manifest and the old files. The next commit removes the files of the
old manifest and what was left half done; files that are not ours stay.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reclora_dist.contract.storage import Folder

MANIFEST = "manifest.json"

_OURS = re.compile(r"(-[0-9a-f]{12}\.\w+|\.partial)$")
"""The end of the names that writers give: the content's digest, or that the file is half written."""


class ContractError(ValueError):
    """A dataset is missing, of another version, or damaged; the text names it and the remedy."""


@dataclass(frozen=True)
class Format:
    """Name and version of a dataset format; a reader takes exactly this pair."""

    name: str
    version: int


@dataclass(frozen=True)
class FileEntry:
    """One file of a dataset: path relative to its folder, rows per row group (empty if not Parquet), size, SHA-256."""

    path: str
    row_groups: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds and what it was made from."""

    format: str
    version: int
    config_digest: str
    parents: Mapping[str, str]
    files: tuple[FileEntry, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content_digest(self) -> str:
        """Digest of the files' contents and the facts; equal contents give equal digests whatever made them."""
        files = sorted((entry.path, entry.sha256) for entry in self.files)
        return digest([self.format, self.version, files, self.facts])

    def part_digest(self, prefix: str) -> str:
        """Digest of the contents of the files whose path starts with ``prefix``: of what reads only these."""
        return digest([self.format, self.version, [(entry.path, entry.sha256) for entry in self.select(prefix)]])

    def select(self, prefix: str) -> tuple[FileEntry, ...]:
        """The files whose path starts with ``prefix``, in path order."""
        return tuple(sorted((f for f in self.files if f.path.startswith(prefix)), key=lambda f: f.path))

    def rows(self, prefix: str = "") -> int:
        """Rows in the files whose path starts with ``prefix``."""
        return sum(entry.rows for entry in self.select(prefix))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON; dataclasses count as the mapping of their fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot take a digest of {type(value).__name__}: {value!r}")


def read_manifest(folder: Folder, expected: Format) -> Manifest:
    """Read the manifest of ``folder``.

    Raises:
        ContractError: there is none, it cannot be parsed, or it is of another format, version or digest.
    """
    if not folder.exists(MANIFEST):
        raise ContractError(
            f"{folder.uri!r} has no {MANIFEST}: the stage that writes {expected.name!r} has not completed there. "
            "Run it, or point the path at a finished dataset."
        )
    raw = _parse(folder)
    found = (raw.get("format"), raw.get("version"))
    if found != (expected.name, expected.version):
        raise ContractError(
            f"{folder.uri!r} holds format {found[0]!r} version {found[1]!r}, but this release reads "
            f"{expected.name!r} version {expected.version}. Rebuild it with this release."
        )
    manifest = _build(folder, raw)
    if manifest.content_digest != raw.get("content_digest"):
        raise ContractError(
            f"{folder.uri!r}: the manifest's content digest {raw.get('content_digest')!r} does not match its entries "
            f"({manifest.content_digest!r}); it was edited or damaged. Rebuild the dataset."
        )
    return manifest


def _build(folder: Folder, raw: Mapping[str, Any]) -> Manifest:
    try:
        files = tuple(FileEntry(f["path"], tuple(f["row_groups"]), f["bytes"], f["sha256"]) for f in raw["files"])
        return Manifest(raw["format"], raw["version"], raw["config_digest"], raw["parents"], files, raw["facts"])
    except (KeyError, TypeError) as error:
        raise ContractError(f"{folder.uri!r}: {MANIFEST} lacks or garbles {error}. Rebuild the dataset.") from error


def _parse(folder: Folder) -> dict[str, Any]:
    try:
        raw = json.loads(folder.read(MANIFEST))
    except ValueError as error:
        raise ContractError(f"{folder.uri!r}: {MANIFEST} is not JSON ({error}). Rebuild the dataset.") from error
    if not isinstance(raw, dict):
        raise ContractError(f"{folder.uri!r}: {MANIFEST} is not a JSON object. Rebuild the dataset.")
    return raw


def commit(folder: Folder, manifest: Manifest, fixed: Collection[str] = ()) -> Manifest:
    """Publish ``manifest`` in ``folder``, then remove the files of ours that it does not name.

    Ours are the files of the manifest before, those that end as only our writers have them end, and those in ``fixed``.
    """
    before = _named(folder)
    record = {**dataclasses.asdict(manifest), "content_digest": manifest.content_digest}
    folder.write(MANIFEST, json.dumps(record, indent=1).encode() + b"\n")
    keep = {entry.path for entry in manifest.files} | {MANIFEST}
    for name in folder.files():
        if name not in keep and (name in before or name in fixed or _OURS.search(name)):
            folder.delete(name)
    return manifest


def _named(folder: Folder) -> set[str]:
    """The files that the folder's manifest names; none where it is missing, damaged or not ours."""
    try:
        return {entry.path for entry in _build(folder, _parse(folder)).files} if folder.exists(MANIFEST) else set()
    except ContractError:
        return set()


def check_output(folder: Folder, expected: Format, inputs: Mapping[str, Folder], fixed: Collection[str] = ()) -> None:
    """Refuse a folder as the place of an output that would mix with an input or with what is not ours.

    Args:
        folder: where a dataset of the format ``expected`` is to be written.
        inputs: what is read for it, by the name to call it by.
        fixed: files of such a dataset whose names carry no digest.

    Raises:
        ContractError: it is, holds or lies in an input; or it holds a foreign file and no dataset of that format.
    """
    for name, source in inputs.items():
        if folder.holds(source) or source.holds(folder):
            raise ContractError(
                f"the output {folder.uri!r} and the input {source.uri!r} ({name}) lie in one another: choose an output "
                "folder beside the input."
            )
    made = _format(folder)
    if made == expected.name:
        return
    known = {*fixed, *([] if made else [MANIFEST])}
    foreign = next((name for name in folder.files() if name not in known and not _OURS.search(name)), None)
    if foreign:
        raise ContractError(
            f"the output {folder.uri!r} holds {foreign!r}, which no writer of {expected.name!r} left there: choose an "
            "empty folder, or move away what is in this one."
        )


def _format(folder: Folder) -> str:
    """The format that the folder's manifest names; empty where there is none that can be read."""
    try:
        return str(_parse(folder).get("format")) if folder.exists(MANIFEST) else ""
    except ContractError:
        return ""


def is_current(folder: Folder, expected: Format, config_digest: str, parents: Mapping[str, str]) -> bool:
    """Whether ``folder`` already holds the output of this configuration and these parents."""
    try:
        manifest = read_manifest(folder, expected)
    except ContractError:
        return False
    return manifest.config_digest == config_digest and dict(manifest.parents) == dict(parents)


def file_entry(path: str, content: bytes, row_groups: Iterable[int] = ()) -> FileEntry:
    """Describe a file whose bytes are ``content``."""
    return FileEntry(path, tuple(row_groups), len(content), hashlib.sha256(content).hexdigest())


def add_file(folder: Folder, path: str, content: bytes, row_groups: Iterable[int] = ()) -> FileEntry:
    """Write ``content`` at ``path`` and describe it."""
    folder.write(path, content)
    return file_entry(path, content, row_groups)


def add_digested(folder: Folder, name: str, content: bytes, row_groups: Iterable[int] = ()) -> FileEntry:
    """Write ``stem.suffix`` as ``stem-{digest}.suffix``, so that no file of an older manifest is overwritten."""
    plain, (stem, dot, suffix) = file_entry(name, content, row_groups), name.rpartition(".")
    entry = dataclasses.replace(plain, path=f"{stem}-{plain.sha256[:12]}{dot}{suffix}")
    folder.write(entry.path, content)
    return entry


def digested(folder: Folder, manifest: Manifest, name: str) -> FileEntry:
    """The one file that ``add_digested`` wrote for ``stem.suffix``.

    Raises:
        ContractError: the dataset has none, or several.
    """
    stem, dot, suffix = name.rpartition(".")
    entries = [entry for entry in manifest.select(f"{stem}-") if entry.path.endswith(dot + suffix)]
    if len(entries) != 1:
        raise ContractError(
            f"{folder.uri!r} names {len(entries)} files {stem}-*{dot}{suffix}, not one. "
            "Run the stage that writes it again."
        )
    return entries[0]


def verified(folder: Folder, entry: FileEntry) -> bytes:
    """The bytes of a file, checked against its manifest entry.

    Raises:
        ContractError: the file is missing, shorter, longer, or has another digest.
    """
    if not folder.exists(entry.path):
        raise ContractError(f"{folder.uri!r}: {entry.path!r} is named in {MANIFEST} but missing. Rebuild the dataset.")
    content = folder.read(entry.path)
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} has SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…: "
            "its bytes changed after it was written. Rebuild the dataset or restore the file."
        )
    return content
