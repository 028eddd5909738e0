"""PromptBuilder: pieces give the tokens of the text, prompts fit, templates are checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reclora_dist.config.schema import PromptConfig
from reclora_dist.data.prompts import PromptBuilder, adds_space, format_rating, parse, special_tokens

TITLES = ["", "Heat (1995)", "  Ronin\n(1998) ", "Amélie — le fabuleux destin", "</s> [SEP] {title}", "", "a" * 400]
LEVELS = [1.0, 2.5, 4.0]
FIELDS = {"gender": ["F", "M"], "job": ["doctor", "film critic"]}
PROFILE = "The user is a {job} ({gender})."
MODELS = Path(__file__).parents[3] / "shared" / "models"


def byte_level() -> PreTrainedTokenizerFast:
    """As the tiny backbone's: byte-level BPE, <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["The user rated these items in the past, oldest first: Heat (1995) (4 stars); Will the user like it?"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer)


def legacy_sentencepiece() -> PreTrainedTokenizerFast:
    """As LLaMA 2's: a space is put before every text; no special token by itself."""
    characters = [chr(code) for code in range(33, 0x2100) if chr(code).isprintable() and chr(code) != "▁"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    pad = "<pad>" if tokenizer.token_to_id("<pad>") is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token="<s>", eos_token="</s>")


def pretrained(name: str) -> Any:
    if not (MODELS / name).is_dir():
        pytest.skip(f"{MODELS / name} is not there: this test needs a real tokenizer")
    return AutoTokenizer.from_pretrained(str(MODELS / name))


def builder(tokenizer: Any, causal: bool = True, titles: list[str] = TITLES, **config: Any) -> PromptBuilder:
    return PromptBuilder(PromptConfig(**{"profile": PROFILE} | config), tokenizer, titles, LEVELS, FIELDS, causal)


TOKENIZER = byte_level()

samples = st.integers(0, 12).flatmap(
    lambda n: st.tuples(
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
        st.lists(st.integers(1, 5), min_size=n, max_size=n),
        st.lists(st.integers(1, 3), min_size=n, max_size=n),
        st.integers(1, 6),
    )
)


def test_the_wording() -> None:
    prompts = builder(TOKENIZER)
    assert prompts.text((1, 2), [1, 2], [2, 3], 3) == (
        "The user is a film critic (F). The user rated these items in the past, oldest first: Heat (1995) (2.5 stars); "
        "Ronin (1998) (4 stars); Will the user like Amélie — le fabuleux destin? Answer Yes or No:"
    )
    assert prompts.text((0, 1), [], [], 1) == (
        "The user is a doctor (unknown). Will the user like Heat (1995)? Answer Yes or No:"
    )
    assert builder(TOKENIZER, profile="", causal=False).text((0, 0), [], [], 5) == "Will the user like untitled?"


def test_parts_join_with_one_space_or_as_written() -> None:
    prompts = builder(
        TOKENIZER,
        profile="A {job}. ",
        history="Saw:",
        event="\n- {title}: {rating}",
        question="\nLikes {title}? ",
        answer="",
    )
    assert prompts.text((0, 1), [1, 2], [1, 2], 1) == (
        "A doctor. Saw:\n- Heat (1995): 1\n- Ronin (1998): 2.5\nLikes Heat (1995)?"
    )
    bare = builder(TOKENIZER, profile="", history="", event="{title}={rating}", question="{title}?", answer="{{yes}}:")
    assert bare.text((), [1], [3], 2) == "Heat (1995)=4 Ronin (1998)? {yes}:"


@given(samples)
def test_pieces_give_the_tokens_of_the_whole_text(sample: Any) -> None:
    prompts = builder(TOKENIZER, max_tokens=4000)
    expected = TOKENIZER(prompts.text(*sample), split_special_tokens=True)["input_ids"]
    assert prompts.tokens(*sample) == [1, *expected[-len(prompts.tokens(*sample)) + 1 :]]
    assert TOKENIZER.decode(prompts.tokens(*sample)[1:]) == prompts.text(*sample)


@settings(deadline=None)
@given(samples, st.integers(60, 400), st.booleans())
def test_long_prompts_lose_their_oldest_events(sample: Any, max_tokens: int, causal: bool) -> None:
    fields, items, levels, target = sample
    prompts, free = (builder(TOKENIZER, causal, max_tokens=n) for n in (max_tokens, 10_000))
    tokens, text = prompts.tokens(*sample), prompts.text(*sample)
    assert len(tokens) <= max_tokens
    shorter = [free.tokens(fields, items[n:], levels[n:], target) for n in range(len(items) + 1)]
    fitting = [one for one in shorter if len(one) <= max_tokens]
    if fitting:
        assert tokens == fitting[0]
        assert tokens == shorter[0] or len(shorter[shorter.index(tokens) - 1]) > max_tokens
    assert text.endswith("? Answer Yes or No:" if causal else "?")
    assert "Will the user like" in text
    assert ("oldest first" in text) == ("stars" in text)


def test_a_long_title_is_cut_and_the_question_stays() -> None:
    prompts = builder(TOKENIZER, max_tokens=80)
    text, tokens = prompts.text((1, 1), [1], [1], 6), prompts.tokens((1, 1), [1], [1], 6)
    assert text.startswith("Will the user like aaa") and text.endswith("a? Answer Yes or No:")
    assert 60 < len(tokens) <= 80


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "stories260K"])
def test_real_tokenizers(name: str) -> None:
    tokenizer = pretrained(name)
    prompts = builder(tokenizer, causal=name == "stories260K", titles=TITLES[:4], max_tokens=500)
    sample = ((1, 1), [1, 2, 3], [1, 2, 3], 2)
    tokens, text = prompts.tokens(*sample), prompts.text(*sample)
    if name == "stories260K":
        assert tokens[0] == tokenizer.bos_token_id and tokenizer.decode(tokens[1:]) == text
    else:
        assert tokens == tokenizer(text)["input_ids"]


def test_tokenizers_that_add_a_space_get_pieces_without_one() -> None:
    tokenizer = legacy_sentencepiece()
    assert adds_space(tokenizer) and not adds_space(TOKENIZER)
    prompts = builder(tokenizer, question="Like {title} now?")
    sample = ((2, 1), [1, 2, 3], [1, 2, 3], 1)
    assert prompts.tokens(*sample)[0] == tokenizer.bos_token_id
    expected = tokenizer(prompts.text(*sample).replace("(M)", "( M )"))["input_ids"]  # the space it cannot avoid
    assert prompts.tokens(*sample)[1:] == expected


def test_special_tokens() -> None:
    assert special_tokens(TOKENIZER, causal=True) == ([1], [])
    assert special_tokens(legacy_sentencepiece(), causal=True) == ([1], [])  # it adds none itself, but has one
    assert special_tokens(legacy_sentencepiece(), causal=False) == ([], [])
    bert = pretrained("all-MiniLM-L6-v2")
    assert special_tokens(bert, causal=False) == ([bert.cls_token_id], [bert.sep_token_id])


def test_special_tokens_in_a_title_are_text() -> None:
    tokens = builder(TOKENIZER).tokens((1, 1), [4], [1], 4)
    assert TOKENIZER.eos_token_id not in tokens and tokens.count(TOKENIZER.bos_token_id) == 1


def test_titles_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = builder(TOKENIZER)
    calls: list[list[str]] = []
    real = prompts._learn
    monkeypatch.setattr(prompts, "_learn", lambda pieces: (calls.append(list(pieces)), real(pieces))[1])
    prompts.prepare(np.array([[1, 2, 0], [2, 1, 3]]))
    prompts.prepare(np.array([[3, 1], [2, 0]]))
    assert sorted(piece for call in calls for piece in call) == sorted(
        [" Heat (1995)", " Ronin (1998)", " Amélie — le fabuleux destin"]
    )
    calls.clear()
    first = prompts.tokens((1, 1), [1, 2, 3], [1, 1, 1], 3)
    assert all("Heat" not in piece for call in calls for piece in call)
    calls.clear()
    assert prompts.tokens((1, 1), [1, 2, 3], [1, 1, 1], 3) == first and not calls


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (((1, 1), [7], [1], 1), "item 7 is not in its table of 7"),
        (((1, 1), [0], [1], 1), "item 0"),
        (((1, 1), [1], [4], 1), "rating level 4"),
        (((1, 1), [1], [0], 1), "rating level 0"),
        (((1, 1), [], [], -1), "item -1"),
        (((3, 1), [], [], 1), "value of user field 'gender' 3"),
        (((1,), [], [], 1), r"1 field values, the events have the fields \['gender', 'job'\]"),
    ],
)
def test_samples_of_other_events_are_refused(sample: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        builder(TOKENIZER).tokens(*sample)


def test_prepare_refuses_unknown_items() -> None:
    for items, words in (([1, 7], "item 7"), ([-1, 2], "item -1")):
        with pytest.raises(ValueError, match=words):
            builder(TOKENIZER).prepare(np.array(items))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"profile": "A {gendre}."},
            r"prompt.profile 'A \{gendre\}.' has the field \{gendre\}; it may have \{gender\}, \{job\}",
        ),
        ({"history": "So far {title}:"}, r"prompt.history.*it may have no field"),
        ({"event": "{rating} stars"}, r"prompt.event.*lacks \{title\}"),
        ({"event": "{title} {stars}"}, r"prompt.event.*\{stars\}.*\{rating\}, \{title\}"),
        ({"question": "Like it?"}, r"prompt.question 'Like it\?' lacks \{title\}"),
        ({"question": ""}, r"prompt.question '' lacks"),
        ({"question": "{title} for {rating}?"}, r"prompt.question.*\{rating\}"),
        ({"question": "{title!r}?"}, "without format or conversion"),
        ({"question": "{title:>9}?"}, "without format or conversion"),
        ({"question": "{title.__class__}?"}, r"\{title.__class__\}"),
        ({"question": "{}?"}, r"has the field \{\}"),
        ({"question": "{title?"}, r"prompt.question '\{title\?': expected '}'.*plain braces"),
        ({"answer": "{answer}"}, "prompt.answer"),
        ({"max_tokens": 10}, "prompt.max_tokens 10 does not hold the question"),
    ],
)
def test_templates_are_checked(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        builder(TOKENIZER, **config)


def test_more_tokens_than_the_model_takes() -> None:
    with pytest.raises(ValueError, match="max_tokens 600 is more than the model's 512"):
        builder(pretrained("all-MiniLM-L6-v2"), causal=False, max_tokens=600)


@given(st.text(alphabet="ab {}\n", max_size=12))
def test_any_template_is_parsed_or_refused(template: str) -> None:
    try:
        part = parse("event", template, ["a", "b"])
    except ValueError:
        return
    filled = "".join(words + (f"<{field}>" if field else "") for words, field in part)
    plain = template.replace("{{", "\0").replace("}}", "\1")
    expected = plain.replace("{a}", "<a>").replace("{b}", "<b>").replace("\0", "{").replace("\1", "}").rstrip(" ")
    assert filled.strip() == expected.strip()


def test_ratings_are_written_as_people_do() -> None:
    assert [format_rating(v) for v in (1.0, 4.5, 10, 0.1, float(np.float32(0.7)), -2.0)] == [
        "1", "4.5", "10", "0.1", "0.7", "-2"
    ]  # fmt: skip
