"""Whether the settings of a run fit together, asked before any work starts."""

from itertools import pairwise

from reclora_dist.config.schema import Config, EvaluateConfig, TrainConfig


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
    _check_evaluate(config.evaluate)
    check_sizes(config.crm_train, config.ray.workers, "crm_train")
    check_sizes(config.lora_train, config.ray.workers, "lora_train")


def _check_evaluate(config: EvaluateConfig) -> None:
    if any(low >= high for low, high in pairwise((0, *config.history_bands))):
        raise ValueError(f"evaluate.history_bands {list(config.history_bands)} must ascend from above 0")
    if config.rare < 1:
        raise ValueError(f"evaluate.rare {config.rare} is below 1; give the most training events of a rare item")
    if config.ranking_users < 0:
        raise ValueError(f"evaluate.ranking_users {config.ranking_users} is below 0; 0 turns the ranking off")


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
