"""python -m reclora_dist.cli.pipeline: all stages in order; those that are up to date are skipped."""

from reclora_dist.cli.compose import command
from reclora_dist.config.schema import Config


@command
def main(config: Config) -> None:
    """From raw logs to an evaluated, served adapter."""
    from reclora_dist.ray_app.pipeline import run_pipeline

    run_pipeline(config)


if __name__ == "__main__":
    main()
