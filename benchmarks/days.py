"""What it costs to add a day, as the log before it grows.

    make bench NAME=days                               one JSON object last
    make bench NAME=days ARGS="--sizes 1 5"            a shorter one

Each log has the same number of events per day, so a longer one has more days before the last two, and more users. All
but these are built at once; then the two are added one after the other, the three jobs in one Spark application each.
A day should cost what its own events and users cost, whatever came before it. Needs the extra `bench`, like
NAME=retrieval.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from retrieval import ITEMS, LOG, LONG, MILLION, PER_USER, ROOT, SHORT, Cost, Jobs, write_vectors

from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder

PER_DAY = 50_000
NEW = 2
"""Days that are added."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 5, 20], help="logs, million events")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/days", help="scratch; logs stay there")
    arguments = parser.parse_args()
    sizes = {}
    for size in arguments.sizes:
        sizes[f"{size:g}"] = found = measured(arguments.folder / f"{size:g}m", size)
        print(f"{size:g} million events: {json.dumps(found)}", flush=True)
    last = [found["days"][-1]["microseconds_per_event"] for found in sizes.values()]
    growth = round(max(last) / min(last), 3)
    print(json.dumps({"growth": growth, "cores": len(os.sched_getaffinity(0)), "sizes": sizes}))


def measured(home: Path, size: float) -> dict:
    """A log of ``size`` million events: all its days but the last two, then these one by one."""
    raw = home / "raw"
    users, days = round(size * MILLION / PER_USER), round(size * MILLION / PER_DAY)
    settings = [f"users={users}", f"items={ITEMS}", f"events_per_user={PER_USER}", f"days={days}", "by_day=true"]
    with Jobs() as spark:
        spark.run("synthesise", raw, settings, {})
    dates = sorted(folder.name.removeprefix("date=") for folder in (raw / "events").iterdir())
    for stage in ("events", "vectors", "histories", "shards"):
        shutil.rmtree(home / stage, ignore_errors=True)
    cuts = f'cut_dates=["{dates[-NEW]}","{dates[-1]}"]'
    before = added(home, raw, dates[:-NEW], "", cuts)
    found = []
    for previous, date in zip(dates[-NEW - 1 :], dates[-NEW:], strict=False):
        cost = added(home, raw, [date], previous, cuts)
        events = read_manifest(Folder(str(home / "events" / date)), EVENTS).rows("events/")
        per_event = round(cost.seconds / events * 1e6, 1)
        found.append({"events": events, "microseconds_per_event": per_event, **vars(cost)})
    return {"days_before": len(dates) - NEW, "before": vars(before), "days": found}


def added(home: Path, raw: Path, dates: Sequence[str], previous: str, cuts: str) -> Cost:
    """Add days to what stands in ``home``."""
    name = dates[-1]
    events, vectors, histories = (home / stage / name for stage in ("events", "vectors", "histories"))
    span = f'source.days=["{dates[0]}","{name}"]'
    inputs = {"raw": raw} | ({"previous": home / "events" / previous} if previous else {})
    with Jobs() as spark:
        spark.run("build_events", events, [*LOG, "split=dates", cuts, span], inputs)
        write_vectors(events, vectors)
        spark.resume()
        lengths = [f"long={LONG}", f"short={SHORT}"]
        spark.run("retrieve_history", histories, lengths, {"events": events, "vectors": vectors})
        shares = ["text_train=0.08", "text_validation=0.08", "text_test=0.08"]
        spark.run("write_shards", home / "shards", [*shares, "add=true"], {"events": events, "histories": histories})
    return spark.cost


if __name__ == "__main__":
    main()
