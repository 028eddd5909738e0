"""A grid of runs that answers a question: every point with every seed goes through the pipeline.

  python -m reclora_dist.cli.study study=NAME [overrides]

Overrides are those of reclora_dist.cli.pipeline and hold for all runs, e.g.

  study=few_shot "study.seeds=[0]"                              one seed in place of three
  study=variants data=movielens_1m events.source.path=ml-1m     on another log
  study=scaling synthesise.events_per_user=30 study.parallel=2  two runs at a time
  study=few_shot paths.run=/data/few_shot                       where the runs and results lie

A run lies in a folder of its own, POINT/seed-N below paths.run (runs/studies/NAME), with its log. Stages that another
run of the study has made from the same settings and inputs are linked, not made again. A finished run is skipped, so
the same command goes on after a Ctrl-C or a failure. In the end paths.run holds results.md (means, paired differences,
plots), results.csv and results.parquet (all figures). A study is a file of configs/study; its settings are documented
as StudyConfig in reclora_dist/config/schema.py.
"""

import sys
from collections.abc import Sequence

import yaml
from hydra.errors import HydraException

from reclora_dist.cli.compose import CONFIGS, load
from reclora_dist.config.check import check_study
from reclora_dist.config.load import ConfigError
from reclora_dist.config.schema import Config


def main() -> None:
    """Run the study that the arguments name; without one, list them."""
    overrides = sys.argv[1:]
    if {"--help", "-h"} & set(overrides):
        print(f"{__doc__}\n{studies()}")
        return
    try:
        run(overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstudy: stopped; finished runs stay, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def run(overrides: Sequence[str]) -> None:
    """Run what is not finished, then write the results.

    Raises:
        ValueError: no study is named, a setting is wrong (nothing was started then), or runs have failed.
    """
    names = [o.partition("=")[2] for o in overrides if o.startswith("study=")]
    if len(names) > 1:
        raise ConfigError(f"study= is given {len(names)} times ({', '.join(names)}): name one study")
    name = "".join(names)
    if not (CONFIGS / f"study/{name}.yaml").is_file():
        raise ConfigError(f"name a study, study=NAME (--help says more)\n{studies()}")
    config = compose(overrides)
    check_study(config.study)
    from reclora_dist.studies import grid

    runs = grid.runs(config, overrides, compose)
    print(f"study {name}: {config.study.question}", flush=True)
    from reclora_dist.contract.storage import Folder
    from reclora_dist.ray_app.study import run_study
    from reclora_dist.studies.report import gather, write_results

    errors = run_study(config, runs)
    home = Folder(config.paths.run)
    write_results(home, gather(name, config, runs, errors))
    print(f"results: {home.path('results.md')}", flush=True)
    if errors:
        told = "\n".join(f"  {run}: {error}" for run, error in errors.items())
        raise ValueError(f"{len(errors)} of {len(runs)} runs failed; the same command tries them again\n{told}")


def compose(overrides: Sequence[str]) -> Config:
    """The configuration of these overrides.

    Raises:
        ConfigError: an unknown group, key or value.
    """
    try:
        return load(overrides)
    except HydraException as error:
        raise ConfigError(str(error).partition("\nConfig search path")[0]) from error


def studies() -> str:
    """A line per shipped study: its name and its question."""
    files = sorted((CONFIGS / "study").glob("*.yaml"))
    questions = {path.stem: yaml.safe_load(path.read_text())["study"]["question"] for path in files}
    return "\n".join(f"  study={name:<20} {question}" for name, question in questions.items())


if __name__ == "__main__":
    main()
