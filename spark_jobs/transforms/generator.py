"""A generated log with planted tastes: what people like depends mostly on a property of items that no text names.

An item has a topic, which its title shows, and a style, which nothing shows but who liked it. A user likes some styles
strongly and some topics a little; tastes move from the first day to the last. So the text of a short history tells
something, and the ids of a long history tell much more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import SynthesiseConfig

STYLE_STRENGTH = 2.4
TOPIC_STRENGTH = 1.8
QUALITY_STRENGTH = 0.3
"""Standard deviations of the three planted parts of the logit of liking."""

MAINSTREAM = 0.6
"""How much the first styles please everybody and the last ones nobody, in standard deviations of taste. It gives ids of
one style something in common from the first step of training; without it a model of ids starts on a plateau.
"""

START = 1_700_000_000
"""First moment of the log, seconds since the epoch."""

_DAY = 86_400
_BIAS = 0.2
_POPULARITY = 0.6
_TOPIC_PULL = 0.5
_AGES = ("18-24", "25-34", "35-44", "45-54", "55+")
_REGIONS = ("north", "east", "south", "west")
_WORDS = {
    "space": ("Orbit", "Nebula", "Starship", "Comet", "Galaxy", "Lunar", "Rocket", "Cosmos"),
    "cooking": ("Kitchen", "Recipe", "Oven", "Spice", "Chef", "Flavour", "Bakery", "Supper"),
    "crime": ("Detective", "Alibi", "Verdict", "Heist", "Inspector", "Suspect", "Forensic", "Robbery"),
    "romance": ("Wedding", "Sweetheart", "Kiss", "Valentine", "Bouquet", "Darling", "Engagement", "Honeymoon"),
    "sport": ("Stadium", "Champion", "Marathon", "Referee", "Goalkeeper", "Sprint", "Trophy", "League"),
    "history": ("Empire", "Pharaoh", "Dynasty", "Cathedral", "Revolution", "Crusade", "Viking", "Castle"),
    "nature": ("Forest", "River", "Wolf", "Glacier", "Meadow", "Falcon", "Coral", "Savanna"),
    "music": ("Symphony", "Guitar", "Chorus", "Melody", "Drummer", "Opera", "Violin", "Rhythm"),
    "technology": ("Robot", "Circuit", "Algorithm", "Laser", "Software", "Android", "Network", "Processor"),
    "horror": ("Haunted", "Vampire", "Nightmare", "Graveyard", "Zombie", "Curse", "Phantom", "Werewolf"),
    "travel": ("Voyage", "Passport", "Island", "Caravan", "Harbour", "Safari", "Airport", "Compass"),
    "business": ("Market", "Merger", "Investor", "Startup", "Banker", "Contract", "Boardroom", "Profit"),
}
_SYLLABLES = ("ka", "lo", "mi", "ren", "tu", "vas", "del", "or", "shi", "pen", "zu", "gar")


@dataclass(frozen=True)
class World:
    """The items of a generated log: topic, style (int64 [I]), quality (float64 [I], standard deviation 1), cumulative
    popularity (float64 [I], ends at 1) and the table that is published.
    """

    topic: NDArray[np.int64]
    style: NDArray[np.int64]
    quality: NDArray[np.float64]
    popularity: NDArray[np.float64]
    items: pa.Table


def world(config: SynthesiseConfig) -> World:
    """Generate the items."""
    rng = np.random.default_rng([config.seed, 0])
    topic = rng.integers(0, config.topics, config.items)
    style = rng.integers(0, config.styles, config.items)
    weight = rng.permutation((1.0 + np.arange(config.items)) ** -_POPULARITY)
    vocabulary = [topic_words(number) for number in range(config.topics)]
    words = np.argsort(rng.random((config.items, 8)), axis=1)[:, :2]
    titles = [
        f"{vocabulary[t][1][a]} {vocabulary[t][1][b]} {number}"
        for number, (t, (a, b)) in enumerate(zip(topic.tolist(), words.tolist(), strict=True), 1)
    ]
    items = pa.table(
        {
            "item_id": [f"i{number:06d}" for number in range(1, config.items + 1)],
            "title": titles,
            "topic": [vocabulary[t][0] for t in topic.tolist()],
        }
    )
    return World(topic, style, rng.normal(size=config.items), np.cumsum(weight) / weight.sum(), items)


def topic_words(number: int) -> tuple[str, tuple[str, ...]]:
    """Name and eight words of a topic; beyond the twelve that are written down they are made of syllables."""
    if number < len(_WORDS):
        name = list(_WORDS)[number]
        return name, _WORDS[name]
    rng = np.random.default_rng(number)
    return f"topic {number + 1}", tuple("".join(rng.choice(_SYLLABLES, 3)).capitalize() for _ in range(8))


def users_table(config: SynthesiseConfig, start: int, stop: int) -> pa.Table:
    """The users ``start`` to ``stop``; what they are says nothing about what they like."""
    draws = np.array([np.random.default_rng([config.seed, 2, user]).random(2) for user in range(start, stop)])
    draws = draws.reshape(-1, 2)
    return pa.table(
        {
            "user_id": [f"u{user + 1:07d}" for user in range(start, stop)],
            "age_band": [_AGES[int(draw * len(_AGES))] for draw in draws[:, 0]],
            "region": [_REGIONS[int(draw * len(_REGIONS))] for draw in draws[:, 1]],
        }
    )


def events_table(config: SynthesiseConfig, items: World, start: int, stop: int) -> pa.Table:
    """The events of the users ``start`` to ``stop``, each from a generator of the user's own."""
    logs = [user_events(config, items, user) for user in range(start, stop)]
    names = items.items["item_id"].combine_chunks()
    count = [len(log["item"]) for log in logs]
    joined = {key: np.concatenate([log[key] for log in logs]) for key in logs[0]}
    return pa.table(
        {
            "user_id": pa.array(np.repeat([f"u{user + 1:07d}" for user in range(start, stop)], count)),
            "item_id": names.take(pa.array(joined["item"])),
            "rating": pa.array(joined["rating"].astype(np.float32)),
            "timestamp": pa.array(joined["time"].astype(np.int64)),
        }
    )


def user_events(config: SynthesiseConfig, items: World, user: int) -> dict[str, NDArray[Any]]:
    """One user's log: item (int64, from 0), time (int64 seconds, rising), rating (1 to 5) and the logit of liking."""
    rng = np.random.default_rng([config.seed, 1, user])
    styles = _contrast(rng, config.styles) + MAINSTREAM * np.linspace(1, -1, config.styles)
    topics = _contrast(rng, config.topics)
    chosen = _choose(rng, items, topics[0], _activity(rng, config))
    time = np.sort(rng.choice(config.days * _DAY, len(chosen), replace=False))
    moved = config.drift * time / (config.days * _DAY)
    style, topic = items.style[chosen], items.topic[chosen]
    logit = (
        _BIAS
        + STYLE_STRENGTH * ((1 - moved) * styles[0][style] + moved * styles[1][style])
        + TOPIC_STRENGTH * ((1 - moved) * topics[0][topic] + moved * topics[1][topic])
        + QUALITY_STRENGTH * items.quality[chosen]
        + config.noise * rng.normal(size=len(chosen))
    )
    liked = rng.random(len(chosen)) < 1 / (1 + np.exp(-logit))
    warmth = logit + rng.normal(size=len(chosen))
    rating = np.where(liked, 4 + (warmth > 1.5), np.clip(np.rint(2 + 0.5 * warmth), 1, 3))
    return {"item": chosen, "time": START + time, "rating": rating, "logit": logit}


def _contrast(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Tastes of the first and the last day, float64 [2, count], each with mean 0 and standard deviation 1."""
    taste = rng.normal(size=(2, count))
    spread = taste.std(axis=1, keepdims=True)
    centred: NDArray[np.float64] = (taste - taste.mean(axis=1, keepdims=True)) / np.where(spread == 0, 1, spread)
    return centred


def _activity(rng: np.random.Generator, config: SynthesiseConfig) -> int:
    """Number of a user's events: at least a third of the mean, with a power-law tail; no user sees most items."""
    least = config.events_per_user / 3
    count = least + 2 * least * 1.5 * rng.pareto(2.5)
    return int(max(1, min(count, config.items / 2, config.days * _DAY)))


def _choose(rng: np.random.Generator, items: World, taste: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Distinct items, popular ones and those of liked topics more often, in random order."""
    pull = np.exp(_TOPIC_PULL * (taste - taste.max()))
    found: NDArray[np.int64] = np.empty(0, np.int64)
    while len(found) < count:
        drawn = np.searchsorted(items.popularity, rng.random(4 * count + 16), side="right")
        drawn = np.minimum(drawn, len(items.topic) - 1)
        kept = drawn[rng.random(len(drawn)) < pull[items.topic[drawn]]]
        pool = np.concatenate([found, kept])
        found = pool[np.sort(np.unique(pool, return_index=True)[1])]
    return rng.permutation(found[:count])
