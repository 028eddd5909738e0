"""Plots of a quality report as PNG bytes, drawn on the driver without a display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Two of Okabe and Ito's colours, as in the evaluation's report.
_BLUE, _RED = "#0072B2", "#D55E00"
_TICKS = 8
_CHARACTERS = 30
"""Longer labels of bars do not fit side by side."""


def rates(periods: Mapping[str, Any]) -> bytes:
    """Label rate over time, above the number of events."""
    rows = periods["rows"]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = list(range(len(rows)))
    values = [float("nan") if row["label_rate"] is None else row["label_rate"] for row in rows]
    axes.plot(places, values, color=_RED, linewidth=1.2, marker="o", markersize=2.5)
    axes.set(ylabel="Label rate", ylim=(0, None))
    below.bar(places, [row["events"] for row in rows], width=1.0, color=_BLUE)
    below.set(ylabel="Events")
    step = max(1, -(-len(rows) // _TICKS))
    below.set_xticks(places[::step], [row["from"] for row in rows][::step])
    return _png(figure, axes, below)


def distributions(found: Mapping[str, Sequence[Mapping[str, int]]], count: str) -> bytes:
    """Bars of two or more distributions (title → ranges ``from`` ... ``to`` with their ``count``) side by side."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, buckets) in zip(panels, found.items(), strict=True):
        _bars(axes, [_range(bucket) for bucket in buckets], [bucket["count"] for bucket in buckets])
        axes.set(title=title, ylabel=count)
    return _png(figure, *panels)


def levels(found: Sequence[Mapping[str, Any]]) -> bytes:
    """Events per rating level."""
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    _bars(axes, [f"{level['rating']:g}" for level in found], [level["events"] for level in found])
    axes.set(xlabel="Rating", ylabel="Events")
    return _png(figure, axes)


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[int]) -> None:
    places = list(range(len(labels)))
    axes.bar(places, values, color=_BLUE)
    wide = sum(map(len, labels)) > _CHARACTERS
    axes.set_xticks(places, labels, rotation=45 if wide else 0, ha="right" if wide else "center")


def _range(bucket: Mapping[str, int]) -> str:
    low, high = bucket["from"], bucket["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _png(figure: Figure, *panels: Axes) -> bytes:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()
