"""Ends of a training that trying again does not mend; each message names the remedy.

Both travel between processes, so they take a message, like any exception.
"""

from collections.abc import Sequence

import torch

from reclora_dist.train.engine import MicroBatch, StepResult


class Diverged(ValueError):
    """The loss or its gradient is no number any more; checkpoints before it are whole."""


class OutOfMemory(ValueError):
    """A forward or backward pass did not fit into the device's memory."""


def diverged(stage: str, step: int, result: StepResult, lr: float) -> Diverged:
    """What to say of a step whose loss or gradient is no number."""
    return Diverged(
        f"{stage}: step {step} has loss {result.loss} and gradient norm {result.gradient_norm} at learning rate "
        f"{lr:.2g}. Lower lr or clip of its section, take bfloat16 in place of float16, or look for values out of "
        "range in the shards; the checkpoints before it are whole."
    )


def out_of_memory(stage: str, where: str, micro_batches: Sequence[MicroBatch]) -> OutOfMemory:
    """What to say if memory ran out ``where``, in a step of these micro-batches or in the validation after it."""
    rows = max(len(batch) for batch, _ in micro_batches)
    return OutOfMemory(
        f"{stage}: out of memory in {where}, with up to {rows} samples per forward pass of the training. Set "
        f"micro_batch of its section to {max(1, rows // 2)} or micro_tokens, backbone.gradient_checkpointing=true, or "
        "a higher engine.zero_stage, and run again: it goes on from the last checkpoint."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host; torch's CPU allocator has no exception class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
