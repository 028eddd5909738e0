"""Samples to prompts: text for people, token ids for models, both from the same pieces, each tokenised once.

Spacing. A prompt is its parts in order: profile, history line, events (oldest first), question, answer. A part that
does not start with white space gets one space before it, the first part of a prompt loses any, trailing spaces are
dropped: templates join however they are written. Inside a part the white space before a ``{field}`` belongs to the
field's piece, which looks like ``" Heat (1995)"``, as BPE and SentencePiece vocabularies spell words inside a sentence.
Ratings are few, so they are tokenised together with the words around them. Tokenizers that put a space before whatever
they get (LLaMA's legacy SentencePiece) are recognised by a probe, and their pieces come without the leading space; a
piece that follows a character other than a space then gains one, which such a tokenizer cannot avoid. Special tokens
spelled out in a title stay plain text.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reclora_dist.config.schema import PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "unknown"
"""Word for a profile value that the log does not give (position 0)."""

UNTITLED = "untitled"
"""Word for an item without a title."""

Part: TypeAlias = tuple[tuple[str, str], ...]
"""A parsed template: (words, "") for words, (white space before it, name) for a field."""


class PromptBuilder:
    """Words samples; remembers the tokens of every piece it has met."""

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: "PreTrainedTokenizerBase",
        titles: Sequence[str],
        rating_levels: Sequence[float],
        user_fields: Mapping[str, Sequence[Any]],
        causal: bool,
    ) -> None:
        """Check the templates and look at the tokenizer; titles are tokenised when they are first needed.

        Args:
            config: the templates.
            tokenizer: any tokenizer of transformers.
            titles: titles by item position; entry 0 is not used.
            rating_levels: rating values by level, from level 1 (``rating_levels`` of the events manifest).
            user_fields: values of each user field by position, from 1 (``user_fields`` of the events manifest).
            causal: end with ``config.answer`` (decoder) or with the closing special token (encoder).

        Raises:
            ValueError: a template names an unknown field or lacks ``{title}``, or ``max_tokens`` does not fit.
        """
        self._tokenizer = tokenizer
        self._titles = [" ".join(title.split()) or UNTITLED for title in titles]
        self._prepared = np.zeros(len(self._titles), dtype=bool)
        self._fields = {name: [UNKNOWN, *map(str, values)] for name, values in user_fields.items()}
        self._profile = parse("profile", config.profile, self._fields)
        self._history = _words(parse("history", config.history))
        self._events = [
            parse("event", config.event, ["title"], {"rating": format_rating(value)}, required="title")
            for value in rating_levels
        ]
        self._question = parse("question", config.question, ["title"], required="title")
        self._answer = _words(parse("answer", config.answer)) if causal else []
        self._prefix, self._suffix = special_tokens(tokenizer, causal)
        self._drop_space = adds_space(tokenizer)
        self._known: dict[str, list[int]] = {}
        self._room = self._checked_room(config.max_tokens)
        self.pad: int = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def tokens(self, user_fields: Sequence[int], items: Sequence[int], levels: Sequence[int], target: int) -> list[int]:
        """Token ids of a prompt, special tokens included, at most ``max_tokens``.

        A longer prompt loses its oldest events, then its profile, at last the end of the target's title; never the
        question. Without events the history line is left out.

        Args:
            user_fields: positions of the user's field values, in the order of ``user_fields`` above.
            items: history items, oldest first, without padding.
            levels: their rating levels.
            target: the item asked about.

        Raises:
            ValueError: a position or a level is outside its table.
        """
        ids = map(self._ids, self._pieces(user_fields, items, levels, target))
        return [*self._prefix, *chain.from_iterable(ids), *self._suffix]

    def text(self, user_fields: Sequence[int], items: Sequence[int], levels: Sequence[int], target: int) -> str:
        """The same prompt as a string, cut at the same place, without special tokens; arguments as ``tokens``.

        Raises:
            ValueError: a position or a level is outside its table.
        """
        return "".join(self._pieces(user_fields, items, levels, target))

    def prepare(self, items: NDArray[np.int64]) -> None:
        """Tokenise the titles of ``items`` in one call, where they are not known yet; position 0 is skipped.

        Raises:
            ValueError: an item is outside the title table.
        """
        if items.size and not 0 <= items.min() <= items.max() < len(self._titles):
            raise ValueError(_outside("item", int(items.min() if items.min() < 0 else items.max()), len(self._titles)))
        fresh = np.unique(items[~self._prepared[items]])
        fresh = fresh[fresh > 0]
        spaces = {space for part in (*self._events, self._question) for space, field in part if field}
        self._learn([space + self._titles[item] for item in fresh for space in spaces])
        self._prepared[fresh] = True

    def _pieces(
        self, user_fields: Sequence[int], items: Sequence[int], levels: Sequence[int], target: int
    ) -> list[str]:
        """The pieces of the prompt that fit."""
        profile = self._profile_pieces(user_fields)
        tail = self._tail(self._title(target))
        events = [self._event_pieces(item, level) for item, level in zip(items, levels, strict=True)]
        lead = [*profile, *self._history]
        oldest = self._oldest(events, self._size([*lead, *tail]))
        for start in range(max(oldest - 1, 0), len(events)):  # without its first space the prompt may be shorter
            pieces = _joined(lead, *events[start:], tail)
            if self._size(pieces) <= self._room:
                return pieces
        for pieces in (_joined(profile, tail), _joined(tail)):
            if self._size(pieces) <= self._room:
                return pieces
        return self._cut(self._title(target))

    def _oldest(self, events: Sequence[Sequence[str]], taken: int) -> int:
        """The oldest event that fits beside ``taken`` tokens."""
        room = self._room - taken
        for start in range(len(events), 0, -1):
            room -= self._size(events[start - 1])
            if room < 0:
                return start
        return 0

    def _cut(self, title: str) -> list[str]:
        """The question with so much of the title as fits."""
        while self._size(_joined(self._tail(title))) > self._room:
            title = title[: len(title) * 7 // 8].rstrip()
        return _joined(self._tail(title))

    def _tail(self, title: str) -> list[str]:
        return [*_filled(self._question, {"title": title}), *self._answer]

    def _event_pieces(self, item: int, level: int) -> list[str]:
        if not 0 < level <= len(self._events):
            raise ValueError(_outside("rating level", level, len(self._events) + 1))
        return _filled(self._events[level - 1], {"title": self._title(item)})

    def _title(self, item: int) -> str:
        if not 0 < item < len(self._titles):
            raise ValueError(_outside("item", item, len(self._titles)))
        return self._titles[item]

    def _profile_pieces(self, positions: Sequence[int]) -> list[str]:
        if not self._profile:
            return []
        if len(positions) != len(self._fields):
            raise ValueError(
                f"a user has {len(positions)} field values, the events have the fields {list(self._fields)}: "
                "rebuild the shards from these events"
            )
        values = {}
        for (name, words), position in zip(self._fields.items(), positions, strict=True):
            if not 0 <= position < len(words):
                raise ValueError(_outside(f"value of user field {name!r}", position, len(words)))
            values[name] = words[position]
        return _filled(self._profile, values)

    def _size(self, pieces: Iterable[str]) -> int:
        return sum(len(self._ids(piece)) for piece in pieces)

    def _ids(self, piece: str) -> list[int]:
        ids = self._known.get(piece)
        if ids is None:
            self._learn([piece])
            ids = self._known[piece]
        return ids

    def _learn(self, pieces: Sequence[str]) -> None:
        """Tokenise pieces in one call and remember them."""
        if pieces:
            texts = [piece[1:] if self._drop_space and piece.startswith(" ") else piece for piece in pieces]
            self._known.update(zip(pieces, encode(self._tokenizer, texts), strict=True))

    def _checked_room(self, max_tokens: int) -> int:
        """Tokens of a prompt beside the special ones."""
        longest = self._tokenizer.model_max_length
        if max_tokens > longest:
            raise ValueError(f"prompt.max_tokens {max_tokens} is more than the model's {longest}: lower it")
        room = max_tokens - len(self._prefix) - len(self._suffix)
        least = self._size(_joined(self._tail("")))
        if room < least:
            raise ValueError(
                f"prompt.max_tokens {max_tokens} does not hold the question and the answer line, which take "
                f"{max_tokens - room + least} tokens without a title: raise it or shorten the templates"
            )
        return room


def parse(
    name: str,
    template: str,
    fields: Iterable[str] = (),
    constants: Mapping[str, str] | None = None,
    required: str = "",
) -> Part:
    """Split a template around its fields (see the module's text on spacing).

    Args:
        name: name of the setting, for messages.
        template: words with ``{field}``; ``{{`` and ``}}`` are braces.
        fields: fields that stay open.
        constants: fields that are filled in here.
        required: a field that has to be there.

    Raises:
        ValueError: braces do not match, or a field is unknown, formatted, or missing.
    """
    open_fields, known = set(fields), dict(constants or {})
    words, part = "", list[tuple[str, str]]()
    for literal, field, spec, conversion in _scanned(name, template):
        words += literal
        if field is None:
            continue
        if spec or conversion or field not in open_fields | known.keys():
            raise ValueError(_unknown(name, template, field, sorted(open_fields | known.keys())))
        if field in known:
            words += known[field]
            continue
        stem = words.rstrip()
        part += [(stem, "")] * bool(stem) + [(words[len(stem) :], field)]
        words = ""
    words = words.rstrip(" ")
    part += [(words, "")] * bool(words)
    if required and all(field != required for _, field in part):
        raise ValueError(f"prompt.{name} {template!r} lacks {{{required}}}: say where it goes")
    return tuple(part)


def _scanned(name: str, template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    if not template.strip():
        return []
    try:
        return list(Formatter().parse(template if template[0].isspace() else f" {template}"))
    except ValueError as error:
        raise ValueError(f"prompt.{name} {template!r}: {error}; write {{{{ and }}}} for plain braces") from error


def _unknown(name: str, template: str, field: str, known: Sequence[str]) -> str:
    choice = ", ".join(f"{{{one}}}" for one in known) or "no field"
    return f"prompt.{name} {template!r} has the field {{{field}}}; it may have {choice}, without format or conversion"


def _outside(what: str, position: int, size: int) -> str:
    return f"{what} {position} is not in its table of {size} positions: shards and events do not belong together"


def _words(part: Part) -> list[str]:
    return [words for words, _ in part]


def _filled(part: Part, values: Mapping[str, str]) -> list[str]:
    return [words + values[field] if field else words for words, field in part]


def _joined(*parts: Iterable[str]) -> list[str]:
    """One list of pieces; the first loses its leading white space."""
    pieces = list(chain.from_iterable(parts))
    return [pieces[0].lstrip(), *pieces[1:]] if pieces else pieces


def format_rating(value: float) -> str:
    """A rating as people write it: ``4``, ``4.5``."""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens; a special token spelled out in a text is text."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def special_tokens(tokenizer: "PreTrainedTokenizerBase", causal: bool) -> tuple[list[int], list[int]]:
    """What a prompt starts and ends with: as the tokenizer has it, but a decoder's prompt stays open at its end.

    A decoder whose tokenizer puts nothing in front gets the beginning-of-sequence token, if there is one.

    Raises:
        ValueError: the tokenizer changes a text when it adds special tokens.
    """
    bare, full = encode(tokenizer, ["x"])[0], list(tokenizer("x")["input_ids"])
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not starts:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} spells 'x' {bare} alone and {full} with special tokens")
    prefix, suffix = full[: starts[0]], full[starts[0] + len(bare) :]
    if not causal:
        return prefix, suffix
    if not prefix and tokenizer.bos_token_id is not None:
        prefix = [int(tokenizer.bos_token_id)]
    return prefix, []


def adds_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a space before every text, so that a piece must come without its own."""
    first, spaced, bare, whole = encode(tokenizer, ["x", " y", "y", "x y"])
    return first + spaced != whole and first + bare == whole
