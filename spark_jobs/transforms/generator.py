"""A generated log with planted tastes: what people like depends mostly on a property of items that no text names.

An item has a topic, which its title shows, and a style, which nothing shows but who liked it. A user likes some styles
strongly and some topics a little; tastes move from the first day to the last. So the text of a short history tells
something, and the ids of a long history tell much more.

All users of a piece are drawn at once, and no array has users times items entries.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reclora_dist.config.schema import SynthesiseConfig
from spark_jobs.transforms import plan
from spark_jobs.transforms.plan import Plan

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

_BIAS = 0.2
_TOPIC_PULL = 0.5
_TITLE_WORDS = 8
_BITS = 32
"""A sort key has a row above this many bits, and an item or a moment in them."""

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


Log = dict[str, NDArray[Any]]
"""Events by column: user, item (int64, from 0), time (int64, seconds, rising within a user), rating (1 to 5), logit of
liking, and ``truth``, the logit without its noise: nobody can predict better.
"""


@dataclass(frozen=True)
class World:
    """The items of a generated log: topic, style (int64 [I]), quality (float64 [I], standard deviation 1), and what
    finds an item for a random number.

    ``order`` (int64 [I]) has the items by topic, ``mass`` (float64 [I], ends at 1) their cumulative popularity in that
    order, ``edges`` (float64 [topics + 1]) where each topic begins in it, and ``guide`` (int64 [I]) the first place
    whose mass exceeds 0/I, 1/I, ...
    """

    topic: NDArray[np.int64]
    style: NDArray[np.int64]
    quality: NDArray[np.float64]
    order: NDArray[np.int64]
    mass: NDArray[np.float64]
    edges: NDArray[np.float64]
    guide: NDArray[np.int64]


@dataclass(frozen=True)
class Tastes:
    """What users like on the first and on the last day: styles float64 [users, 2, S], topics float64 [users, 2, T]."""

    styles: NDArray[np.float64]
    topics: NDArray[np.float64]


@lru_cache(maxsize=1)
def world(config: SynthesiseConfig) -> World:
    """Generate the items; a process that writes many parts does so once."""
    bits = plan.stream(config, plan.ITEMS)
    topic, style, weight = _item_draws(config, bits)
    quality = np.random.Generator(bits.advance(_TITLE_WORDS * config.items)).normal(size=config.items)
    order = np.argsort(topic, kind="stable")
    mass = np.cumsum(weight[order])
    mass /= mass[-1]
    ends = np.cumsum(np.bincount(topic, minlength=config.topics))
    edges = np.concatenate([[0.0], mass])[np.concatenate([[0], ends])]
    guide = np.searchsorted(mass, np.arange(config.items) / config.items, side="right")
    return World(topic, style, quality, order, mass, edges, guide)


def _item_draws(config: SynthesiseConfig, bits: np.random.PCG64) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Topic, style and popularity of all items; ``bits`` stand at the draws for the titles then."""
    rng = np.random.Generator(bits)
    topic = rng.integers(0, config.topics, config.items)
    style = rng.integers(0, config.styles, config.items)
    return topic, style, rng.permutation((1.0 + np.arange(config.items)) ** -config.popularity_exponent)


def items_table(config: SynthesiseConfig, start: int, stop: int) -> pa.Table:
    """The items ``start`` to ``stop`` as they are published: item_id, title, topic."""
    bits = plan.stream(config, plan.ITEMS)
    topic = _item_draws(config, bits)[0][start:stop]
    draws = np.random.Generator(bits.advance(_TITLE_WORDS * start)).random((stop - start, _TITLE_WORDS))
    chosen = topic[:, None] * _TITLE_WORDS + np.argsort(draws, axis=1)[:, :2]
    vocabulary = [topic_words(number) for number in range(config.topics)]
    words = pa.array([word for _, words in vocabulary for word in words])
    number = pa.array(np.arange(start + 1, stop + 1)).cast(pa.string())
    title = pc.binary_join_element_wise(words.take(chosen[:, 0]), words.take(chosen[:, 1]), number, " ")
    topics = pa.array([name for name, _ in vocabulary]).take(pa.array(topic))
    return pa.table({"item_id": item_ids(np.arange(start, stop)), "title": title, "topic": topics})


def topic_words(number: int) -> tuple[str, tuple[str, ...]]:
    """Name and eight words of a topic; beyond the twelve that are written down they are made of syllables."""
    if number < len(_WORDS):
        name = list(_WORDS)[number]
        return name, _WORDS[name]
    rng = np.random.default_rng(number)
    return f"topic {number + 1}", tuple("".join(rng.choice(_SYLLABLES, 3)).capitalize() for _ in range(_TITLE_WORDS))


def item_ids(numbers: NDArray[np.int64]) -> pa.Array:
    """The ids of items by their numbers from 0: i000001, ..."""
    return _ids("i", numbers, 6)


def _ids(letter: str, numbers: NDArray[np.int64], width: int) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers + 1).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(letter, digits, "")


def users_table(config: SynthesiseConfig, start: int, stop: int) -> pa.Table:
    """The users ``start`` to ``stop``; what they are says nothing about what they like."""
    bits = plan.stream(config, plan.USERS).advance(2 * start)
    age, region = np.random.Generator(bits).random((stop - start, 2)).T
    return pa.table(
        {
            "user_id": _ids("u", np.arange(start, stop), 7),
            "age_band": pa.array(_AGES).take((age * len(_AGES)).astype(np.int64)),
            "region": pa.array(_REGIONS).take((region * len(_REGIONS)).astype(np.int64)),
        }
    )


def events_table(log: Log, truth: bool = False) -> pa.Table:
    """Events as they are published (user_id, item_id, rating, timestamp, with ``truth`` the probability of liking), and
    the ``day`` of each since the epoch.
    """
    columns = {
        "user_id": _ids("u", log["user"], 7),
        "item_id": item_ids(log["item"]),
        "rating": log["rating"].astype(np.float32),
        "timestamp": log["time"],
        **({"probability": 1 / (1 + np.exp(-log["truth"]))} if truth else {}),
        "day": (log["time"] // plan.DAY).astype(np.int32),
    }
    return pa.table(columns)


def events(log: Plan, items: World, piece: int) -> Log:
    """The events of a piece."""
    if piece < log.user_pieces:
        return _user_events(log.config, items, *log.users(piece))
    number = piece - log.user_pieces
    return _heavy_events(log.config, items, number, *log.stretch(number))


def _user_events(config: SynthesiseConfig, items: World, start: int, stop: int) -> Log:
    """The events of the users ``start`` to ``stop``, who rate an item once."""
    rng = np.random.Generator(plan.stream(config, plan.EVENTS, start))
    count = plan.activity(config, start, stop)
    tastes = _tastes(rng, config, stop - start)
    row, item = _choose(rng, items, tastes, count)
    order, time = _moments(rng, row, count, config.days * plan.DAY)
    return {"user": start + row, **_rated(rng, config, items, tastes, row, item[order], time)}


def _heavy_events(config: SynthesiseConfig, items: World, number: int, start: int, stop: int, count: int) -> Log:
    """A stretch of the heavy user's events: seconds ``start`` to ``stop``; it comes back to items."""
    tastes = _tastes(np.random.Generator(plan.stream(config, plan.HEAVY)), config, 1)
    rng = np.random.Generator(plan.stream(config, plan.HEAVY, 1 + number))
    row = np.zeros(count, np.int64)
    item = _draw(rng, items, _topic_edges(items, tastes), row)
    _, time = _moments(rng, row, np.array([count]), stop - start)
    return {"user": row, **_rated(rng, config, items, tastes, row, item, start + time)}


def _tastes(rng: np.random.Generator, config: SynthesiseConfig, users: int) -> Tastes:
    styles, topics = (config.personal * _contrast(rng, users, count) for count in (config.styles, config.topics))
    return Tastes(styles + MAINSTREAM * np.linspace(1, -1, config.styles), topics)


def _contrast(rng: np.random.Generator, users: int, count: int) -> NDArray[np.float64]:
    """Float64 [users, 2, count], each row with mean 0 and standard deviation 1."""
    taste = rng.normal(size=(users, 2, count))
    spread = taste.std(axis=2, keepdims=True)
    centred: NDArray[np.float64] = (taste - taste.mean(axis=2, keepdims=True)) / np.where(spread == 0, 1, spread)
    return centred


def _choose(
    rng: np.random.Generator, items: World, tastes: Tastes, count: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row (rising) and item of ``count`` events of each row: distinct items, drawn until there are enough."""
    edges = _topic_edges(items, tastes)
    found: NDArray[np.int64] = np.empty(0, np.int64)
    lacking, complete = count, []
    while lacking.any():
        row = np.repeat(np.arange(len(count)), lacking)
        found = _distinct(np.concatenate([found, row << _BITS | _draw(rng, items, edges, row)]))
        lacking = np.where(lacking > 0, count, 0) - np.bincount(found >> _BITS, minlength=len(count))
        full = lacking[found >> _BITS] == 0
        complete.append(found[full])
        found = found[~full]
    pairs = np.sort(np.concatenate(complete))
    return pairs >> _BITS, pairs & ((1 << _BITS) - 1)


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    ordered = np.sort(values)  # several times faster than np.unique
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _topic_edges(items: World, tastes: Tastes) -> NDArray[np.float64]:
    """Where topics end if row r spans r to r + 1 and popular and liked topics span more of it, float64 [rows * T]."""
    weight = np.exp(_TOPIC_PULL * tastes.topics[:, 0]) * np.diff(items.edges)
    ends = np.cumsum(weight, axis=1)
    return (np.arange(len(ends))[:, None] + ends / ends[:, -1:]).ravel()


def _draw(
    rng: np.random.Generator, items: World, topic_edges: NDArray[np.float64], row: NDArray[np.int64]
) -> NDArray[np.int64]:
    """An item for each entry of ``row``: a topic by the row's taste, in it an item by its popularity."""
    topics = len(items.edges) - 1
    topic = np.searchsorted(topic_edges, row + rng.random(len(row)), side="right") - row * topics
    topic = np.clip(topic, 0, topics - 1)  # a sum that was rounded up
    mass = items.edges[topic] + np.diff(items.edges)[topic] * rng.random(len(row))
    mass = np.minimum(mass, np.nextafter(1, 0))
    place = items.guide[(mass * len(items.guide)).astype(np.int64)]
    behind = np.flatnonzero(items.mass[place] <= mass)
    while len(behind):
        place[behind] += 1
        behind = behind[items.mass[place[behind]] <= mass[behind]]
    item: NDArray[np.int64] = items.order[place]
    return item


def _moments(
    rng: np.random.Generator, row: NDArray[np.int64], count: NDArray[np.int64], span: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random order within each row, and distinct seconds below ``span`` that rise within each row."""
    key = row << _BITS | rng.integers(0, 1 << _BITS, len(row))
    order = np.argsort(key, kind="stable")
    rank = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    free = span - count[row] + 1  # the rank, added last, keeps equal draws apart
    return order, ((key[order] & ((1 << _BITS) - 1)) * free >> _BITS) + rank


def _rated(
    rng: np.random.Generator,
    config: SynthesiseConfig,
    items: World,
    tastes: Tastes,
    row: NDArray[np.int64],
    item: NDArray[np.int64],
    time: NDArray[np.int64],
) -> Log:
    """Rate items at seconds since the first moment."""
    moved = config.drift * time / (config.days * plan.DAY)
    truth = (
        _BIAS
        + STYLE_STRENGTH * _liking(tastes.styles, row, items.style[item], moved)
        + TOPIC_STRENGTH * _liking(tastes.topics, row, items.topic[item], moved)
        + QUALITY_STRENGTH * items.quality[item]
    )
    logit = truth + config.noise * rng.normal(size=len(row))
    liked = rng.random(len(row)) < 1 / (1 + np.exp(-logit))
    warmth = logit + rng.normal(size=len(row))
    rating = np.where(liked, 4 + (warmth > 1.5), np.clip(np.rint(2 + 0.5 * warmth), 1, 3))
    return {"item": item, "time": START + time, "rating": rating, "logit": logit, "truth": truth}


def _liking(
    taste: NDArray[np.float64], row: NDArray[np.int64], kind: NDArray[np.int64], moved: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Taste of each row for a style or topic; 0 in ``moved`` means that of the first day, 1 of the last."""
    liking: NDArray[np.float64] = (1 - moved) * taste[row, 0, kind] + moved * taste[row, 1, kind]
    return liking
