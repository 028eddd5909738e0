"""Plain mappings to the dataclasses of ``config.schema``, with errors that name the key, the value and the remedy."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; every problem is a line of the text."""


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Fill the dataclass ``cls`` from a mapping.

    Raises:
        ConfigError: an unknown key (with the closest known one), a missing key, or a value of the wrong type.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, problem) for problem in error.errors())) from None


def _explain(cls: type, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] != "unexpected_keyword_argument":
        return f"config {key} = {problem['input']!r}: {problem['msg'].lower()}"
    known = _fields_at(cls, path[:-1])
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {'.'.join([*path[:-1], close[0]])!r}?" if close else f"known keys: {', '.join(known)}"
    return f"config {key} = {problem['input']!r}: no such key; {hint}"


def _fields_at(cls: type, path: list[str]) -> list[str]:
    """Field names of the dataclass that lies at ``path`` below ``cls``; union and mapping types are looked through."""
    found = [cls]
    for part in path:
        hints = [typing.get_type_hints(c) for c in found if dataclasses.is_dataclass(c)]
        steps = [c for h in hints if part in h for c in _classes(h[part])]
        found = steps or found  # a mapping's key, or pydantic's name for a union member, is no field
    return [f.name for c in found if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)]


def _classes(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (typing.Union, dict):
        return [c for argument in typing.get_args(hint) for c in _classes(argument)]
    return []


def override(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply ``dotted.key=value`` settings to a nested mapping; values are read as YAML.

    Raises:
        ConfigError: a setting has no ``=``.
    """
    result = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise ConfigError(f"setting {setting!r}: write it as dotted.key=value")
        *parents, last = key.split(".")
        place = result
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = _value(text)
    return result


def _value(text: str) -> Any:
    """A setting's value: nothing is the empty text, what is no YAML (such as a template with braces) is itself."""
    import yaml

    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
