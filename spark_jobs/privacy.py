"""Whom a log is kept from: the key that hides user ids, and the users to leave out. It is asked before Spark starts."""

import csv
import hmac
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reclora_dist.config.schema import PrivacyConfig
from reclora_dist.contract.storage import Folder

KEY_VARIABLE = "RECLORA_USER_KEY"
SHORTEST_KEY = 16
"""Bytes: a shorter key can be found by trying."""

HASH_LENGTH = 32
"""Hexadecimal digits of a hashed id."""


@dataclass(frozen=True)
class Privacy:
    """Secrets of a build, which no text of this object shows.

    Attributes:
        key: what user ids are hashed with; empty: they stay as they are.
        deleted: raw ids of the users to leave out; None: nobody was asked to be.
    """

    key: bytes = field(default=b"", repr=False)
    deleted: frozenset[str] | None = field(default=None, repr=False)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self.key) or self.deleted is not None

    @property
    def mark(self) -> str:
        """What tells one key from another without telling the key; the same from day to day. Empty: there is no key."""
        return hmac.digest(self.key, b"reclora user key", "sha256").hex() if self.key else ""

    def fingerprint(self, log: str) -> str:
        """What the fingerprint ``log`` of a raw log becomes: another key or another list gives another one.

        It is one digest of all three, for a digest of a short list alone would tell who tries ids whom it names.
        """
        if not self.wanted:
            return log
        digest = hmac.new(self.key, log.encode(), "sha256")
        digest.update(b"\0none" if self.deleted is None else "\0".join(["", *sorted(self.deleted)]).encode())
        return digest.hexdigest()


def hashed(key: bytes, user: str) -> str:
    """The id under which the user ``user`` of a log appears."""
    return hmac.digest(key, user.encode(), "sha256").hex()[:HASH_LENGTH]


def read_privacy(config: PrivacyConfig, user_column: str) -> Privacy:
    """Read the key and the delete list that ``config`` asks for.

    Args:
        config: the settings.
        user_column: where a CSV or Parquet delete list has the ids.

    Raises:
        ValueError: there is no key, it is short or would not be used, or the list cannot be read.
    """
    if config.key_file and not config.hash_users:
        raise ValueError("privacy.key_file is set, but ids would stay as they are: set privacy.hash_users=true as well")
    key = _key(config.key_file) if config.hash_users else b""
    return Privacy(key, frozenset(_listed(config.delete, user_column)) if config.delete else None)


def _key(file: str) -> bytes:
    """The key without surrounding white space. No message names it, or the file: it may be the key by mistake."""
    if not file and KEY_VARIABLE not in os.environ:
        raise ValueError(f"privacy.hash_users needs a key: name its file in privacy.key_file, or set {KEY_VARIABLE}")
    source = "the file named in privacy.key_file" if file else KEY_VARIABLE
    key = (_read_key(file) if file else os.environ[KEY_VARIABLE].encode()).strip()
    if len(key) < SHORTEST_KEY:
        raise ValueError(
            f"the key from {source} has {len(key)} bytes, which can be guessed; take at least {SHORTEST_KEY}, "
            "e.g. of `openssl rand -hex 32`"
        )
    return key


def _read_key(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise ValueError(f"privacy.key_file cannot be read ({reason}): name a local file that holds the key") from None


def _listed(file: str, user_column: str) -> Iterable[str]:
    source = f"privacy.delete = {file!r}"
    try:
        content = Folder(file).read("")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{source} cannot be read ({reason}): name a file that is there") from error
    if file.endswith(".parquet"):
        return _of_parquet(content, source, user_column)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text: give one id per line, CSV, or a file named *.parquet") from error
    ids = _of_csv(text, source, user_column) if file.endswith(".csv") else text.replace("\r\n", "\n").split("\n")
    return [user.strip(" ") for user in ids if user.strip(" ")]


def _of_csv(text: str, source: str, user_column: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    _require(user_column, rows.fieldnames or (), source)
    return [row[user_column] or "" for row in rows]


def _of_parquet(content: bytes, source: str, user_column: str) -> list[str]:
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source} cannot be read as Parquet ({str(error).splitlines()[0]}): replace it") from error
    _require(user_column, table.column_names, source)
    if pa.types.is_floating(table[user_column].type):
        raise ValueError(f"{source} has ids of type {table[user_column].type}: write them as text or integers")
    ids: list[str | None] = table[user_column].cast(pa.string()).to_pylist()
    return [user.strip(" ") for user in ids if user and user.strip(" ")]


def _require(user_column: str, there: Iterable[str], source: str) -> None:
    if user_column not in there:
        raise ValueError(
            f"{source} has no column {user_column!r}; there are: {', '.join(there)}. "
            "Name the column of ids as source.user is, or give plain text, one id per line"
        )
