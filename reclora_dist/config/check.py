"""Whether the settings of a run fit together, asked before any work starts."""

from reclora_dist.config.schema import Config, CrmConfig, TrainConfig


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
    check_crm(config.crm, config.retrieval.strategy)
    check_sizes(config.crm_train, config.ray.workers, "crm_train")
    check_sizes(config.lora_train, config.ray.workers, "lora_train")


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
