"""The quality report as one HTML page that needs no other file and no network."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spark_jobs.report import plots
from spark_jobs.report.histogram import PERCENTILES
from spark_jobs.report.thresholds import Threshold

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0 0 1.5rem } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left; border-bottom: 2px solid #888 } td + td, th + th { text-align: right } img { max-width: 100% }
.crossed { color: #a00; font-weight: bold }
"""
_POPULAR = 10

Report = Mapping[str, Any]


def page(report: Report, limits: Sequence[Threshold]) -> bytes:
    """The page of a report (``quality.json``) and its thresholds."""
    crossed = [str(limit) for limit in limits if limit.crossed]
    verdict = f"{len(crossed)} of {len(limits)} thresholds are crossed." if crossed else "All thresholds hold."
    body = [
        "<h1>Quality of the build</h1>",
        f'<p class="{"crossed" if crossed else "held"}">{verdict}</p>',
        _list(crossed),
        *_counts(report),
        *_distributions(report),
        *_items(report),
        *_compared(report),
        _table("Thresholds", ("Threshold", "Value", "Limit", "Holds"), map(_limit, limits)),
    ]
    head = f'<meta charset="utf-8"><title>Quality of the build</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(body)}</body></html>\n'.encode()


def _counts(report: Report) -> list[str]:
    steps, read = report["events"], report["events"]["read"]
    bad = report["quarantine"]
    title = f"Rows put aside, of all tables ({_share(bad['share'])} of the event rows)"
    sizes = [("users", report["users"]), ("items", report["items"])]
    samples = [
        (split, _whole(row["crm"]), _whole(row["text"]), _share(row["label_rate"]))
        for split, row in report["samples"].items()
    ]
    return [
        _table(
            "Event rows at each step", ("Step", "Rows", "Share of read"), [_row(s, n, read) for s, n in steps.items()]
        ),
        _table("Users and items", ("", "Number"), [(name, _whole(number)) for name, number in sizes]),
        _table("Samples", ("Split", "CRM shards", "Text shards", "Label rate"), samples),
        _table(title, ("Reason", "Rows"), [(reason, _whole(rows)) for reason, rows in bad["rows"].items()]),
    ]


def _distributions(report: Report) -> list[str]:
    active, past, periods = report["activity"], report["histories"], report["periods"]
    buckets = {f"Events per {kind[:-1]}": active[kind]["buckets"] for kind in active}
    lengths = {f"Length of the {name} history": past[name]["buckets"] for name in past}
    filled = [(name, _share(row["empty"]), _share(row["full"])) for name, row in past.items()]
    covered = report["coverage"]
    rows = [
        ("share of the short history that the long one holds", _share(covered["covered"])),
        ("different items in the long history", _number(covered["distinct_long"])),
        ("different items in the short history", _number(covered["distinct_short"])),
    ]
    return [
        _plot(f"Label rate by {periods['unit']}", plots.rates(periods)),
        _plot("Ratings", plots.levels(report["levels"])),
        _plot("Activity", plots.distributions(buckets, "Number")),
        _spread("Events of a user and of an item", active),
        _plot("Histories", plots.distributions(lengths, "Samples")),
        _spread("Lengths of the histories", past),
        _table("Filled histories", ("History", "Empty", "Full"), filled),
        _table(f"Long against short ({covered['samples']:,} text samples, means)", ("", "Value"), rows),
    ]


def _items(report: Report) -> list[str]:
    events, popular = report["events"]["events"], list(report["profile"]["items"].items())[:_POPULAR]
    title = f"Popular items (the first 1 % have {_share(report['popularity']['top_1_percent'])} of the events)"
    return [_table(title, ("Item", "Events", "Share"), [_row(item, rows, events) for item, rows in popular])]


def _compared(report: Report) -> list[str]:
    if not report["drift"]:
        return ["<h2>Drift</h2><p>There is no previous build to compare with.</p>"]
    indices = [(name, f"{report['drift'][name]:.4f}") for name in ("items", "levels", "labels")]
    rows = [*indices, ("change of the number of events", f"{report['drift']['row_change']:+.2%}")]
    title = f"Drift against the build {report['previous'][:12]} (population stability index)"
    return [_table(title, ("", "Value"), rows)]


def _spread(title: str, found: Mapping[str, Any]) -> str:
    names = [f"p{percent}" for percent in PERCENTILES]
    rows = [(name, *[_whole(row.get(p)) for p in names], _number(row["mean"])) for name, row in found.items()]
    return _table(title, ("", *names, "Mean"), rows)


def _limit(limit: Threshold) -> tuple[str, str, str, str]:
    shown = "–" if limit.value is None else f"{limit.value:,.6g}"
    return limit.name, shown, "off" if limit.off else f"{limit.limit:,g}", "no" if limit.crossed else "yes"


def _row(name: str, rows: int, whole: int) -> tuple[str, str, str]:
    return name, _whole(rows), _share(rows / whole if whole else None)


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(_cells(row, "td") for row in rows)
    heading = f"<h2>{html.escape(title)}</h2>\n"
    return f"{heading}<table><thead>{_cells(header, 'th')}</thead>\n<tbody>{body}</tbody></table>\n"


def _cells(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _plot(title: str, png: bytes) -> str:
    image, caption = base64.b64encode(png).decode(), html.escape(title)
    return f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{image}">\n'
