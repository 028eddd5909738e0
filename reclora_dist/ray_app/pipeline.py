"""The stages in order, from raw logs to a checked service; what is up to date is skipped.

A stage imports what it needs when it runs: a run with nothing to do loads no model library.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import Any

from reclora_dist.config import targets
from reclora_dist.config.check import OTHER_MODELS, check_config, check_raw, shuffled_names
from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.ray_app.record import write_record
from reclora_dist.ray_app.scrape import Scraper, series_of
from reclora_dist.ray_app.session import connect
from reclora_dist.ray_app.spark import SparkJobs
from reclora_dist.telemetry.memory import PeakMemory
from reclora_dist.telemetry.meters import Meters, NullMeters

STATE = "timings.json"


@dataclass
class Session:
    """One run of the pipeline: Spark and the cluster, once a stage needs them, and what was measured."""

    config: Config
    stack: ExitStack
    spark: SparkJobs
    scraper: Scraper | None = None
    emitted: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)
    meters: Meters = field(default_factory=NullMeters)

    def join(self) -> Scraper:
        """Be connected to the cluster, joined or started at the first call; returns what scrapes its metrics."""
        if self.scraper is None:
            print("ray: connecting", flush=True)
            cluster = self.stack.enter_context(connect(self.config.ray))
            self.meters = RayMeters()  # a gauge lasts as long as the object that set it
            self.scraper = self.stack.enter_context(Scraper(cluster))
        return self.scraper


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    ``target`` is what it is to make: ``run`` is called only if it is not there. A Spark job looks for itself, so there
    is no target, and ``run`` returns whether it had work to do. Neighbours that train a model (``trains``: ``crm``, or
    an adapter's name) share their workers and have no ``run``.
    """

    name: str
    run: Callable[[Session], bool | None] | None = None
    target: Callable[[Config], targets.Target] | None = None
    trains: str = ""


def run_pipeline(config: Config) -> dict[str, Any]:
    """Run every stage that is not up to date; print the table of results.

    Returns:
        The run's summary, as written to ``summary.json``.

    Raises:
        ValueError: the config does not fit together, or a stage refuses its input.
    """
    timings = run_stages(config, ("",))
    from reclora_dist.ray_app.summary import write_summary

    return write_summary(config, timings)


def run_stages(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Run the stages whose name starts with one of ``names``, where they are not up to date.

    Returns:
        What was measured in this and earlier runs: seconds per stage, samples per second, peak memory.

    Raises:
        ValueError: the config does not fit together, or a stage refuses its input.
    """
    check_config(config)
    stages = [stage for stage in plan(config) if stage.name.startswith(tuple(names))]
    if any(stage.name == "events" for stage in stages):
        check_raw(config)
    home = Folder(config.paths.run)
    write_record(config, datetime.now(UTC).isoformat(timespec="seconds"))
    timings = _read_state(home, config)
    with ExitStack() as stack, PeakMemory() as memory, closing(SparkJobs(config)) as spark:
        session = Session(config, stack, spark, rates=dict(timings.get("samples_per_s", {})))
        groups = [list(group) for _, group in groupby(stages, lambda stage: "training" if stage.trains else stage.name)]
        for done, group in enumerate(groups, 1):
            _train(group, session, timings) if group[0].trains else _run_stage(group[0], session, timings)
            if all(later.target for group in groups[done:] for later in group):
                spark.close()  # training needs its memory
            timings["samples_per_s"] = session.rates
            timings["peak_memory_mib"] = max(memory.mib, timings.get("peak_memory_mib", 0))
            home.write(STATE, json.dumps(timings, indent=1).encode())
    return timings


def find_learning_rate(config: Config) -> None:
    """Run the range test of ``config.finder`` on the run's shards.

    Raises:
        ValueError: the config does not fit together.
    """
    check_config(config)
    from reclora_dist.ray_app import trainer

    with ExitStack() as stack:
        if config.ray.workers:
            stack.enter_context(connect(config.ray))
        trainer.find_learning_rate(config)


def plan(config: Config) -> list[Stage]:
    """The stages of this config."""
    spark = not config.paths.shards  # else it has been at work, and what it made is not made again
    found = [Stage("synthesise", _synthesise)] if spark and config.synthesise else []
    found += [Stage("events", _events)] if spark else []
    if config.backbone.kind == "tiny":
        found.append(Stage("backbone", _backbone, targets.backbone_target))
    if spark:
        found.append(Stage("vectors", _vectors, targets.vectors_target))
        found += [Stage("histories", _histories), Stage("shards", _shards), Stage("quality", _quality)]
    found.append(Stage("crm", None, targets.crm_target, trains="crm"))
    for name in config.adapters:
        found.append(Stage(f"adapter {name}", None, partial(targets.adapter_target, name=name), trains=name))
    found.append(Stage("evaluation", _evaluation, targets.evaluation_target))
    if config.serve.check:
        found.append(Stage("service", _service, targets.service_target))
    return found


def _run_stage(stage: Stage, session: Session, timings: dict[str, Any]) -> None:
    print(f"=== {stage.name}", flush=True)
    started = time.perf_counter()
    assert stage.run is not None
    current = stage.target is not None and stage.target(session.config).is_current
    worked = not current and stage.run(session) is not False
    _tell(stage.name, time.perf_counter() - started if worked else None, timings)


def _train(stages: Sequence[Stage], session: Session, timings: dict[str, Any]) -> None:
    """Train what is not up to date, with workers that are started once: that takes as long as a small training."""
    config, names = session.config, [stage.trains for stage in stages]
    print(f"=== {', '.join(stage.name for stage in stages)}", flush=True)
    started, before = time.perf_counter(), {name: _costs(config, name) for name in names}
    if not all(stage.target(config).is_current for stage in stages if stage.target):
        from reclora_dist.ray_app.trainer import train_all

        if config.ray.workers:
            session.join()
        train_all(config, names)
    own = 0.0
    for stage in stages:
        costs = _costs(config, stage.trains)
        seconds = costs["stage_seconds"] if costs != before[stage.trains] else None
        own += seconds or 0.0
        _tell(stage.name, seconds, timings)
        if seconds and config.ray.workers and stage.trains != "crm" and config.adapters[stage.trains].weighs:
            session.emitted |= series_of("train")  # only such an adapter sets all of them
    if own and config.ray.workers:
        _tell("workers", time.perf_counter() - started - own, timings)


def _costs(config: Config, name: str) -> dict[str, float]:
    """What the last training of a model took; empty if there was none."""
    training, file = folder(config, "training"), f"{name}.json"
    return dict(json.loads(training.read(file))) if training.exists(file) else {}


def _tell(name: str, seconds: float | None, timings: dict[str, Any]) -> None:
    """Say, and keep, what a stage took; None: it had nothing to do."""
    if seconds is not None:
        timings.setdefault("seconds", {})[name] = round(seconds, 1)
    print(f"{name}: {'up to date' if seconds is None else f'done in {seconds:.1f} s'}", flush=True)


def _synthesise(session: Session) -> bool:
    return session.spark.run("synthesise", session.config.synthesise, {}, "raw")


def raw_path(config: Config) -> str:
    """Where the raw log lies: the synthesised one in the run, or the configured folder."""
    return folder(config, "raw").uri if config.synthesise else config.events.source.path


def _events(session: Session) -> bool:
    return session.spark.run("build_events", session.config.events, {"raw": raw_path(session.config)}, "events")


def _backbone(session: Session) -> None:
    from reclora_dist.train.stages import train_backbone

    train_backbone(session.config)


def _vectors(session: Session) -> None:
    from reclora_dist.ray_app.embed import embed_items

    session.join()
    embed_items(session.config)


def _histories(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "vectors")}
    return session.spark.run("retrieve_history", config.retrieval, inputs, "histories")


def _shards(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "histories")}
    return session.spark.run("write_shards", config.shards, inputs, "shards")


def _quality(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "shards")}
    return session.spark.run("report_quality", config.quality, inputs, "quality")


def _evaluation(session: Session) -> None:
    from reclora_dist.ray_app.evaluate import evaluate_run

    session.join()
    session.rates.update(evaluate_run(session.config, session.meters))
    session.emitted |= series_of("evaluation")


def _service(session: Session) -> None:
    from reclora_dist.ray_app.check import check_service

    check_service(session.config, session.join(), session.emitted | series_of("serve"))


def _read_state(home: Folder, config: Config) -> dict[str, Any]:
    """What earlier runs measured of the stages and models that this config has."""
    state: dict[str, Any] = json.loads(home.read(STATE)) if home.exists(STATE) else {}
    kept = {
        "seconds": {"workers", *(stage.name for stage in plan(config))},
        "samples_per_s": {*OTHER_MODELS, *config.adapters, *shuffled_names(config).values()},
    }
    for key, names in kept.items():
        state[key] = {name: value for name, value in state.get(key, {}).items() if name in names}
    return state
