"""The stages in order, from raw logs to a checked service; what is up to date is skipped."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import is_current
from reclora_dist.contract.schema import BACKBONE
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app import check, embed, evaluate, summary
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.ray_app.session import connect
from reclora_dist.ray_app.spark import run_job
from reclora_dist.ray_app.trainer import train_stage
from reclora_dist.telemetry.memory import PeakMemory
from reclora_dist.telemetry.meters import Meters, NullMeters
from reclora_dist.train import stages

STATE = "timings.json"


@dataclass
class Session:
    """One run of the pipeline: the cluster, once a stage needed it, and what was measured."""

    config: Config
    stack: ExitStack
    scraper: check.Scraper | None = None
    emitted: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)
    meters: Meters = field(default_factory=NullMeters)

    def join(self) -> check.Scraper:
        """Be connected to the cluster, joined or started at the first call; returns what scrapes its metrics."""
        if self.scraper is None:
            print("ray: connecting", flush=True)
            cluster = self.stack.enter_context(connect(self.config.ray))
            self.meters = RayMeters()  # a gauge lasts as long as the object that set it
            self.scraper = self.stack.enter_context(check.Scraper(cluster))
        return self.scraper


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; ``run`` returns whether it did any work."""

    name: str
    run: Callable[[Session], bool]


def run_pipeline(config: Config) -> dict[str, Any]:
    """Run every stage that is not up to date; print the table of results.

    Returns:
        The run's summary, as written to ``summary.json``.

    Raises:
        ValueError: the config does not fit together, or a stage refuses its input.
    """
    return summary.write_summary(config, run_stages(config, ("",)))


def run_stages(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Run the stages whose name starts with one of ``names``, where they are not up to date.

    Returns:
        What was measured in this and earlier runs: seconds per stage, samples per second, peak memory.

    Raises:
        ValueError: the config does not fit together, or a stage refuses its input.
    """
    check_config(config)
    home = Folder(config.paths.run)
    timings = _read_state(home)
    with ExitStack() as stack, PeakMemory() as memory:
        session = Session(config, stack, rates=dict(timings.get("samples_per_s", {})))
        for stage in (stage for stage in plan(config) if stage.name.startswith(tuple(names))):
            _run_stage(stage, session, timings)
            timings["samples_per_s"] = session.rates
            timings["peak_memory_mib"] = max(memory.mib, timings.get("peak_memory_mib", 0))
            home.write(STATE, json.dumps(timings, indent=1).encode())
    return timings


def check_config(config: Config) -> None:
    """Refuse a config that cannot work, before any stage starts.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    known = {*config.adapters, "crm", "running_averages"}
    for pair in config.compare:
        for name in pair:
            if name not in known:
                raise ValueError(f"compare names {name!r}; there are: {', '.join(sorted(known))}")
    if not config.synthesise and not config.events.source.path:
        raise ValueError("events.source.path is empty; give the folder of the raw log")
    if config.retrieval.short > config.retrieval.long:
        raise ValueError(f"retrieval.short {config.retrieval.short} is above retrieval.long {config.retrieval.long}")
    stages.check(config.crm_train, config.ray.workers, "crm_train")
    stages.check(config.lora_train, config.ray.workers, "lora_train")


def plan(config: Config) -> list[Stage]:
    """The stages of this config."""
    found = [Stage("synthesise", _synthesise)] if config.synthesise else []
    found.append(Stage("events", _events))
    if config.backbone.kind == "tiny":
        found.append(Stage("backbone", _backbone))
    found += [Stage("vectors", _vectors), Stage("histories", _histories), Stage("shards", _shards)]
    found += [Stage("quality", _quality), Stage("crm", _crm)]
    found += [Stage(f"adapter {name}", _adapter(name)) for name in config.adapters]
    found.append(Stage("evaluation", _evaluation))
    if config.serve.check:
        found.append(Stage("service", _service))
    return found


def _run_stage(stage: Stage, session: Session, timings: dict[str, Any]) -> None:
    print(f"=== {stage.name}", flush=True)
    started = time.perf_counter()
    worked = stage.run(session)
    seconds = time.perf_counter() - started
    if worked:
        timings.setdefault("seconds", {})[stage.name] = round(seconds, 1)
    print(f"{stage.name}: {f'done in {seconds:.1f} s' if worked else 'up to date'}", flush=True)


def _synthesise(session: Session) -> bool:
    return run_job(session.config, "synthesise", session.config.synthesise, {}, "raw")


def raw_path(config: Config) -> str:
    """Where the raw log lies: the synthesised one in the run, or the configured folder."""
    return folder(config, "raw").uri if config.synthesise else config.events.source.path


def _events(session: Session) -> bool:
    return run_job(session.config, "build_events", session.config.events, {"raw": raw_path(session.config)}, "events")


def _backbone(session: Session) -> bool:
    identity = stages.backbone_identity(session.config)
    if is_current(folder(session.config, "backbone"), BACKBONE, identity.config_digest, identity.parents):
        return False
    stages.train_backbone(session.config)
    return True


def _vectors(session: Session) -> bool:
    if embed.vectors_are_current(session.config):
        return False
    session.join()
    embed.embed_items(session.config)
    return True


def _histories(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "vectors")}
    return run_job(config, "retrieve_history", config.retrieval, inputs, "histories")


def _shards(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "histories")}
    return run_job(config, "write_shards", config.shards, inputs, "shards")


def _quality(session: Session) -> bool:
    config = session.config
    inputs = {name: folder(config, name).uri for name in ("events", "shards")}
    return run_job(config, "report_quality", config.quality, inputs, "quality")


def _crm(session: Session) -> bool:
    if stages.crm_is_current(session.config):
        return False
    _train(session, "crm")
    return True


def _adapter(name: str) -> Callable[[Session], bool]:
    def run(session: Session) -> bool:
        if stages.adapter_is_current(session.config, name):
            return False
        _train(session, "adapter", name)
        return True

    return run


def _train(session: Session, stage: str, adapter: str = "") -> None:
    if session.config.ray.workers == 0:
        train_stage(session.config, stage, adapter)
        return
    session.join()
    train_stage(session.config, stage, adapter)
    if adapter and session.config.adapters[adapter].gate == "crm":
        session.emitted |= check.series_of("train")  # only such an adapter sets all of them


def _evaluation(session: Session) -> bool:
    if evaluate.evaluation_is_current(session.config):
        return False
    session.join()
    session.rates.update(evaluate.evaluate_run(session.config, session.meters))
    session.emitted |= check.series_of("evaluation")
    return True


def _service(session: Session) -> bool:
    if check.service_is_current(session.config):
        return False
    check.check_service(session.config, session.join(), session.emitted | check.series_of("serve"))
    return True


def _read_state(home: Folder) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(home.read(STATE)) if home.exists(STATE) else {}
    return state
