"""Run chosen stages of the pipeline; the other commands of this package are short names for it."""

from collections.abc import Callable

from reclora_dist.cli.compose import command
from reclora_dist.config.schema import Config


def stage_command(*names: str) -> Callable[[], None]:
    """A command that runs the stages whose name starts with one of ``names``; inputs must be there."""

    @command
    def main(config: Config) -> None:
        """Run the stages."""
        from reclora_dist.ray_app.pipeline import run_stages

        run_stages(config, names)

    return main
