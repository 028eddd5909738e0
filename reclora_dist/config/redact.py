"""Settings without their secrets, for what a run writes down and prints."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "*********(redacted)"
_RULE = r"(?:secret|password|token|access.?key)"  # what Spark masks on its pages and in its event logs
_KEY = re.compile(_RULE, re.IGNORECASE)
_PROPERTY = re.compile(
    rf"""(spark\.[\w.-]*{_RULE}[\w.-]*["']?\s*[:=]\s*)("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,}}]*)""", re.IGNORECASE
)
_USERINFO = re.compile(r"\b(?!(?:abfs|wasb)s?://)([a-z][\w+.-]*://)[^/\s]*@", re.IGNORECASE)  # Azure: a container


def redacted(settings: Any) -> Any:
    """Nested settings with the texts masked whose key Spark would mask, and other texts as ``redacted_text``."""
    if isinstance(settings, Mapping):
        return {
            key: MASK if isinstance(value, str) and _KEY.search(str(key)) else redacted(value)
            for key, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    return redacted_text(settings) if isinstance(settings, str) else settings


def redacted_text(text: str) -> str:
    """A setting's or an argument's text without the values of secret Spark properties and without URIs' userinfo."""
    return _USERINFO.sub(r"\1", _PROPERTY.sub(rf"\1{MASK}", text))
