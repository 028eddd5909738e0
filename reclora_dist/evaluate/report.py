"""The report of an evaluation: ``report.md`` with PNG files beside it, and ``report.html`` with all in one file."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry, add_file
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate import plots
from reclora_dist.evaluate.metrics import Interval

_TITLES = {
    "auc": "AUC", "gauc": "GAUC", "logloss": "LogLoss", "acc": "ACC", "ece": "ECE",
    "hit_ratio_at_1": "HR@1", "ndcg_at_5": "NDCG@5", "mrr": "MRR",
}  # fmt: skip
_DIFFERENCE = ("Difference", "Metric", "Value")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0 0 1.5rem } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left; border-bottom: 2px solid #888 } td + td, th + th { text-align: right } img { max-width: 100% }
"""


@dataclass(frozen=True)
class ModelResult:
    """One model on the rows of a split.

    ``labels`` int8 [n] and ``scores`` float64 [n] are the rows; ``mixtures`` float32 [n', matrices, experts] are the
    gates' weights, for as many rows as are at hand; None for a model without a gate.
    """

    name: str
    metrics: Mapping[str, Interval]
    labels: NDArray[np.int8]
    scores: NDArray[np.float64]
    samples_per_s: float | None = None
    mixtures: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Difference:
    """The paired difference of two models: ``better`` minus ``than``."""

    better: str
    than: str
    metric: str
    interval: Interval


@dataclass(frozen=True)
class SliceResult:
    """A part of the rows: how many rows and users, and by model the metrics that are defined there."""

    name: str
    rows: int
    users: int
    models: Mapping[str, Mapping[str, Interval]]
    differences: Sequence[Difference] = ()


@dataclass(frozen=True)
class RankingResult:
    """Metrics by model of ranking each user's next liked item among ``candidates`` items."""

    users: int
    candidates: int
    models: Mapping[str, Mapping[str, Interval]]
    differences: Sequence[Difference] = ()


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    ``slices`` are of the rows that all models score, ``all_rows`` of the whole split; ``seconds`` is the wall-clock
    time per stage.
    """

    title: str
    models: Sequence[ModelResult]
    differences: Sequence[Difference] = ()
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    slices: Sequence[SliceResult] = ()
    all_rows: Sequence[SliceResult] = ()
    ranking: RankingResult | None = None


@dataclass(frozen=True)
class _Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Plot:
    file: str
    caption: str
    png: bytes


def write_report(folder: Folder, report: Report) -> tuple[FileEntry, ...]:
    """Write ``report.md``, ``report.html`` and the plots into ``folder``; returns them for the folder's manifest.

    Raises:
        ValueError: the report has no model.
    """
    if not report.models:
        raise ValueError(f"report {report.title!r} has no model; evaluate at least one")
    tables, figures = _tables(report), _plots(report)
    files = {plot.file: plot.png for plot in figures}
    files["report.md"] = _markdown(report, tables, figures).encode()
    files["report.html"] = _page(report, tables, figures).encode()
    return tuple(add_file(folder, name, content) for name, content in files.items())


def _tables(report: Report) -> list[_Table]:
    metrics = [m for m in _TITLES if any(m in model.metrics for model in report.models)]
    header = ["Model", *(_TITLES[m] for m in metrics), "Samples/s"]
    rows = [[model.name, *(_cell(model.metrics.get(m)) for m in metrics), _rate(model)] for model in report.models]
    tables = [_Table("Models (point value and 95 % interval over users)", header, rows)]
    if report.differences:
        tables.append(_Table("Paired differences", _DIFFERENCE, _differences(report.differences)))
    tables += _slice_tables(report) + (_ranking_tables(report.ranking) if report.ranking else [])
    if report.seconds:
        stages = [[stage, f"{seconds:.1f}"] for stage, seconds in report.seconds.items()]
        stages.append(["total", f"{sum(report.seconds.values()):.1f}"])
        tables.append(_Table("Time", ["Stage", "Seconds"], stages))
    return tables


def _differences(differences: Sequence[Difference]) -> list[list[str]]:
    return [[f"{d.better} − {d.than}", _TITLES[d.metric], _cell(d.interval, "+")] for d in differences]


def _slice_tables(report: Report) -> list[_Table]:
    tables = []
    for title, found in (("Slices", report.slices), ("Slices of all rows", report.all_rows)):
        if found:
            tables.append(_slice_table(title, found))
        paired = [[s.name.replace("_", " "), *row] for s in found for row in _differences(s.differences)]
        if paired:
            tables.append(_Table(f"{title}: paired differences", ["Slice", *_DIFFERENCE], paired))
    return tables


def _slice_table(title: str, slices: Sequence[SliceResult]) -> _Table:
    """A line per slice and model; the counts stand in the first of a slice, and alone where nothing is defined."""
    metrics = [m for m in _TITLES if any(m in found for s in slices for found in s.models.values())]
    rows = []
    for part in slices:
        first = [part.name.replace("_", " "), f"{part.rows:,}", f"{part.users:,}"]
        defined = {model: found for model, found in part.models.items() if found} or {"–": {}}
        for model, found in defined.items():
            rows.append([*first, model, *(_cell(found.get(metric)) for metric in metrics)])
            first = ["", "", ""]
    return _Table(title, ["Slice", "Rows", "Users", "Model", *(_TITLES[m] for m in metrics)], rows)


def _ranking_tables(ranking: RankingResult) -> list[_Table]:
    title = f"Next liked item among {ranking.candidates} ({ranking.users:,} users)"
    metrics = list(next(iter(ranking.models.values())))
    rows = [[model, *(_cell(found[m]) for m in metrics)] for model, found in ranking.models.items()]
    tables = [_Table(title, ["Model", *(_TITLES[m] for m in metrics)], rows)]
    if ranking.differences:
        tables.append(_Table(f"{title}: paired differences", _DIFFERENCE, _differences(ranking.differences)))
    return tables


def _cell(value: Interval | None, sign: str = "-") -> str:
    """``-`` as a sign shows minus only, ``+`` shows both."""
    if value is None or math.isnan(value.mean):
        return "–"
    if math.isnan(value.low):
        return f"{value.mean:{sign}.4f}"
    return f"{value.mean:{sign}.4f} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"


def _rate(model: ModelResult) -> str:
    return "–" if model.samples_per_s is None else f"{model.samples_per_s:,.0f}"


def _plots(report: Report) -> list[_Plot]:
    curves = [plots.Curve(model.name, model.labels, model.scores) for model in report.models]
    found = [
        _Plot("roc.png", "ROC curves", plots.roc(curves)),
        _Plot("calibration.png", "Calibration: share of likes against score", plots.calibration(curves)),
    ]
    auc = {model.name: model.metrics["auc"] for model in report.models if "auc" in model.metrics}
    paired = {f"{d.better} − {d.than}": d.interval for d in report.differences if d.metric == "auc"}
    if auc:
        found.insert(0, _Plot("auc.png", "AUC and its paired differences", plots.forest(auc, paired)))
    slices = {s.name.replace("_", " "): {m: f["auc"] for m, f in s.models.items() if "auc" in f} for s in report.slices}
    if any(slices.values()):
        found.append(_Plot("slices.png", "AUC by slice", plots.slices(slices, [model.name for model in report.models])))
    mixtures = {m.name: m.mixtures for m in report.models if m.mixtures is not None and m.mixtures.shape[-1] > 1}
    if mixtures:
        found.append(
            _Plot(
                "gates.png",
                "Use of the experts by the gates",
                plots.gates(mixtures, [model.name for model in report.models]),
            )
        )
    return found


def _markdown(report: Report, tables: Sequence[_Table], figures: Sequence[_Plot]) -> str:
    """The report as Markdown; plots are links to the PNG files beside it."""
    parts = [f"# {report.title}"]
    for table in tables:
        parts += [f"## {table.title}", markdown_table(table.header, table.rows)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"* {note}" for note in report.notes)]
    parts += [f"## {plot.caption}\n\n![{plot.caption}]({plot.file})" for plot in figures]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(_row(row) for row in (header, align, *rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _page(report: Report, tables: Sequence[_Table], figures: Sequence[_Plot]) -> str:
    """The report as one HTML page that needs no other file and no network."""
    body = [f"<h1>{html.escape(report.title)}</h1>"]
    for table in tables:
        head, rows = _html_row(table.header, "th"), "".join(_html_row(row, "td") for row in table.rows)
        body.append(f"<h2>{html.escape(table.title)}</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>")
    if report.notes:
        body.append("<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in report.notes) + "</ul>")
    for plot in figures:
        image, caption = base64.b64encode(plot.png).decode(), html.escape(plot.caption)
        body.append(f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{image}">')
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
