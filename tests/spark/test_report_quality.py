"""The quality report: every figure counted again from the tables, limits that fail a build, drift, the page."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_data import write_run

from reclora_dist.config.schema import QualityConfig
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest, verified
from reclora_dist.contract.schema import EVENTS, QUALITY, SHARDS, SPLITS
from reclora_dist.contract.storage import Folder
from spark_jobs.__main__ import ENDED
from spark_jobs.days import MS_PER_DAY
from spark_jobs.report import histogram, tally
from spark_jobs.report.drift import COMPARED, KEPT, drift, stability
from spark_jobs.report.periods import LONGEST, SLICES, Periods, slices, spans
from spark_jobs.report.thresholds import thresholds
from spark_jobs.report_quality import JOB, check
from spark_jobs.stage import open_inputs

ROOT = Path(__file__).parents[2]


def report_of(folder: Path, name: str = "quality") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def inputs_of(build: Path) -> dict[str, Path]:
    return {"events": build / "events", "shards": build / "shards"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build without Spark: 60 users, 40 items, 20 events each."""
    build = tmp_path_factory.mktemp("small")
    write_run(build)
    return build


@pytest.fixture(scope="module")
def good(run, small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The report of that build; read it, or copy it before you write."""
    out = tmp_path_factory.mktemp("good")
    return out, run("report_quality", out, **inputs_of(small))


@pytest.fixture
def measured(run, finished, tmp_path: Path) -> dict[str, Any]:
    run("report_quality", tmp_path / "quality", **inputs_of(finished.folder))
    return report_of(tmp_path / "quality")


def spread(values: list[int]) -> dict[str, Any]:
    ordered, found = sorted(values), {}
    for percent in (0, 10, 25, 50, 75, 90, 99, 100):
        found[f"p{percent}"] = next(v for v in ordered if 100 * sum(o <= v for o in ordered) >= percent * len(ordered))
    return {"count": len(values), "mean": round(sum(values) / len(values), 6), **found}


def bucketed(values: list[int], buckets: list[dict[str, int]]) -> list[int]:
    assert [b["from"] for b in buckets[1:]] == [b["to"] + 1 for b in buckets[:-1]]
    return [sum(b["from"] <= value <= b["to"] for value in values) for b in buckets]


def test_every_figure_is_what_the_tables_hold(finished, rows, measured: dict[str, Any]) -> None:
    made = finished.manifest("events", EVENTS)
    events = rows(finished.folder / "events", made, "events/")
    names = {row["item"]: row["item_id"] for row in rows(finished.folder / "events", made, "items/")}
    shards = finished.manifest("shards", SHARDS)
    crm, text = (
        {split: rows(finished.folder / "shards", shards, f"{kind}/split={split}/") for split in SPLITS}
        for kind in ("crm", "text")
    )
    assert measured["events"] == {key: made.facts["counts"][key] for key in ("read", "clean", "events")}
    assert (measured["users"], measured["items"]) == (30, len(names))
    for split, found in measured["samples"].items():
        likes = sum(row["label"] for row in crm[split])
        wanted = (len(crm[split]), len(text[split]), round(likes / len(crm[split]), 6))
        assert (found["crm"], found["text"], found["label_rate"]) == wanted
    samples = [row for part in crm.values() for row in part]
    assert measured["label_rate"] == round(np.mean([row["label"] for row in samples]), 6)
    for kind in ("user", "item"):
        counts = list(Counter(event[kind] for event in events).values())
        active = measured["activity"][f"{kind}s"]
        assert {key: active[key] for key in active if key != "buckets"} == spread(counts)
        assert [b["from"] for b in active["buckets"]] == [2**n for n in range(len(active["buckets"]))]
        assert [b["count"] for b in active["buckets"]] == bucketed(counts, active["buckets"])
        assert sum(b["count"] for b in active["buckets"]) == len(counts)
    popular = Counter(names[event["item"]] for event in events)
    assert measured["profile"]["items"] == popular
    assert list(measured["profile"]["items"].values()) == sorted(popular.values(), reverse=True)
    assert measured["popularity"]["top_1_percent"] == round(max(popular.values()) / len(events), 6)
    levels = Counter(event["rating"] for event in events)
    assert {level["rating"]: level["events"] for level in measured["levels"]} == levels
    assert sum(level["share"] for level in measured["levels"]) == pytest.approx(1, abs=1e-5)
    day = {"from": "1970-01-01", "events": len(events)}
    rate = round(np.mean([event["label"] for event in events]), 6)
    assert measured["periods"] == {"unit": "day", "days": 1, "rows": [{**day, "label_rate": rate}]}
    check_histories(measured, samples, [row for part in text.values() for row in part])


def check_histories(measured: dict[str, Any], samples: list[dict], texts: list[dict]) -> None:
    for name, of, longest in (("long", samples, 6), ("short", texts, 3)):
        lengths, found = [row[f"{name}_length"] for row in of], measured["histories"][name]
        assert found["longest"] == longest
        assert {key: found[key] for key in spread(lengths)} == spread(lengths)
        assert (found["empty"], found["full"]) == (0, round(np.mean([n == longest for n in lengths]), 6))
        assert [b["count"] for b in found["buckets"]] == bucketed(lengths, found["buckets"])
    real = [(row["long_items"][: row["long_length"]], row["short_items"][: row["short_length"]]) for row in texts]
    covered = [sum(item in long for item in short) / len(short) for long, short in real]
    assert measured["coverage"] == {
        "samples": len(texts),
        "covered": round(np.mean(covered), 6),
        "distinct_long": round(np.mean([len(set(long)) for long, _ in real]), 6),
        "distinct_short": round(np.mean([len(set(short)) for _, short in real]), 6),
    }


def test_days_steps_and_reasons_of_a_longer_log(spark, run, rows, csv, tmp_path: Path) -> None:
    """Ten days with a gap of two, events of the same user on many of them, a k-core and bad rows."""
    days = [0, 1, 2, 5, 6, 7, 8, 9]
    log = [
        (f"u{u}", f"i{i}", 1 + (u * i) % 5, 950_000_000 + 86_400 * days[i] + 60 * u) for u in range(6) for i in range(8)
    ]
    bad = [("u1", "", 3, 950_000_000), ("u1", "i1", 9, 950_000_000), ("lonely", "i1", 3, 950_000_000)]
    raw = csv.write(tmp_path / "raw", [*log, *bad])
    events, shards = tmp_path / "events", tmp_path / "shards"
    made = run("build_events", events, *csv.settings, "k_core=5", "min_history=2", raw=raw)
    run("retrieve_history", tmp_path / "histories", "strategy=recent", "long=4", "short=2", events=events)
    no_text = ("text_train=0", "text_validation=0", "text_test=0")
    run("write_shards", shards, *no_text, events=events, histories=tmp_path / "histories")
    run("report_quality", tmp_path / "quality", events=events, shards=shards)
    found = report_of(tmp_path / "quality")
    assert found["events"] == {"read": 51, "clean": 49, "k_core": 48, "events": 48}
    assert found["quarantine"] == {
        "share": round(2 / 51, 6), "rows": {"missing_item_id": 1, "rating_not_in_levels": 1},
    }  # fmt: skip
    assert found["coverage"] == {"samples": 0, "covered": None, "distinct_long": None, "distinct_short": None}
    assert (found["histories"]["short"]["count"], found["histories"]["short"]["mean"]) == (0, None)
    assert "<tr><td>short</td>" + "<td>–</td>" * 9 in (tmp_path / "quality" / "quality.html").read_text()
    table = rows(events, made, "events/")
    wanted = []
    for day in range(10):
        labels = [e["label"] for e in table if e["time"] // MS_PER_DAY == 950_000_000 // 86_400 + day]
        rate = round(sum(labels) / len(labels), 6) if labels else None
        wanted.append({"from": f"2000-02-{8 + day:02d}", "events": len(labels), "label_rate": rate})
    assert found["periods"] == {"unit": "day", "days": 1, "rows": wanted}
    assert [row["events"] for row in wanted] == [6, 6, 6, 0, 0, 6, 6, 6, 6, 6]


def test_a_log_without_a_clock_is_cut_into_equal_slices(spark, run, rows, csv, tmp_path: Path) -> None:
    raw = csv.write(tmp_path / "raw", [(f"u{n % 7}", f"i{n // 7}", 1 + (n * n) % 5, n) for n in range(70)])
    made = run("build_events", tmp_path, *csv.settings, "source.time=", "k_core=0", "min_history=2", raw=raw)
    counted = tally.tally(spark, tally.event_parts(Folder(str(tmp_path)), made), 3)
    wanted: dict[int, list[int]] = {}
    for event in rows(tmp_path, made, "events/"):
        wanted.setdefault(event["time"] * SLICES // 70, []).append(event["label"])
    assert counted.periods == Periods("slice", 0, 1, {k: (len(v), sum(v)) for k, v in wanted.items()})
    assert len(list(counted.periods.each())) == SLICES
    assert list(counted.popular.values()) == [7, 7, 7], "no more than asked for"


ALL_CROSSED = (
    "max_quarantined=0", "min_users=61", "min_items=41", "min_samples=[9999,0,9999]", "min_label_rate=0.9",
    "min_mean_history=8", "max_drift=0.0001", "max_row_change=0.01",
)  # fmt: skip


def test_a_build_that_crosses_limits_fails_with_all_of_them_and_the_old_report_stays(
    run, good: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "quality"
    old = copied(good[0], out)
    write_run(tmp_path / "new", users=50, seed=1)
    before = {file: (out / file).read_bytes() for file in old.files()}
    with pytest.raises(ValueError, match="the build crosses 10 of its 14 thresholds") as error:
        run("report_quality", out, *ALL_CROSSED, **inputs_of(tmp_path / "new"))
    told = str(error.value).splitlines()
    words = [
        "number of users 50 is below min_users = 61: use a longer log, or lower events.k_core",
        "number of items 40 is below min_items = 41: use a longer log",
        "is below min_samples[train] = 9999: use a longer log, other events.fractions",
        "is below min_samples[test] = 9999: use a longer log",
        "is below min_label_rate = 0.9: look at events.like_at_least",
        "is below min_mean_history = 8: use a longer log",
        "is above max_drift[items] = 0.0001: compare with the report that stays",
        "is above max_drift[levels] = 0.0001: compare",
        "is above max_drift[labels] = 0.0001: compare",
        "relative change of the number of events 0.166667 is above max_row_change = 0.01: compare",
    ]
    assert [word in line for word, line in zip(words, told[1:-1], strict=True)] == [True] * len(words)
    assert told[-1] == f"Its report: {out / 'failed.html'}"
    assert {file: (out / file).read_bytes() for file in before} == before
    assert set(old.files()) - set(before) == {"failed.html", "failed.json"}
    assert all(verified(old, entry) for entry in read_manifest(old, QUALITY).files)
    assert [t["name"] for t in report_of(out, "failed")["thresholds"] if t["crossed"]] == [
        "min_users", "min_items", "min_samples[train]", "min_samples[test]", "min_label_rate", "min_mean_history",
        "max_drift[items]", "max_drift[levels]", "max_drift[labels]", "max_row_change",
    ]  # fmt: skip
    assert "10 of 14 thresholds are crossed" in (out / "failed.html").read_text()
    run("report_quality", out, **inputs_of(tmp_path / "new"))
    assert set(old.files()) == {"manifest.json", "quality.html", "quality.json"}, "a good build takes failed.* away"


def copied(source: Path, target: Path) -> Folder:
    """A copy of a dataset with everything in it."""
    for file in Folder(str(source)).files():
        Folder(str(target)).write(file, (source / file).read_bytes())
    return Folder(str(target))


CROSSED = [
    ("max_quarantined", 0.1, {"quarantine": {"share": 0.2}}),
    ("min_users", 61, {}),
    ("min_items", 41, {}),
    ("min_samples", (10_000, 0, 0), {}),
    ("min_samples", (0, 10_000, 0), {}),
    ("min_samples", (0, 0, 10_000), {}),
    ("min_label_rate", 0.9, {}),
    ("max_label_rate", 0.1, {}),
    ("min_mean_history", 8.0, {}),
    ("min_coverage", 0.99, {"coverage": {"covered": 0.98}}),
]


@pytest.mark.parametrize(("name", "limit", "changes"), CROSSED)
def test_each_limit_is_crossed_by_itself(good: tuple[Path, Manifest], name: str, limit: Any, changes: dict) -> None:
    report = {**report_of(good[0]), **changes}
    assert not [t for t in thresholds(QualityConfig(), report, None) if t.crossed]
    (crossed,) = [
        t for t in thresholds(dataclasses.replace(QualityConfig(), **{name: limit}), report, None) if t.crossed
    ]
    assert crossed.name.startswith(name)
    assert f"{crossed.name} = {crossed.limit:g}" in str(crossed)
    assert crossed.remedy in str(crossed)


@pytest.mark.parametrize(
    ("limits", "crossed"),
    [
        ({}, []),
        ({"max_drift": 0.2}, ["max_drift[levels]"]),
        ({"max_drift": 0.05}, ["max_drift[items]", "max_drift[levels]", "max_drift[labels]"]),
        ({"max_row_change": 0.5}, []),
        ({"max_row_change": 0.3}, ["max_row_change"]),
    ],
)
def test_drift_is_judged_only_if_it_is_limited(
    good: tuple[Path, Manifest], limits: dict[str, float], crossed: list[str]
) -> None:
    config, report = dataclasses.replace(QualityConfig(), **limits), report_of(good[0])
    moved = {"items": 0.1, "levels": 0.3, "labels": 0.06, "row_change": -0.4}
    assert [t.name for t in thresholds(config, report, moved) if t.crossed] == crossed
    assert not [t for t in thresholds(config, report, None) if t.crossed], "nothing to compare with"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max_drift=-0.1", "max_drift = -0.1: a limit is a number of at least 0"),
        ("min_label_rate=.nan", "min_label_rate = nan: a limit"),
        ("min_samples=[1,-1,0]", r"min_samples = \(1, -1, 0\): a limit"),
        ("min_label_rate=0.6 max_label_rate=0.5", "min_label_rate = 0.6 is above max_label_rate = 0.5"),
    ],
)
def test_limits_that_nothing_can_hold_are_refused(run, small: Path, tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run("report_quality", tmp_path, *setting.split(), **inputs_of(small))


def test_shards_of_other_events_are_refused(small: Path, tmp_path: Path) -> None:
    write_run(tmp_path, seed=1)
    uris = {"events": str(tmp_path / "events"), "shards": str(small / "shards")}
    with pytest.raises(ContractError, match=r"was made from events .* Run write_shards on these events"):
        check(QualityConfig(), open_inputs(JOB, uris))


def test_no_drift_against_itself_and_much_after_a_change(
    run, small: Path, good: tuple[Path, Manifest], tmp_path: Path
) -> None:
    first, out = report_of(good[0]), tmp_path / "quality"
    assert (first["drift"], first["previous"]) == (None, None)
    copied(good[0], out)
    same = run("report_quality", out, **inputs_of(small))
    assert report_of(out)["drift"] == {"items": 0, "levels": 0, "labels": 0, "row_change": 0}
    assert same.facts["previous"] == report_of(out)["previous"] == good[1].content_digest
    write_run(tmp_path / "changed", users=30, items=150, seed=5)
    run("report_quality", out, **inputs_of(tmp_path / "changed"))
    found = report_of(out)
    assert found["previous"] == same.content_digest
    assert found["drift"]["items"] > 0.25
    assert found["drift"]["row_change"] == -0.5
    now, then = found["profile"], first["profile"]
    for name in ("levels", "labels"):
        assert found["drift"][name] == pytest.approx(index(now[name], then[name]), abs=1e-6)
    together = {build["events"]: dict(build["items"]) for build in (now, then)}
    names = {n for items in together.values() for n in sorted(items, key=lambda n: (-items[n], n))[:COMPARED]}
    counts = [{**{n: items.get(n, 0) for n in names}, "": events - sum(items.get(n, 0) for n in names)}
              for events, items in together.items()]  # fmt: skip
    assert found["drift"]["items"] == pytest.approx(index(*counts), abs=1e-6)


def index(now: dict[str, int], then: dict[str, int]) -> float:
    keys = now.keys() | then.keys()
    p, q = (
        {k: (c.get(k, 0) + 0.5) / (sum(c.values()) + len(keys) / 2) for k in keys} for c in (now, then)
    )  # fmt: skip
    return sum((p[k] - q[k]) * math.log(p[k] / q[k]) for k in keys)


def test_a_damaged_old_report_is_said_and_replaced(
    run, small: Path, good: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(good[0], tmp_path / "quality")
    out.write("manifest.json", out.read("manifest.json").replace(b'"like": ', b'"like": 1'))
    made = run("report_quality", tmp_path / "quality", **inputs_of(small))
    assert "no comparison with the previous build: " in capsys.readouterr().out
    assert made.content_digest == good[1].content_digest


def test_the_page_needs_nothing_else_and_shows_ids_as_text(run, small: Path, tmp_path: Path) -> None:
    made = read_manifest(Folder(str(small / "events")), EVENTS)
    facts = {**made.facts, "quarantine": {"<b>odd": 7}, "counts": {**made.facts["counts"], "read": 1207}}
    events = copied(small / "events", tmp_path / "events")
    changed = commit(events, dataclasses.replace(made, facts=facts))
    shards = read_manifest(copied(small / "shards", tmp_path / "shards"), SHARDS)
    commit(Folder(str(tmp_path / "shards")), dataclasses.replace(shards, parents={"events": changed.content_digest}))
    run("report_quality", tmp_path / "quality", **inputs_of(tmp_path))
    page = (tmp_path / "quality" / "quality.html").read_text()
    assert "All thresholds hold." in page
    assert "<td>&lt;b&gt;odd</td><td>7</td></tr>" in page
    assert "of all tables (0.58% of the event rows)" in page
    assert "<b>" not in page
    assert "<td>events</td><td>1,200</td><td>99.42%</td>" in page
    assert "<td>min_users</td><td>60</td><td>1</td><td>yes</td>" in page
    assert "<td>max_row_change</td><td>–</td><td>off</td><td>yes</td>" in page
    assert page.count('src="data:image/png;base64,iVBOR') == 4
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script|@import", page)
    assert len(page) < 300_000


def test_the_command_is_deterministic_up_to_date_and_ends_with_2(
    small: Path, good: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """The same command twice and one that fails, in one Spark application."""
    given = [f"--{name}={path}" for name, path in inputs_of(small).items()]
    options = ["--master=local[1]", "--shuffle-partitions=7", "--metrics-file", str(tmp_path / "job.prom")]
    command = ["report_quality", *given, *options, "--out", str(tmp_path / "quality")]
    commands = "".join(json.dumps(line) + "\n" for line in (command, command, [*command, "--set", "min_users=61"]))
    done = subprocess.run(
        [sys.executable, "-m", "spark_jobs"], input=commands, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    first, again, failed, rest = re.split(rf"^{ENDED}(?=\d)", done.stdout, flags=re.MULTILINE)
    assert [again[0], failed[0], rest] == ["0", "0", "2\n"] and done.returncode == 2, done.stderr
    made = read_manifest(Folder(str(tmp_path / "quality")), QUALITY)
    assert made.content_digest == good[1].content_digest, "one worker and other partitions: the same bytes"
    assert f"all 14 thresholds hold; report: {tmp_path / 'quality' / 'quality.html'}" in first
    assert 'table=""' not in (tmp_path / "job.prom").read_text()
    for file in ("quality.json", "quality.html", "manifest.json"):
        assert str(small) not in (tmp_path / "quality" / file).read_text()
    assert again == "0\nquality: up to date\n"
    assert "report_quality: error: the build crosses 1 of its 14 thresholds:\n  number of users 60" in done.stderr
    assert (tmp_path / "quality" / "failed.html").exists()


values = st.lists(st.integers(0, 300), min_size=1, max_size=60)


@given(values, st.integers(1, 100))
def test_histograms_say_what_the_values_say(found: list[int], percent: int) -> None:
    counts = Counter(found)
    assert histogram.spread(counts) == spread(found)
    for buckets in (histogram.doubling(counts), histogram.even(counts, 300)):
        assert [b["count"] for b in buckets] == bucketed(found, buckets)
    assert sum(b["count"] for b in histogram.doubling(counts)) == sum(value > 0 for value in found)
    assert sum(b["count"] for b in histogram.even(counts, 300)) == len(found)
    top = sorted(found, reverse=True)[: max(1, math.ceil(len(found) * percent / 100 - 1e-9))]
    assert histogram.top_share(counts, percent) == (round(sum(top) / sum(found), 6) if sum(found) else None)


@given(st.integers(-800_000, 3_000_000), st.integers(0, 800_000))
def test_every_day_lies_in_one_of_few_periods(first: int, days: int) -> None:
    unit, origin, width = spans(first, first + days)
    places = [(day - origin) // width for day in (first, first + days)]
    assert places[0] == 0 and places[1] < LONGEST
    if unit == "week":
        assert (origin - 4) % 7 == 0, "1970-01-05 was a Monday"
    assert (unit == "day") == (days < LONGEST)
    assert width == {"day": 1, "week": 7}.get(unit, width)


def test_names_of_periods() -> None:
    week = Periods("week", -3, 7, {0: (2, 1), 2: (4, 0)})
    assert list(week.each()) == [("1969-12-29", 2, 1), ("1970-01-05", 0, 0), ("1970-01-12", 4, 0)]
    assert next(Periods("stretch", 20_000_000, 9, {0: (1, 1)}).each())[0] == "56728-02-22", "a wrong time_unit is seen"


def test_places_are_sliced_and_milliseconds_are_not() -> None:
    assert slices(np.arange(100), 100).tolist() == [n // 2 for n in range(100)]
    assert slices(np.array([-5, 99, 100, 10**18]), 100).tolist() == [-1, 49, -1, -1]


counted = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1)


@given(counted, counted)
def test_the_stability_index_is_a_distance(now: dict[str, int], then: dict[str, int]) -> None:
    assert stability(now, now) == 0
    assert stability(now, then) == stability(then, now) >= 0
    assert stability(now, then) == pytest.approx(index(now, then), abs=1e-6)


def test_an_item_that_rises_or_falls_a_little_beyond_the_first_hundred_is_no_drift() -> None:
    def profile(order: list[int]) -> dict[str, Any]:
        items = {f"i{name}": 1000 - place for place, name in enumerate(order)}
        both = {"levels": {"1": 1}, "labels": {"like": 1}, "events": sum(items.values())}
        return {"items": dict(list(items.items())[:KEPT]), "days": 0, **both}

    order = list(range(300))
    swapped = [*order[: COMPARED - 5], *order[COMPARED : COMPARED + 5], *order[COMPARED - 5 : COMPARED], *order[105:]]
    assert 0 < drift(profile(swapped), profile(order))["items"] < 0.0001
    assert drift(profile(order[::-1]), profile(order))["items"] > 0.25


@given(st.data())
def test_covered_and_distinct_items_of_padded_lists(data: st.DataObject) -> None:
    def lists(length: int) -> list[list[int]]:
        real = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=length), min_size=4, max_size=4))
        return [[*items, *[0] * (length - len(items))] for items in real]

    long, short = lists(6), lists(3)
    batch = pa.record_batch(
        {
            "label": pa.array([0, 1, 1, 0], pa.int8()),
            "short_length": pa.array([sum(i > 0 for i in row) for row in short], pa.int32()),
            "long_items": pa.array(long, pa.list_(pa.int32(), 6)),
            "short_items": pa.array(short, pa.list_(pa.int32(), 3)),
        }
    )
    found: dict[str, Counter] = {}
    for row in (row for part in tally._count_text("test", batch) for row in part.to_pylist()):
        found.setdefault(row["kind"], Counter())[row["key"]] += row["rows"]
    wanted = [(sum(i > 0 for i in s), sum(i > 0 and i in p for i in s)) for p, s in zip(long, short, strict=True)]
    assert found["covered"] == Counter((length << tally.SHORT_BITS) + held for length, held in wanted)
    assert found["distinct_long"] == Counter(len({*row} - {0}) for row in long)
    assert found["distinct_short"] == Counter(len({*row} - {0}) for row in short)
