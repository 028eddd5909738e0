"""Plots of an evaluation as PNG bytes; pure functions of the results, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from reclora_dist.evaluate.metrics import Interval

# Okabe and Ito's colours, distinguishable for colour-blind readers; line styles tell models apart without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_GREY = "#777777"
_BINS = 10


@dataclass(frozen=True)
class Curve:
    """One model's test rows: labels int8 [n] and probabilities float64 [n]."""

    name: str
    labels: NDArray[np.int8]
    scores: NDArray[np.float64]


def roc(curves: Sequence[Curve]) -> bytes:
    """ROC curves of all models on shared axes."""
    figure, axes = _square()
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8)
    for place, curve in enumerate(curves):
        order = np.argsort(-curve.scores, kind="stable")
        last = np.append(np.flatnonzero(np.diff(curve.scores[order])), len(order) - 1)  # ties are one step
        hits = np.cumsum(curve.labels[order], dtype=np.int64)[last]
        alarms = last + 1 - hits
        rates = np.append(0, alarms) / alarms[-1], np.append(0, hits) / hits[-1]
        axes.plot(*rates, label=curve.name, linewidth=1.6, **_style(place))
    axes.set(xlabel="False positive rate", ylabel="True positive rate", title="ROC", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False)
    return _png(figure)


def calibration(curves: Sequence[Curve]) -> bytes:
    """Share of likes against mean score, in bins of equal counts, above the distribution of the scores."""
    figure = Figure(figsize=(5.2, 6.2), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8)
    for place, curve in enumerate(curves):
        order = np.argsort(curve.scores, kind="stable")
        parts = [part for part in np.array_split(order, _BINS) if len(part)]
        means = [curve.scores[part].mean() for part in parts]
        rates = [curve.labels[part].mean() for part in parts]
        axes.plot(means, rates, label=curve.name, marker="o", markersize=3.5, linewidth=1.4, **_style(place))
        below.hist(curve.scores, bins=np.linspace(0, 1, 41), density=True, histtype="step", **_style(place))
    axes.set(ylabel="Share of likes", title=f"Calibration ({_BINS} bins of equal counts)", ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    below.set(xlabel="Score", ylabel="Density", xlim=(0, 1))
    _bare(axes, below)
    return _png(figure)


def gates(mixtures: Mapping[str, NDArray[np.float32]], models: Sequence[str]) -> bytes:
    """How gates use their experts, from mixtures float32 [n, matrices, experts] of some of the report's models.

    Left: weight of each expert, mean and standard deviation over samples and matrices. Middle: share of the mixtures in
    which it has the largest weight. Right: distribution of the mixtures' entropy as a share of the uniform mixture's.
    """
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    width = 0.8 / len(mixtures)
    for place, (name, mixture) in enumerate(mixtures.items()):
        style = _style(models.index(name))
        flat = mixture.reshape(-1, mixture.shape[-1]).astype(np.float64)
        experts = np.arange(flat.shape[1]) + (place - (len(mixtures) - 1) / 2) * width
        errors = {"ecolor": _GREY, "elinewidth": 0.8}
        left.bar(experts, flat.mean(0), width, yerr=flat.std(0), color=style["color"], label=name, error_kw=errors)
        largest = np.bincount(flat.argmax(axis=1), minlength=flat.shape[1]) / len(flat)
        middle.bar(experts, largest, width, color=style["color"])
        right.hist(_entropy(flat), bins=np.linspace(0, 1, 51), density=True, histtype="step", label=name, **style)
    most = max(mixture.shape[-1] for mixture in mixtures.values())
    left.set(xlabel="Expert", ylabel="Weight", title="Mean mixture (bars: standard deviation)", ylim=(0, None))
    middle.set(xlabel="Expert", ylabel="Share of mixtures", title="Expert with the largest weight")
    for axes in (left, middle):
        axes.axhline(1 / most, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(most))
    right.set(xlabel="Entropy / log(experts)", ylabel="Density", title="Entropy of the mixtures", xlim=(0, 1.02))
    right.legend(loc="upper left", frameon=False)
    _bare(left, middle, right)
    return _png(figure)


def forest(models: Mapping[str, Interval], differences: Mapping[str, Interval], metric: str = "AUC") -> bytes:
    """A metric per model and its paired differences, with 95 % intervals."""
    rows = max(len(models), len(differences))
    figure = Figure(figsize=(9.5 if differences else 5.2, 1.4 + 0.42 * rows), layout="constrained")
    panels = figure.subplots(1, 2 if differences else 1, squeeze=False)[0]
    _intervals(panels[0], models, _COLOURS[0])
    panels[0].set(xlabel=f"{metric}, 95 % interval", title="Models")
    if differences:
        _intervals(panels[1], differences, _COLOURS[1])
        panels[1].axvline(0, color=_GREY, linewidth=0.8)
        panels[1].set(xlabel=f"Difference of {metric}, 95 % interval", title="Paired differences")
    _bare(*panels)
    return _png(figure)


def slices(found: Mapping[str, Mapping[str, Interval]], models: Sequence[str]) -> bytes:
    """AUC with 95 % intervals of each of the report's models in each slice where it is defined."""
    shown = {name: by_model for name, by_model in found.items() if by_model}
    figure = Figure(figsize=(8.0, 1.2 + len(shown) * (0.3 + 0.14 * len(models))), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))[::-1]
    for place, model in enumerate(models):
        own = [(at, by_model[model]) for at, by_model in zip(places, shown.values(), strict=True) if model in by_model]
        shift = 0.7 * (0.5 - (place + 0.5) / len(models))
        means = [interval.mean for _, interval in own]
        reach = np.abs([[i.mean - i.low, i.high - i.mean] for _, i in own]).reshape(-1, 2).T
        marks = {"fmt": "os^Dv"[place % 5], "color": _style(place)["color"], "capsize": 2, "markersize": 4}
        axes.errorbar(means, [at + shift for at, _ in own], xerr=reach, label=model, linewidth=1.2, **marks)
    axes.set_yticks(places, list(shown))
    axes.set(xlabel="AUC, 95 % interval", title="AUC by slice", ylim=(-0.6, len(shown) - 0.4))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _bare(axes)
    return _png(figure)


def against(key: str, metric: str, series: Mapping[str, Mapping[str, Interval]]) -> bytes:
    """A metric with its intervals against the values of the setting ``key``: series name to value to interval.

    Values that are all numbers lie at their places (on a logarithmic axis, if they are above 0 and span a factor of 20
    or more), others side by side.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    values = list(dict.fromkeys(value for line in series.values() for value in line))
    numbers = _numbers(values)
    places = numbers or {value: float(place) for place, value in enumerate(values)}
    for place, (name, line) in enumerate(series.items()):
        x = np.array([places[value] for value in line])
        means = np.array([interval.mean for interval in line.values()])
        reach = np.abs([[i.mean - i.low, i.high - i.mean] for i in line.values()]).T
        order = np.argsort(x, kind="stable")
        style = _style(place)
        axes.errorbar(x[order], means[order], reach[:, order], label=name, marker="o", markersize=4, capsize=3, **style)
    if not numbers:
        axes.set_xticks(list(places.values()), values)
    elif min(numbers.values()) > 0 and max(numbers.values()) >= 20 * min(numbers.values()):
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=metric)
    axes.legend(frameon=False, fontsize=8)
    _bare(axes)
    return _png(figure)


def _numbers(values: Sequence[str]) -> dict[str, float] | None:
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return None


def _intervals(axes: Axes, rows: Mapping[str, Interval], colour: str) -> None:
    places = np.arange(len(rows))[::-1]
    means = np.array([row.mean for row in rows.values()])
    reach = np.array([[row.mean - row.low, row.high - row.mean] for row in rows.values()]).T
    axes.errorbar(means, places, xerr=np.abs(reach), fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(places, list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _entropy(mixtures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of each row of [n, experts] as a share of log(experts); 0 log 0 is 0."""
    logs = np.log(np.where(mixtures > 0, mixtures, 1.0))
    share: NDArray[np.float64] = -(mixtures * logs).sum(axis=1) / np.log(mixtures.shape[1])
    return np.clip(share, 0, 1)


def _style(place: int) -> dict[str, Any]:
    """Colour and line of the model at ``place`` in the report; the same in every plot."""
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _LINES[place % len(_LINES)]}


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal")
    _bare(axes)
    return figure, axes


def _bare(*panels: Axes) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return sink.getvalue()
