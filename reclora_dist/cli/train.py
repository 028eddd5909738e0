"""python -m reclora_dist.cli.train: the CRM, then the adapters, with Ray Train and DeepSpeed.

torchrun --nproc-per-node 8 -m reclora_dist.cli.train paths.run=runs/mine      the same without Ray
"""

from reclora_dist.cli.compose import command
from reclora_dist.config.schema import Config


@command
def main(config: Config) -> None:
    """Train what is not up to date."""
    from reclora_dist.train.launch import is_torchrun, train_all

    if is_torchrun():
        train_all(config)
        return
    from reclora_dist.ray_app.pipeline import run_stages

    run_stages(config, ("crm", "adapter"))


if __name__ == "__main__":
    main()
