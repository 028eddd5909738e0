"""Every metric of the project, once.

Names carry no prefix. Ray exports a metric as ``ray_<name>`` and adds ``_total`` to a counter; Spark jobs export theirs
as they are. ``series`` spells the names as a query must. No label is called ``route``: Ray fails on that tag.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "ray_"


@dataclass(frozen=True)
class Metric:
    """One metric: its name, what it counts, and the labels that every sample of it must carry."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_REQUEST_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCH_ROWS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0)

TRAIN_STEPS = Metric("reclora_train_steps", "counter", "optimiser steps done", ("stage",))
TRAIN_SAMPLES = Metric("reclora_train_samples", "counter", "samples trained on, over all workers", ("stage",))
TRAIN_LOSS = Metric("reclora_train_loss", "gauge", "mean loss of rank 0's samples in the last step", ("stage",))
TRAIN_SAMPLES_PER_SECOND = Metric(
    "reclora_train_samples_per_second", "gauge", "training samples per second, over all workers", ("stage",)
)
TRAIN_LEARNING_RATE = Metric("reclora_train_learning_rate", "gauge", "learning rate of the last step", ("stage",))
TRAIN_GRADIENT_NORM = Metric("reclora_train_gradient_norm", "gauge", "gradient norm before clipping", ("stage",))
TRAIN_STEP_SECONDS = Metric(
    "reclora_train_step_seconds", "histogram", "seconds per optimiser step", ("stage",), _STEP_SECONDS
)
TRAIN_VALIDATION_AUC = Metric("reclora_train_validation_auc", "gauge", "AUC of the last validation", ("stage",))
TRAIN_TOKENS_PER_SECOND = Metric(
    "reclora_train_tokens_per_second", "gauge", "real tokens per second, over all workers; 0 without text", ("stage",)
)
TRAIN_DATA_WAIT_SHARE = Metric(
    "reclora_train_data_wait_share", "gauge", "share of the time that a worker waits for data, at most", ("stage",)
)
TRAIN_COMMUNICATION_SHARE = Metric(
    "reclora_train_communication_share",
    "gauge",
    "share of the time that an all-reduce of all trainable parameters takes, if nothing hides it",
    ("stage",),
)
TRAIN_FLOPS_PER_SECOND = Metric(
    "reclora_train_flops_per_second", "gauge", "model FLOPs per second, over all workers", ("stage",)
)
TRAIN_MFU = Metric(
    "reclora_train_mfu", "gauge", "model FLOPs over those of a large matrix product on the same devices", ("stage",)
)
TRAIN_PEAK_MEMORY_BYTES = Metric(
    "reclora_train_peak_memory_bytes", "gauge", "peak memory of the worker with the most: device or process", ("stage",)
)
TRAIN_SLOWEST_WORKER = Metric(
    "reclora_train_slowest_worker",
    "gauge",
    "time of the slowest worker's data and forward passes over the others' median",
    ("stage",),
)
TRAIN_FAILURES = Metric(
    "reclora_train_failures", "gauge", "times that the workers were lost and started again in this training", ("stage",)
)
TRAIN_GATE_ENTROPY = Metric(
    "reclora_train_gate_entropy", "gauge", "mean entropy of the gates' mixtures, as a share of log K", ("stage",)
)
TRAIN_GATE_WEIGHT = Metric(
    "reclora_train_gate_weight", "gauge", "mean weight of an expert in the gates' mixtures", ("stage", "expert")
)
TRAIN_GATE_LARGEST = Metric(
    "reclora_train_gate_largest",
    "gauge",
    "share of the gates' mixtures in which an expert has the largest weight",
    ("stage", "expert"),
)

EVALUATION_METRIC = Metric(
    "reclora_evaluation_metric", "gauge", "value of an evaluation metric", ("model", "split", "metric")
)
EVALUATION_SAMPLES = Metric(
    "reclora_evaluation_samples", "counter", "samples scored in evaluations", ("model", "split")
)

SERVE_REQUESTS = Metric("reclora_serve_requests", "counter", "HTTP requests that ended", ("endpoint", "status"))
SERVE_LATENCY_SECONDS = Metric(
    "reclora_serve_latency_seconds", "histogram", "seconds from request to answer", ("endpoint",), _REQUEST_SECONDS
)
SERVE_BATCH_ROWS = Metric("reclora_serve_batch_rows", "histogram", "rows scored in one batch", (), _BATCH_ROWS)
SERVE_CANDIDATES = Metric("reclora_serve_candidates", "counter", "candidate items scored")

SPARK_ROWS = Metric("reclora_spark_rows", "gauge", "rows a Spark job wrote", ("job", "table"))
SPARK_QUARANTINED_ROWS = Metric(
    "reclora_spark_quarantined_rows", "gauge", "raw rows a Spark job put aside", ("job", "reason")
)
SPARK_JOB_SECONDS = Metric("reclora_spark_job_seconds", "gauge", "seconds a Spark job took", ("job",))

SPARK = (SPARK_ROWS, SPARK_QUARANTINED_ROWS, SPARK_JOB_SECONDS)
"""Exported by Spark jobs themselves, all others by Ray."""

ALL = (
    TRAIN_STEPS,
    TRAIN_SAMPLES,
    TRAIN_LOSS,
    TRAIN_SAMPLES_PER_SECOND,
    TRAIN_LEARNING_RATE,
    TRAIN_GRADIENT_NORM,
    TRAIN_STEP_SECONDS,
    TRAIN_VALIDATION_AUC,
    TRAIN_TOKENS_PER_SECOND,
    TRAIN_DATA_WAIT_SHARE,
    TRAIN_COMMUNICATION_SHARE,
    TRAIN_FLOPS_PER_SECOND,
    TRAIN_MFU,
    TRAIN_PEAK_MEMORY_BYTES,
    TRAIN_SLOWEST_WORKER,
    TRAIN_FAILURES,
    TRAIN_GATE_ENTROPY,
    TRAIN_GATE_WEIGHT,
    TRAIN_GATE_LARGEST,
    EVALUATION_METRIC,
    EVALUATION_SAMPLES,
    SERVE_REQUESTS,
    SERVE_LATENCY_SECONDS,
    SERVE_BATCH_ROWS,
    SERVE_CANDIDATES,
    *SPARK,
)


TRAINING = {
    "loss": TRAIN_LOSS,
    "gradient_norm": TRAIN_GRADIENT_NORM,
    "learning_rate": TRAIN_LEARNING_RATE,
    "samples_per_second": TRAIN_SAMPLES_PER_SECOND,
    "tokens_per_second": TRAIN_TOKENS_PER_SECOND,
    "data_wait_share": TRAIN_DATA_WAIT_SHARE,
    "communication_share": TRAIN_COMMUNICATION_SHARE,
    "flops_per_second": TRAIN_FLOPS_PER_SECOND,
    "mfu": TRAIN_MFU,
    "peak_memory_bytes": TRAIN_PEAK_MEMORY_BYTES,
    "slowest_worker": TRAIN_SLOWEST_WORKER,
}
"""The gauge of every figure of a step, by the figure's name in summaries and records."""


def series(metric: Metric) -> tuple[str, ...]:
    """The names that Prometheus stores a metric's samples under."""
    if metric in SPARK:
        return (metric.name,)
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}[metric.kind]
    return tuple(f"{PREFIX}{metric.name}{suffix}" for suffix in suffixes)
