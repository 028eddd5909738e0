"""python -m reclora_dist.cli.learning_rate finder.stage=crm: a range test of learning rates; curve and suggestion."""

from reclora_dist.cli.compose import command
from reclora_dist.config.schema import Config


@command
def main(config: Config) -> None:
    """Test the rates of one stage."""
    from reclora_dist.ray_app.pipeline import find_learning_rate

    find_learning_rate(config)


if __name__ == "__main__":
    main()
