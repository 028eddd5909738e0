"""python -m reclora_dist.cli.serve serve.adapter=FOLDER: score over HTTP until Ctrl-C."""

from reclora_dist.cli.compose import command
from reclora_dist.config.check import check_serve
from reclora_dist.config.schema import Config


@command
def main(config: Config) -> None:
    """Serve an adapter folder; without one, the run's best."""
    from reclora_dist.ray_app.check import adapter_to_serve
    from reclora_dist.ray_app.service import serve_until_stopped
    from reclora_dist.ray_app.session import connect

    check_serve(config.serve)
    with connect(config.ray) as cluster:
        serve_until_stopped(adapter_to_serve(config), config.serve, config.evaluate, cluster)


if __name__ == "__main__":
    main()
