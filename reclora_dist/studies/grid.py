"""From a study's settings to its runs: every combination of overrides with every seed, and which runs are finished."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reclora_dist.config.check import OTHER_MODELS, check_config, check_raw, shuffled_names
from reclora_dist.config.load import ConfigError
from reclora_dist.config.redact import redacted_text
from reclora_dist.config.schema import Config, PathsConfig, StudyConfig
from reclora_dist.contract.manifest import Manifest, commit, digest, is_current, read_manifest
from reclora_dist.contract.schema import EVALUATION, STUDY_RUN
from reclora_dist.contract.storage import Folder

ALONE = "all"
"""Name of the point of a study without points and axes."""

Compose = Callable[[Sequence[str]], Config]
"""Overrides, as on the command line, to a checked configuration."""


@dataclass(frozen=True)
class Point:
    """One place of the grid: its name (a folder, too), its overrides, and its value on each axis."""

    name: str
    overrides: tuple[str, ...]
    axes: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A point with one seed: ``arguments`` are what the pipeline's command line gets, ``config`` what they compose."""

    point: Point
    seed: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """How progress and errors call it."""
        return f"{self.point.name} seed {self.seed}"

    @property
    def folder(self) -> Folder:
        """The run folder."""
        return Folder(self.config.paths.run)

    @property
    def config_digest(self) -> str:
        """Digest of all settings and commands, but not of where the run lies or of which study it is a part."""
        part = StudyConfig(commands=self.config.study.commands)
        return digest(dataclasses.replace(self.config, paths=PathsConfig(), study=part))

    @property
    def evaluation(self) -> Folder | None:
        """The evaluation that its commands made; None where they make none, or have not yet."""
        found = self.folder.child("evaluation")
        evaluates = {"pipeline", "evaluate"} & set(self.config.study.commands)
        return found if evaluates and found.exists("manifest.json") else None

    @property
    def is_finished(self) -> bool:
        """Whether it went to its end with this configuration, and its evaluation is still the one it made."""
        return is_current(self.folder.child("finished"), STUDY_RUN, self.config_digest, self._made)

    def finish(self, seconds: float) -> None:
        """Write the manifest that says so."""
        facts = {
            "point": self.point.name,
            "seed": self.seed,
            "arguments": [redacted_text(argument) for argument in self.arguments],
            "seconds": round(seconds, 1),
        }
        record = Manifest(STUDY_RUN.name, STUDY_RUN.version, self.config_digest, self._made, (), facts)
        commit(self.folder.child("finished"), record)

    @property
    def _made(self) -> dict[str, str]:
        """Content digest of the evaluation; nothing where there is none."""
        return {"evaluation": read_manifest(self.evaluation, EVALUATION).content_digest} if self.evaluation else {}


def expand(study: StudyConfig) -> list[Point]:
    """All points: the named ones times all combinations of the axes' values.

    Raises:
        ConfigError: two points have one name.
    """
    named = study.points or {"": ()}
    keys = list(study.axes)
    points = []
    for (name, overrides), values in itertools.product(named.items(), itertools.product(*study.axes.values())):
        axes = dict(zip(keys, values, strict=True))
        parts = [name, *(f"{_short(key, keys)}-{value}" for key, value in axes.items())]
        label = re.sub(r"[^\w.-]+", "_", "_".join(part for part in parts if part)) or ALONE  # no "=": Hive's sign
        points.append(Point(label, (*overrides, *(f"{key}={value}" for key, value in axes.items())), axes))
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"study: points of one name: {', '.join(twice)}; name them differently")
    return points


def _short(key: str, keys: Sequence[str]) -> str:
    """The last word of a key, if no other axis ends with it."""
    last = key.rpartition(".")[2]
    return last if [k.rpartition(".")[2] for k in keys].count(last) == 1 else key


def runs(config: Config, overrides: Sequence[str], compose: Compose) -> list[Run]:
    """The runs of a study, seed by seed; everything is composed and checked before any of them starts.

    Args:
        config: what ``overrides`` compose to; its ``study`` is the grid, ``paths.run`` the study's folder.

    Raises:
        ConfigError: a point's override has an unknown key or a wrong value, or settings do not fit together; the text
            names the point. Or ``compare`` names a model or point that there is not.
    """
    found: list[Run] = []
    for point in expand(config.study):
        try:
            composed = compose([*overrides, *point.overrides])
            check_config(composed)
            check_raw(composed)
            if composed.paths.shards:
                raise ValueError("paths.shards is given, but every run of a study makes its own shards; leave it out")
        except ValueError as error:
            raise ConfigError(f"point {point.name!r}: {error}") from error
        found += [_run(config, composed, [*overrides, *point.overrides], point, seed) for seed in config.study.seeds]
    _check_comparisons(config.study, found)
    places = {seed: place for place, seed in enumerate(config.study.seeds)}
    return sorted(found, key=lambda run: places[run.seed])


def _check_comparisons(study: StudyConfig, found: Sequence[Run]) -> None:
    models = {name: set(OTHER_MODELS) for name in (run.point.name for run in found)}
    for run in found:
        models[run.point.name] |= {*run.config.adapters, *shuffled_names(run.config).values()}
    for side in itertools.chain(*study.compare):
        model, _, point = side.partition("@")
        if point and point not in models:
            raise ConfigError(f"study.compare names point {point!r}; there are: {', '.join(models)}")
        known = models[point] if point else set().union(*models.values())
        if model not in known:
            raise ConfigError(f"study.compare names model {model!r}; there are: {', '.join(sorted(known))}")


def _run(study: Config, composed: Config, arguments: Sequence[str], point: Point, seed: int) -> Run:
    """The same as composing the seed's overrides, which would take half a second each."""
    seeded = [name for name in study.study.seeded if getattr(composed, name) is not None]
    changes = {name: dataclasses.replace(getattr(composed, name), seed=seed) for name in seeded}
    run = Folder(study.paths.run).child(f"{point.name}/seed-{seed}").uri
    config = dataclasses.replace(
        composed,
        paths=PathsConfig(run),
        serve=dataclasses.replace(composed.serve, check=False),
        **changes,
    )
    own = [*(f"{name}.seed={seed}" for name in seeded), "serve.check=false", f"paths.run='{run}'"]
    return Run(point, seed, (*arguments, *own), config)
