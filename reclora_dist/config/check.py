"""Whether the settings of a run fit together, asked before any work starts."""

from reclora_dist.config.schema import Config, StudyConfig, SynthesiseConfig, TrainConfig


def check_config(config: Config) -> None:
    """Refuse a config that cannot work.

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
    check_sizes(config.crm_train, config.ray.workers, "crm_train")
    check_sizes(config.lora_train, config.ray.workers, "lora_train")


def check_sizes(config: TrainConfig, workers: int, section: str) -> None:
    """Refuse batch sizes that do not divide.

    Raises:
        ValueError: batch_size is no multiple of the workers, or of workers times micro_batch.
    """
    unit = max(1, workers) * (config.micro_batch or 1)
    if config.batch_size % unit:
        raise ValueError(
            f"{section}.batch_size {config.batch_size} is not a multiple of {unit} (workers x micro_batch); "
            f"take {config.batch_size // unit * unit or unit}"
        )


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
