"""A study's results as files: one tidy table of all figures, means over seeds, paired differences, plots."""

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from reclora_dist.config.schema import Config
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate import plots
from reclora_dist.evaluate.metrics import Interval
from reclora_dist.evaluate.report import markdown_table
from reclora_dist.studies.grid import Point, Run
from reclora_dist.studies.results import Difference, Row, compare, rows_of, t_interval

NOTE = (
    "Of each seed: the difference on the same rows with its 95 % bootstrap interval over users (without an interval, "
    "if other rows were scored). Over seeds: mean and 95 % t interval of these differences."
)


@dataclass(frozen=True)
class Found:
    """Everything that a study's report shows; ``errors`` holds the error line of each run that failed."""

    title: str
    config: Config
    points: Sequence[Point]
    rows: Sequence[Row]
    differences: Sequence[Difference]
    errors: Mapping[str, str]


def gather(title: str, config: Config, runs: Sequence[Run], errors: Mapping[str, str]) -> Found:
    """Read what the finished runs have measured, and compare what ``study.compare`` names.

    Raises:
        ContractError: an evaluation is damaged.
    """
    finished = [run for run in runs if run.is_finished]
    points = list({run.point.name: run.point for run in runs}.values())
    rows = [row for run in finished for row in rows_of(run)]
    return Found(title, config, points, rows, compare(config, finished, rows), errors)


def write_results(folder: Folder, found: Found) -> None:
    """Write ``results.parquet``, ``results.csv``, ``differences.csv``, ``results.md`` and its plots."""
    table = tidy(found)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    folder.write("results.parquet", sink.getvalue())
    folder.write("results.csv", _csv(table.column_names, zip(*table.to_pydict().values(), strict=True)))
    header = ["difference", "point", "metric", "seed", "value", "low", "high"]
    cells = [
        (d.name, d.point, d.metric, seed, i.mean, i.low, i.high)
        for d in found.differences
        for seed, i in d.seeds.items()
    ]
    folder.write("differences.csv", _csv(header, cells))
    figures = _figures(found)
    for name, png in figures.items():
        folder.write(name, png)
    folder.write("results.md", markdown(found, list(figures)).encode())


def tidy(found: Found) -> pa.Table:
    """A row per point, seed, split, slice, model and metric; a column per axis holds the point's value on it."""
    columns = {f.name: [getattr(row, f.name) for row in found.rows] for f in dataclasses.fields(Row)}
    axes = {point.name: point.axes for point in found.points}
    for key in found.config.study.axes:
        columns[key] = [axes[row.point][key] for row in found.rows]
    return pa.table(columns)


def _csv(header: Sequence[str], rows: Iterable[tuple[object, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(itertools.chain([header], rows))
    return text.getvalue().encode()


def _shown(found: Found) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """The rows of the shown split by point and model, then by metric, in order of seeds."""
    study = found.config.study
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in found.rows:
        if (row.split, row.slice) == (study.split, "") and row.metric in study.metrics:
            groups.setdefault((row.point, row.model), {}).setdefault(row.metric, []).append(row)
    return groups


def markdown(found: Found, figures: Sequence[str]) -> str:
    """The report: question, means over seeds, differences, plots, failed runs."""
    study = found.config.study
    parts = [f"# {found.title}", study.question]
    if found.errors:
        lines = [f"* {name}: {error}" for name, error in found.errors.items()]
        parts += ["## Failed runs", "\n".join(lines)]
    table = [
        [point, model, *(_mean_and_deviation(by.get(metric, [])) for metric in study.metrics), str(_seeds(by))]
        for (point, model), by in _shown(found).items()
    ]
    if table:
        title = f"## {study.split}: mean over seeds ± standard deviation"
        parts += [title, markdown_table(["Point", "Model", *study.metrics, "Seeds"], table)]
    if found.differences:
        parts += ["## Paired differences", NOTE, _differences(found)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def _seeds(by: Mapping[str, Sequence[Row]]) -> int:
    return max(len(rows) for rows in by.values())


def _mean_and_deviation(rows: Sequence[Row]) -> str:
    values = [row.value for row in rows]
    if not values:
        return "–"
    deviation = f" ± {_figure(statistics.stdev(values))}" if len(values) > 1 else ""
    return _figure(statistics.fmean(values)) + deviation


def _figure(value: float, sign: str = "-") -> str:
    """Metrics have four places, paces and seconds one; ``-`` as a sign shows minus only, ``+`` shows both."""
    return f"{value:{sign},.1f}" if abs(value) >= 10 else f"{value:{sign}.4f}"


def _differences(found: Found) -> str:
    seeds = found.config.study.seeds
    header = ["Difference", "Point", "Metric", *(f"Seed {seed}" for seed in seeds), "Over seeds"]
    rows = [
        [d.name, d.point or "–", d.metric, *(_cell(d.seeds.get(seed)) for seed in seeds), _cell(d.over_seeds)]
        for d in found.differences
    ]
    return markdown_table(header, rows)


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    mean, low, high = (_figure(value, "+") for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _figures(found: Found) -> dict[str, bytes]:
    """A plot per axis of the first metric; for a study without axes, all models and differences."""
    study, metric = found.config.study, found.config.study.metrics[0]
    intervals = {key: _interval(by[metric]) for key, by in _shown(found).items() if metric in by}
    if not intervals:
        return {}
    if study.axes:
        points = {point.name: point for point in found.points}
        return {
            f"{metric}-{key.replace('.', '-')}.png": plots.against(key, metric, _lines(key, intervals, points))
            for key in study.axes
        }
    several = len(found.points) > 1
    models = {f"{model}@{point}" if several else model: interval for (point, model), interval in intervals.items()}
    paired = {
        f"{d.name} {d.point}" if several else d.name: _interval_of(d) for d in found.differences if d.metric == metric
    }
    return {f"{metric}.png": plots.forest(models, paired, metric)}


def _lines(
    key: str, intervals: Mapping[tuple[str, str], Interval], points: Mapping[str, Point]
) -> dict[str, dict[str, Interval]]:
    """A line per model and per setting of everything but ``key``."""
    lines: dict[str, dict[str, Interval]] = {}
    for (name, model), interval in intervals.items():
        point = points[name]
        rest = [override for override in point.overrides if not override.startswith(f"{key}=")]
        lines.setdefault(" ".join([model, *rest]), {})[point.axes[key]] = interval
    return lines


def _interval(rows: Sequence[Row]) -> Interval:
    """Over seeds by t; of one seed, that over users; without either the point alone."""
    if len(rows) > 1:
        return t_interval([row.value for row in rows])
    (row,) = rows
    return _drawn(Interval(row.value, row.low, row.high))


def _interval_of(difference: Difference) -> Interval:
    several = len(difference.seeds) > 1
    return _drawn(difference.over_seeds if several else next(iter(difference.seeds.values())))


def _drawn(interval: Interval) -> Interval:
    """An interval that a plot can draw: no bounds are a point."""
    return Interval(interval.mean, interval.mean, interval.mean) if math.isnan(interval.low) else interval
