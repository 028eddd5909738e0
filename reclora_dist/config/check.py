"""Whether the settings of a run fit together, asked before any work starts."""

import re
from collections.abc import Collection, Iterator
from dataclasses import asdict
from itertools import chain, pairwise

from reclora_dist.config.load import ConfigError, build
from reclora_dist.config.schema import (
    Config,
    CrmConfig,
    EngineConfig,
    EvaluateConfig,
    FinderConfig,
    LoraConfig,
    RayConfig,
    ServeConfig,
    StudyConfig,
    SynthesiseConfig,
    TrainConfig,
)

OTHER_MODELS = ("crm", "running_averages")
"""Names of what is evaluated beside the adapters."""

SUMMARY = ("training", "seconds", "peak_memory_mib")
"""What stands beside the models in ``summary.json``."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def check_raw(config: Config) -> None:
    """Refuse a config without a raw log; only what builds the events needs one.

    Raises:
        ValueError: names the setting and the remedy.
    """
    if not config.synthesise and not config.events.source.path:
        raise ValueError("events.source.path is empty; give the folder of the raw log")


def check_config(config: Config) -> None:
    """Refuse a config that cannot work, whatever stages are to run.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    known = {*config.adapters, *shuffled_names(config).values(), *OTHER_MODELS}
    for pair in config.compare:
        for name in pair:
            if name not in known:
                raise ValueError(f"compare names {name!r}; there are: {', '.join(sorted(known))}")
    if config.retrieval.short > config.retrieval.long:
        raise ValueError(f"retrieval.short {config.retrieval.short} is above retrieval.long {config.retrieval.long}")
    for name, lora in config.adapters.items():
        _check_name(name)
        check_lora(lora, f"adapters.{name}")
        _check_source(config, name)
        if lora.gate == "user" and config.retrieval.strategy != "recent":
            raise ValueError(
                f"adapters.{name}.gate 'user' must not know the target item, but retrieval.strategy "
                f"{config.retrieval.strategy!r} chooses histories by it; take strategy 'recent', or gate 'crm'"
            )
    check_crm(config.crm, config.retrieval.strategy)
    _check_evaluate(config.evaluate)
    check_training(config)
    check_engine(config.engine, config.backbone.dtype)
    check_finder(config.finder, config.adapters)
    check_serve(config.serve)


def _check_name(name: str) -> None:
    """An adapter's name is a folder, a key of ``summary.json`` and a word of ``study.compare``."""
    if name in OTHER_MODELS or name in SUMMARY:
        raise ValueError(f"adapters.{name}: the evaluation calls something else so; give the adapter another name")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"adapters: {name!r} cannot name an adapter; take letters, digits, '_', '-', '.', a letter or digit first"
        )


def check_training(config: Config) -> None:
    """Refuse settings of the trainings, and of their workers, that cannot work.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    check_sizes(config.crm_train, config.ray.workers, "crm_train")
    _check_fine_tuning(config, config.lora_train, "lora_train")
    for name, lora in config.adapters.items():
        if lora.train:
            _check_fine_tuning(config, _training(config, name), f"adapters.{name}.train")
    check_ray(config.ray)


def _check_source(config: Config, name: str) -> None:
    """Refuse an adapter that learns from one that is not there by then, or that starts from one of another form."""
    lora, where = config.adapters[name], f"adapters.{name}"
    earlier = list(config.adapters)[: list(config.adapters).index(name)]
    for key, other in (("start", lora.start), ("teacher", lora.teacher)):
        if other and other not in earlier:
            known = ", ".join(earlier) or "none"
            raise ValueError(f"{where}.{key} names {other!r}; adapters listed before {name!r}: {known}")
    if not lora.start:
        return
    source = config.adapters[lora.start]
    single = source.experts == 1 and source.mode != "matrix"
    same = (source.experts, source.mode) == (lora.experts, lora.mode)
    if not (same or (single and lora.mode != "outputs")) or (source.rank, source.alpha) != (lora.rank, lora.alpha):
        raise ValueError(
            f"{where}.start {lora.start!r} has {_form(source)}; {_form(lora)} cannot start from it: take the same rank "
            "and alpha; and one pair (experts = 1) for the modes 'weights' and 'matrix', or the same experts and mode"
        )


def _form(lora: LoraConfig) -> str:
    return f"experts = {lora.experts}, mode {lora.mode!r}, rank {lora.rank}, alpha {lora.alpha:g}"


def _training(config: Config, name: str) -> TrainConfig:
    """The training settings of an adapter that has own ones, their names and types checked."""
    try:
        return build(TrainConfig, {**asdict(config.lora_train), **config.adapters[name].train})
    except ConfigError as error:
        raise ValueError(f"adapters.{name}.train: {error}") from None


def _check_fine_tuning(config: Config, train: TrainConfig, section: str) -> None:
    check_sizes(train, config.ray.workers, section)
    if 0 < train.micro_tokens < config.prompt.max_tokens:
        raise ValueError(
            f"{section}.micro_tokens {train.micro_tokens} holds no prompt of prompt.max_tokens "
            f"{config.prompt.max_tokens}; raise the one or lower the other"
        )
    if train.packing and config.backbone.kind == "encoder":
        raise ValueError(f"{section}.packing needs a causal backbone, not an encoder; use {section}.micro_tokens alone")


def shuffled_names(config: Config) -> dict[str, str]:
    """The name of an adapter's shuffled control by the adapter's own, if `evaluate.shuffled` asks for them."""
    gated = [name for name, lora in config.adapters.items() if lora.personal]
    return {name: f"{name} (shuffled)" for name in gated if config.evaluate.shuffled}


def check_lora(lora: LoraConfig, where: str) -> None:
    """Refuse an adapter whose settings do not go together.

    Args:
        where: the place of the settings, for the message.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    for wrong, words in chain(_bad_values(lora), _bad_pairs(lora)):
        if wrong:
            raise ValueError(f"{where}: {words}")


def _bad_values(lora: LoraConfig) -> Iterator[tuple[bool, str]]:
    for name, least in (("experts", 1), ("rank", 1), ("gate_hidden", 1), ("balance", 0), ("state_noise", 0)):
        value = getattr(lora, name)
        yield value < least, f"{name} {value} must be at least {least}"
    for name in ("dropout", "gate_dropout", "state_dropout"):
        value = getattr(lora, name)
        yield not 0 <= value < 1, f"{name} {value} must be at least 0 and below 1"
    yield not 0 < lora.blend < 1, f"blend {lora.blend} must be above 0 and below 1"
    yield lora.temperature <= 0, f"gate temperature {lora.temperature} must be above 0"
    yield not 0 <= lora.top_k <= lora.experts, f"top_k {lora.top_k} must be 0 (all) or up to experts = {lora.experts}"


def _bad_pairs(lora: LoraConfig) -> Iterator[tuple[bool, str]]:
    gate, experts = lora.gate, lora.experts
    reads_state = gate in ("crm", "user")
    yield (
        gate == "none" and experts != 1,
        f"gate 'none' needs experts = 1, not {experts}; or take gate 'uniform'",
    )
    yield (
        lora.mode == "outputs" and lora.rank % experts != 0,
        f"rank {lora.rank} cannot be split over {experts} experts; take a multiple of {experts}",
    )
    if lora.mode == "matrix":
        yield not reads_state, f"mode 'matrix' needs a gate that makes matrices, not {gate!r}; take 'crm' or 'user'"
        yield experts != 1, f"mode 'matrix' has one pair, not experts = {experts}; set experts = 1"
        yield lora.top_k > 0, f"mode 'matrix' has no weights for top_k {lora.top_k} to choose from; set top_k = 0"
    yield (
        lora.balance > 0 and not (lora.weighs and gate != "random"),
        f"balance {lora.balance} has no trained weights of several experts to even out (gate {gate!r}, mode "
        f"{lora.mode!r}, experts = {experts}); set balance = 0",
    )
    for name in ("top_k", "shared_gate"):
        value = getattr(lora, name)
        yield (
            bool(value) and gate in ("uniform", "none"),
            f"{name} {value} means nothing to gate {gate!r}; leave it out",
        )
    for name in ("state_dropout", "state_noise"):
        value = getattr(lora, name)
        yield value > 0 and not reads_state, f"{name} {value} needs a gate that reads a state, not {gate!r}; set 0"


def check_crm(config: CrmConfig, strategy: str) -> None:
    """Refuse a conventional model that cannot be built, or that would be another than its name says.

    Raises:
        ValueError: sasrec's heads do not divide the width, or din on other than the newest events.
    """
    if config.kind == "din" and strategy != "recent":
        raise ValueError(
            f"crm.kind 'din' reads the newest events, retrieval.strategy is {strategy!r}: take crm=din, which sets "
            "retrieval.strategy=recent, or crm=sim, the same network on retrieved events"
        )
    if config.kind == "sasrec" and config.embedding % config.heads:
        raise ValueError(f"crm.embedding {config.embedding} is not a multiple of crm.heads {config.heads}")


def _check_evaluate(config: EvaluateConfig) -> None:
    if any(low >= high for low, high in pairwise((0, *config.history_bands))):
        raise ValueError(f"evaluate.history_bands {list(config.history_bands)} must ascend from above 0")
    if config.rare < 1:
        raise ValueError(f"evaluate.rare {config.rare} is below 1; give the most training events of a rare item")
    if config.ranking_users < 0:
        raise ValueError(f"evaluate.ranking_users {config.ranking_users} is below 0; 0 turns the ranking off")


def check_sizes(config: TrainConfig, workers: int, section: str) -> None:
    """Refuse sizes of a training that cannot work.

    Args:
        workers: the most there may be.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    if config.batch_size < max(1, workers):
        raise ValueError(
            f"{section}.batch_size {config.batch_size} leaves some of {workers} workers without a sample; take at "
            f"least {max(1, workers)}, or fewer workers"
        )
    least = {"epochs": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1, "micro_batch": 0, "micro_tokens": 0}
    least |= {"patience": 0, "validate_every": 0, "storage_patience": 0, "clip": 0, "weight_decay": 0}
    for name, bound in least.items():
        value = getattr(config, name)
        if value < bound:
            raise ValueError(f"{section}.{name} {value} must be at least {bound}")
    if config.lr <= 0:
        raise ValueError(f"{section}.lr {config.lr} must be above 0")
    if config.micro_batch and config.micro_tokens:
        raise ValueError(f"{section} has both micro_batch and micro_tokens; set one of them to 0")


def check_engine(engine: EngineConfig, dtype: str) -> None:
    """Refuse an engine's settings that do not go together.

    Args:
        dtype: the backbone's type.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    places = {"offload_optimizer": engine.offload_optimizer, "offload_parameters": engine.offload_parameters}
    used = {name: place for name, place in places.items() if place != "none"}
    if engine.kind == "torch":
        for name, place in used.items():
            raise ValueError(f"engine.{name} {place!r} needs DeepSpeed; set engine.kind=deepspeed")
        if dtype == "float16":
            raise ValueError(
                "backbone.dtype float16 needs a scaled loss, which engine.kind torch does not have; take bfloat16, or "
                "engine.kind=deepspeed"
            )
    elif engine.zero_stage == 0 and dtype != "float32":
        raise ValueError(
            f"backbone.dtype {dtype} needs engine.zero_stage 1 or higher, not 0, whose checkpoints would be rounded; "
            "with one worker, stage 1 takes no more memory"
        )
    for name, place in used.items():
        needed = 3 if name == "offload_parameters" or place == "nvme" else 1
        if engine.zero_stage < needed:
            raise ValueError(
                f"engine.{name} {place!r} needs engine.zero_stage {needed} or higher, not {engine.zero_stage}"
            )
        if place == "nvme" and not engine.nvme_path:
            raise ValueError(f"engine.{name} is 'nvme', but engine.nvme_path is empty; give a folder on a local disk")


def check_finder(finder: FinderConfig, adapters: Collection[str]) -> None:
    """Refuse a range test that cannot work.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    if finder.stage != "crm" and finder.stage not in adapters:
        raise ValueError(f"finder.stage names {finder.stage!r}; there are: {', '.join(['crm', *sorted(adapters)])}")
    if not 0 < finder.low < finder.high or finder.steps < 3:
        raise ValueError(
            f"finder goes from {finder.low} to {finder.high} in {finder.steps} steps; it needs 0 < low < high and "
            "at least 3"
        )


def check_ray(ray: RayConfig) -> None:
    """Refuse numbers of workers that make no sense.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    if ray.workers < 0 or ray.min_workers < 0 or ray.max_failures < 0:
        raise ValueError(
            f"ray.workers {ray.workers}, ray.min_workers {ray.min_workers} and ray.max_failures {ray.max_failures} "
            "must not be negative"
        )
    if ray.min_workers > ray.workers:
        raise ValueError(f"ray.min_workers {ray.min_workers} is above ray.workers {ray.workers}, which is the maximum")


def check_serve(config: ServeConfig) -> None:
    """Refuse a service that cannot start or that refuses every request.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    least = {"replicas": 1, "threads": 1, "max_batch": 1, "max_candidates": 1}
    least |= {"max_history": 0, "batch_wait_ms": 0, "gpus": 0}
    for name, bound in least.items():
        value = getattr(config, name)
        if value < bound:
            raise ValueError(f"serve.{name} {value} must be at least {bound}")
    if not 0 <= config.port <= 65535:
        raise ValueError(f"serve.port {config.port} is no port; give 1 to 65535, or 0 for any free one")


def check_study(study: StudyConfig) -> None:
    """Refuse a grid of runs that cannot work; its points are checked when they are composed.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    for key, values in study.axes.items():
        if not values:
            raise ValueError(f"study.axes has no values for {key!r}; give some, or leave the axis out")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"study.seeds are {list(study.seeds)}; give at least one, each once")
    sections = vars(Config(synthesise=SynthesiseConfig()))
    known = sorted(name for name, section in sections.items() if hasattr(section, "seed"))
    for name in study.seeded:
        if name not in known:
            raise ValueError(f"study.seeded names {name!r}; sections with a seed are: {', '.join(known)}")
    if not study.commands or not study.metrics:
        raise ValueError("study.commands or study.metrics is empty; give at least one of each")
    if study.parallel < 1:
        raise ValueError(f"study.parallel {study.parallel} must be at least 1")
