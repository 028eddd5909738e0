"""How fast the shards of a log are made, what that costs as the log grows, and the same by straightforward scripts.

    make bench NAME=retrieval                                     one JSON object last
    make bench NAME=retrieval ARGS="--sizes 1 5 --versus 5"       a shorter one

Logs come from `spark_jobs.synthesise`, with users in proportion to events and a fixed number of items; item vectors are
random. Ours is the three jobs in one Spark application, as the pipeline runs them, from raw Parquet to CRM shards. The
rivals are the scripts in benchmarks/rivals, each a process of its own; all write the same rows, which is checked before
times are compared. Rounds are taken in turns. Needs the extra `bench`:
.venv/bin/pip install -c constraints.txt -e '.[bench]'.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds

from reclora_dist.contract import schema
from reclora_dist.contract.arrays import add_array
from reclora_dist.contract.manifest import Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_part, write_arrow_part, write_part
from reclora_dist.contract.schema import EVENTS, HISTORIES, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import Past, Semantic, SimHash, on_grid, retrieve
from spark_jobs.application import Application
from spark_jobs.transforms.histories import before

ROOT = Path(__file__).resolve().parents[1]
RIVALS = {"polars": "polars_numpy.py", "duckdb": "duckdb_numpy.py", "idiomatic_spark": "idiomatic_spark.py"}
LOG = ("source.events=events", "source.items=", "k_core=0", "rating_levels=[1,2,3,4,5]")
"""How `build_events` reads what `synthesise` wrote."""
ITEMS, PER_USER, DIMENSION, LONG, SHORT = 20_000, 60, 64, 60, 10
SPARK = [
    "--shuffle-partitions", "16", "--driver-memory", "4g", "--conf", "spark.sql.adaptive.enabled=true",
    "--conf", "spark.driver.defaultJavaOptions=-XX:+UseParallelGC",
]  # fmt: skip
"""A large log wants what a local master leaves out for a quick start: the JIT's best code and adaptive plans."""
MILLION = 1_000_000
MIB = 1 << 20


@dataclass
class Cost:
    """Wall time and the largest resident memory: of any one process, of any that is no JVM, of all together (MiB)."""

    seconds: float = 0.0
    process_mib: int = 0
    python_mib: int = 0
    total_mib: int = 0
    stages: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 5, 20, 50], help="logs of ours, million events")
    parser.add_argument("--versus", type=float, nargs="*", default=[5, 20], help="sizes at which the rivals run, too")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS), help="which of them")
    parser.add_argument("--rounds", type=int, default=1, help="how often each runs")
    parser.add_argument(
        "--heavy", type=float, default=5, help="size of the log with a user of 20 %% of its events; 0: none"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/retrieval", help="scratch; logs stay there")
    arguments = parser.parse_args()
    result: dict = {"cores": len(os.sched_getaffinity(0)), "kernel": kernel(), "encoding": encoding()}
    print(json.dumps(result["kernel"] | result["encoding"]), flush=True)
    result["sizes"] = {}
    for size in sorted({*arguments.sizes, *arguments.versus}):
        home = arguments.folder / f"{size:g}m"
        rivals = arguments.rivals if size in arguments.versus else []
        result["sizes"][f"{size:g}"] = found = measured(home, size, rivals, arguments.rounds)
        print(f"{size:g} million events: {json.dumps(found)}", flush=True)
    if arguments.heavy:
        result["heavy_user"] = heavy(arguments.folder, arguments.heavy)
        print(f"heavy user: {json.dumps(result['heavy_user'])}", flush=True)
    print(json.dumps({**summary(result), **result}))


def summary(result: dict) -> dict:
    """The figures with goals."""
    sizes = result["sizes"]
    speed = {"topk_vs_faiss": result["kernel"].get("topk_vs_faiss")}
    if not sizes:
        return speed
    per_sample = [found["ours"]["seconds"] / found["samples"] for found in sizes.values()]
    ratios: dict[str, list[float]] = defaultdict(list)
    for found in sizes.values():
        for name, cost in found.get("rivals", {}).items():
            ratios[name].append(found["ours"]["seconds"] / cost["seconds"])
    largest = list(sizes.values())[-1]
    return {
        **speed,
        "kernel_share": largest["kernel_share"],
        "growth": round(max(per_sample) / min(per_sample), 3),
        **{f"vs_{name}": round(max(values), 3) for name, values in ratios.items() if name != "idiomatic_spark"},
        **({"vs_idiomatic_spark": round(1 / max(ratios["idiomatic_spark"]), 2)} if "idiomatic_spark" in ratios else {}),
    }


def measured(home: Path, size: float, rivals: Sequence[str], rounds: int) -> dict:
    """Ours and the rivals on one log."""
    raw = synthesise(home / "raw", size)
    ours, others = [], defaultdict(list)
    for _ in range(rounds):
        ours.append(build(raw, home))
        for name in rivals:
            others[name].append(rival(name, raw, home))
    best = min(ours, key=lambda cost: cost.seconds)
    samples = sum(read_manifest(Folder(str(home / "histories")), HISTORIES).facts["counts"].values())
    kernel_seconds = bare_kernel(home)
    found = {
        "samples": samples,
        "ours": vars(best),
        "microseconds_per_sample": round(best.seconds / samples * 1e6, 2),
        "kernel_seconds": round(kernel_seconds, 1),
        "kernel_share": round(kernel_seconds / best.stages["retrieve_history"], 3),
        "tasks": task_times(home / "log"),
    }
    if rivals:
        wanted = checksum(home / "shards" / "crm")
        for name in rivals:
            if checksum(home / name) != wanted:
                raise SystemExit(f"{name} wrote other rows than our jobs; times are not compared")
            shutil.rmtree(home / name)
        found["rivals"] = {n: vars(min(costs, key=lambda cost: cost.seconds)) for n, costs in others.items()}
    return found


def synthesise(raw: Path, size: float, heavy_user: float = 0.0) -> Path:
    """A log of ``size`` million events, unless it is there."""
    users = round(size * MILLION / PER_USER)
    settings = [
        f"users={users}",
        f"items={ITEMS}",
        f"events_per_user={PER_USER}",
        f"heavy_user={heavy_user}",
        "days=365",
    ]
    with Jobs() as spark:
        spark.run("synthesise", raw, settings, {})
    return raw


def build(raw: Path, home: Path) -> Cost:
    """Our three jobs from raw log to shards; vectors are made between them, untimed."""
    events, vectors, histories = home / "events", home / "vectors", home / "histories"
    for stage in ("events", "histories", "shards", "log"):
        shutil.rmtree(home / stage, ignore_errors=True)
    (home / "log").mkdir(parents=True)
    with Jobs(home / "log") as spark:
        spark.run("build_events", events, LOG, {"raw": raw})
        write_vectors(events, vectors)
        spark.resume()
        spark.run(
            "retrieve_history", histories, [f"long={LONG}", f"short={SHORT}"], {"events": events, "vectors": vectors}
        )
        spark.run("write_shards", home / "shards", ["text_train=0.08"], {"events": events, "histories": histories})
    return spark.cost


class Jobs:
    """Jobs in one Spark application, timed one by one; the first has its start, the whole also its end."""

    def __init__(self, log: Path | None = None) -> None:
        self.cost = Cost()
        self._options = [*SPARK, *(event_log(log) if log else [])]

    def __enter__(self) -> "Jobs":
        self._started = time.perf_counter()
        self._application = Application()
        self._watcher = threading.Thread(target=watch, args=(self._application.process, self.cost))
        self._watcher.start()
        return self

    def run(self, name: str, out: Path, settings: Sequence[str], inputs: dict[str, Path]) -> None:
        """Run a job."""
        arguments = ["--out", str(out), *self._options]
        arguments += [part for setting in settings for part in ("--set", setting)]
        arguments += [part for option, path in inputs.items() for part in (f"--{option}", str(path))]
        list(self._application.run(name, arguments))
        self._add(name)

    def resume(self) -> None:
        """What happened since the last job is not counted."""
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._application.close()
        self._watcher.join()
        self._add("end")

    def _add(self, name: str) -> None:
        spent = time.perf_counter() - self._started
        self.cost.stages[name] = round(spent, 1)
        self.cost.seconds = round(self.cost.seconds + spent, 1)
        self._started = time.perf_counter()


def event_log(folder: Path) -> list[str]:
    """Arguments that make Spark write its event log, as one plain file."""
    wanted = {"enabled": "true", "dir": f"file://{folder}", "compress": "false", "rolling.enabled": "false"}
    return [part for key, value in wanted.items() for part in ("--conf", f"spark.eventLog.{key}={value}")]


def rival(name: str, raw: Path, home: Path) -> Cost:
    """One script; its output is removed first."""
    shutil.rmtree(home / name, ignore_errors=True)
    vectors = next((home / "vectors").glob("vectors-*.npy"))
    script = ROOT / "benchmarks/rivals" / RIVALS[name]
    return run([sys.executable, str(script), str(raw), str(vectors), str(home / name)])


def run(command: Sequence[str]) -> Cost:
    """Run a command and watch the memory of its processes."""
    cost, started = Cost(), time.perf_counter()
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}  # Spark's workers: else the python3 on PATH
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    watcher = threading.Thread(target=watch, args=(process, cost))
    watcher.start()
    code = process.wait()
    cost.seconds = round(time.perf_counter() - started, 1)
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command[:4])} ended with {code}")
    return cost


def watch(process: subprocess.Popen, cost: Cost) -> None:
    """Largest resident memory, without what processes share with their parents."""
    while process.poll() is None:
        sizes = list(private_mib(process.pid))
        cost.process_mib = max(cost.process_mib, *(size for _, size in sizes), 0)
        cost.python_mib = max(cost.python_mib, *(size for name, size in sizes if name != "java"), 0)
        cost.total_mib = max(cost.total_mib, sum(size for _, size in sizes))
        time.sleep(0.25)


def private_mib(pid: int) -> Iterator[tuple[str, int]]:
    """Name and unique memory of a process and its children."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        try:
            yield process.name(), process.memory_full_info().uss // MIB
        except psutil.Error:
            continue


def write_vectors(events: Path, out: Path) -> None:
    """Random vectors on the grid for the items of an events dataset."""
    made = read_manifest(Folder(str(events)), EVENTS)
    table = on_grid(np.random.default_rng(0).normal(size=(made.facts["items"] + 1, DIMENSION)).astype(np.float32))
    table[0] = 0
    entry = add_array(Folder(str(out)), "vectors", table)
    commit(Folder(str(out)), Manifest(VECTORS.name, VECTORS.version, "", {"events": made.content_digest}, (entry,)))


def checksum(folder: Path) -> tuple[int, int]:
    """Rows of a dataset, and a sum of hashes of each row's id, label, statistics and history, whatever their order."""
    weights = np.random.default_rng(0).integers(1, 2**63, LONG * 2 + 6, dtype=np.uint64) | np.uint64(1)
    rows, total = 0, 0
    columns = ["sample_id", "label", "statistics", "long_items", "long_levels"]
    for batch in ds.dataset(folder, partitioning=None, format="parquet").to_batches(columns=columns):
        lists = [batch[name].flatten().to_numpy().astype(np.uint64) for name in columns[2:]]
        parts = [batch[name].to_numpy().astype(np.uint64)[:, None] for name in columns[:2]]
        table = np.concatenate(parts + [values.reshape(len(batch), -1) for values in lists], axis=1)
        mixed = (table * weights[: table.shape[1]]).sum(axis=1, dtype=np.uint64)
        total += int(((mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)).sum(dtype=np.uint64))
        rows += len(batch)
    return rows, total % 2**64


def bare_kernel(home: Path) -> float:
    """Seconds that the retrieval alone takes on arrays in memory, with a process per core as in the job."""
    from concurrent.futures import ProcessPoolExecutor

    parts = [entry.path for entry in read_manifest(Folder(str(home / "events")), EVENTS).select("events/")]
    vectors = next((home / "vectors").glob("vectors-*.npy"))
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        found = pool.map(kernel_of_part, [home / "events" / part for part in parts], [vectors] * len(parts))
        return sum(found) / cores


def kernel_of_part(part: Path, vectors: Path) -> float:
    """Seconds for the samples of one part; what they see of earlier parts is left out."""
    import pyarrow.parquet as pq

    table = pq.read_table(part, columns=["sample_id", "user", "item", "time"])
    user, item, moment = (table[name].to_numpy() for name in ("user", "item", "time"))
    places = table["sample_id"].to_numpy() & 0xFFFFFFFF
    similarity = Semantic(np.load(vectors, mmap_mode="r").view(np.ndarray))
    starts, stops = before(user, moment)
    samples = np.flatnonzero(places[stops] >= 5)
    past = Past(item, places, starts[samples], stops[samples], 10_000)
    started = time.perf_counter()
    retrieve(similarity, past, item[samples], (LONG, SHORT), 128)
    return time.perf_counter() - started


def task_times(log: Path) -> dict:
    """How long the tasks took that retrieve, from Spark's event log."""
    (file,) = log.iterdir()
    events = [json.loads(line) for line in file.read_text().splitlines()]
    named = {e["Stage Info"]["Stage ID"]: e["Stage Info"]["Stage Name"] for e in events if "Stage Info" in e}
    tasks = [
        (e["Task Info"]["Finish Time"] - e["Task Info"]["Launch Time"]) / 1000
        for e in events
        if e["Event"] == "SparkListenerTaskEnd" and "retrieve_history.py" in named[e["Stage ID"]]
    ]
    median, p99 = statistics.median(tasks), float(np.percentile(tasks, 99))
    return {"tasks": len(tasks), "median_s": median, "p99_s": p99, "p99_over_median": round(p99 / median, 2)}


def heavy(folder: Path, size: float) -> dict:
    """A log whose first user has 20 % of all events, against the same without that user."""
    costs = {}
    for name, share in (("with", 0.2), ("without", 0.0)):
        scale = size if share else size * 0.8
        home = folder / f"heavy-{name}-{size:g}m"
        costs[name] = build(synthesise(home / "raw", scale, share), home)
        shutil.rmtree(home / "shards")
        tasks = task_times(home / "log")
        costs[name].stages["p99_over_median"] = tasks["p99_over_median"]
    ratio = costs["with"].seconds / costs["without"].seconds
    return {"ratio": round(ratio, 3), **{name: vars(cost) for name, cost in costs.items()}}


def kernel(events: int = 10_000, targets: int = 256, rounds: int = 20) -> dict:
    """The exact top-K of one long log against FAISS, argpartition and SimHash, in turns, one thread each."""
    rng = np.random.default_rng(0)
    table = on_grid(rng.normal(size=(ITEMS + 1, DIMENSION)).astype(np.float32))
    table[0] = 0
    items, wanted = rng.integers(1, ITEMS + 1, events), rng.integers(1, ITEMS + 1, targets)
    past = Past(items, np.arange(events), np.zeros(targets, np.int64), np.full(targets, events), events)
    hashed = SimHash.of(table, 64, 0)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: retrieve(Semantic(table), past, wanted, (LONG,), 256)[0],
        "simhash_64": lambda: retrieve(hashed, past, wanted, (LONG,), 256)[0],
        "argpartition": lambda: np.argpartition(table[wanted] @ table[items].T, events - LONG, axis=1)[:, -LONG:],
    }
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: topk_vs_faiss is left out", file=sys.stderr)
    else:
        faiss.omp_set_num_threads(1)

        def flat() -> np.ndarray:
            index = faiss.IndexFlatIP(DIMENSION)
            index.add(table[items])
            return index.search(table[wanted], LONG)[1]

        ways["faiss_flat"] = flat
    spent: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            found[name] = way()
            spent[name].append(time.process_time() - started)
    result: dict = {f"{name}_ms": round(statistics.median(times) * 1e3, 2) for name, times in spent.items()}
    result["simhash_recall"] = round(recall(table, items, wanted, found["simhash_64"], found["ours"]), 4)
    if "faiss_flat" in found:
        result["recall_vs_faiss"] = round(recall(table, items, wanted, found["ours"], found["faiss_flat"]), 6)
        result["topk_vs_faiss"] = round(result["faiss_flat_ms"] / result["ours_ms"], 2)
    return result


def encoding(rows: int = 60_000, rounds: int = 5) -> dict:
    """Histories as Arrow files, as our jobs write them, and as Parquet: processor time and size of one part."""
    rng = np.random.default_rng(0)

    def column(field: pa.Field) -> pa.Array:
        kind = field.type
        if pa.types.is_fixed_size_list(kind):
            values = np.minimum(rng.zipf(1.3, (rows, kind.list_size)), 100).ravel()
            return pa.FixedSizeListArray.from_arrays(pa.array(values).cast(kind.value_type), kind.list_size)
        return pa.array(["train"] * rows) if pa.types.is_string(kind) else pa.array(np.arange(rows) % 100).cast(kind)

    wanted = schema.histories(LONG, SHORT)
    table = pa.Table.from_arrays([column(field) for field in wanted], schema=wanted)
    result = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(scratch)
        for name, write in (
            ("arrow", lambda folder: write_arrow_part(folder, "", 0, [table], 20_000)),
            ("parquet", lambda folder: write_part(folder, "", 0, table, 20_000)),
        ):
            spent: dict[str, list[float]] = {"write": [], "read": []}
            for _ in range(rounds):
                started = time.process_time()
                entry = write(folder)
                spent["write"].append(time.process_time() - started)
                started = time.process_time()
                read_part(folder, entry)
                spent["read"].append(time.process_time() - started)
            result |= {f"{name}_{what}_ms": round(statistics.median(times) * 1e3, 1) for what, times in spent.items()}
            result[f"{name}_mb"] = round(entry.bytes / 1e6, 2)
    return result


def recall(table: np.ndarray, items: np.ndarray, wanted: np.ndarray, found: np.ndarray, best: np.ndarray) -> float:
    """Share of the found events whose score reaches the worst of the best ones: ties count as hits."""
    scores = table[wanted] @ table[items].T
    worst = np.take_along_axis(scores, best, axis=1).min(axis=1, keepdims=True)
    return float((np.take_along_axis(scores, found, axis=1) >= worst).mean())


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if os.environ.get(variable) != "1":  # one thread per process, as on executors; libraries read it at import
            os.environ[variable] = "1"
            os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
