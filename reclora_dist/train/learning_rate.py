"""A range test of learning rates: the loss while the rate grows from step to step (arXiv 1506.01186, section 3.3)."""

import io
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from reclora_dist.config.schema import FinderConfig, TrainConfig
from reclora_dist.contract.storage import Folder
from reclora_dist.train.context import Context
from reclora_dist.train.loop import MicroBatches, Task

SMOOTHING = 0.9
"""Weight of the past in the running mean of the loss."""
GROWN = 4.0
"""The test ends when the smoothed loss is so many times its smallest value."""


@dataclass(frozen=True)
class Point:
    """Learning rate of a step and the smoothed loss at it."""

    lr: float
    loss: float


def range_test(task: Task, train: TrainConfig, finder: FinderConfig, context: Context) -> list[Point]:
    """Train with growing rates; the other groups' rates grow alike. The model is of no use afterwards."""
    points, mean, smallest = list[Point](), 0.0, math.inf
    ratio = (finder.high / finder.low) ** (1 / max(1, finder.steps - 1))
    with closing(_steps(task)) as steps:
        for number, micro_batches in zip(range(finder.steps), steps, strict=False):
            lr = finder.low * ratio**number
            torch.manual_seed(hash((train.seed, number, context.rank)))
            result = task.engine.step(micro_batches, lr / train.lr)
            if result.skipped:  # float16 finds its scale first
                continue
            losses = context.gather(result.loss)
            if not (math.isfinite(result.gradient_norm) and all(map(math.isfinite, losses))):
                break
            mean = SMOOTHING * mean + (1 - SMOOTHING) * sum(losses) / len(losses)
            loss = mean / (1 - SMOOTHING ** (len(points) + 1))
            points.append(Point(lr, loss))
            smallest = min(smallest, loss)
            if (number + 1) % train.log_every == 0:
                context.say(f"{task.name}: step {number + 1}/{finder.steps} learning rate {lr:.2e} loss {loss:.4f}")
            if loss > GROWN * smallest:
                break
    return points


def _steps(task: Task) -> Generator[MicroBatches, None, None]:
    epoch = 0
    while True:
        yield from task.batches(epoch, 0, ())
        epoch += 1


def steepest(points: Sequence[Point]) -> float | None:
    """The rate at which the loss falls fastest, in its logarithm, before the minimum; None if it never fell."""
    losses = np.array([point.loss for point in points])
    if len(points) < 3 or (low := int(losses.argmin())) < 2:
        return None
    rates = np.log([point.lr for point in points])
    return points[int(np.gradient(losses[: low + 1], rates[: low + 1]).argmin())].lr


def write_range_test(folder: Folder, name: str, points: Sequence[Point], say: Callable[[str], None]) -> None:
    """Write the curve as JSON and PNG and say what it suggests."""
    chosen = steepest(points)
    found = {"suggested": chosen, "points": [[point.lr, round(point.loss, 6)] for point in points]}
    folder.write(f"{name}.json", json.dumps(found, indent=1).encode())
    folder.write(f"{name}.png", _plot(name, points, chosen))
    found_it = (
        f"the loss falls fastest at learning rate {chosen:.2e}" if chosen else "the loss never fell: lower finder.low"
    )
    say(f"{name}: {found_it}; curve: {folder.path(f'{name}.png')}")


def _plot(name: str, points: Sequence[Point], chosen: float | None) -> bytes:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.lr for point in points], [point.loss for point in points], color="#0072B2", linewidth=1.6)
    if chosen:
        axes.axvline(chosen, color="#777777", linewidth=0.8)
        axes.annotate(f" {chosen:.1e}", (chosen, max(point.loss for point in points)), va="top")
    axes.set(xscale="log", xlabel="Learning rate", ylabel="Smoothed training loss", title=f"{name}: range test")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
