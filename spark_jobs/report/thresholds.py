"""The limits of a build (``QualityConfig``): what each is compared with, and what to do about one that is crossed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reclora_dist.config.schema import QualityConfig
from reclora_dist.contract.schema import SPLITS

_LABELS = "look at events.like_at_least and at the rating column"
_SHORT_LOG = "use a longer log, or lower events.k_core"
_CHANGED = "compare with the report that stays; if the change is meant, raise the limit for this build"


@dataclass(frozen=True)
class Threshold:
    """A limit and what it is compared with; the value is none where the build has nothing to compare."""

    name: str
    what: str
    value: float | None
    limit: float
    remedy: str
    off: bool = False

    @property
    def crossed(self) -> bool:
        """Whether the value lies on the wrong side of the limit."""
        if self.off or self.value is None:
            return False
        return self.value > self.limit if self.name.startswith("max_") else self.value < self.limit

    def __str__(self) -> str:
        side = "above" if self.name.startswith("max_") else "below"
        return f"{self.what} {self.value:.6g} is {side} {self.name} = {self.limit:g}: {self.remedy}"


def check_limits(config: QualityConfig) -> None:
    """Refuse limits that nothing can hold.

    Raises:
        ValueError: one is negative or no number, or the label rates leave no room.
    """
    for name, value in asdict(config).items():
        if any(not limit >= 0 for limit in (value if isinstance(value, Sequence) else [value])):
            raise ValueError(f"{name} = {value}: a limit is a number of at least 0")
    if config.min_label_rate > config.max_label_rate:
        raise ValueError(f"min_label_rate = {config.min_label_rate} is above max_label_rate = {config.max_label_rate}")


def thresholds(config: QualityConfig, report: Mapping[str, Any], drift: Mapping[str, float] | None) -> list[Threshold]:
    """Every threshold with its value in the figures of a build and in its drift (none without a previous build)."""
    return [*_of_build(config, report), *_of_drift(config, drift or {})]


def _of_build(config: QualityConfig, report: Mapping[str, Any]) -> list[Threshold]:
    bad, rate = report["quarantine"]["share"], report["label_rate"]
    return [
        Threshold(
            "max_quarantined", "bad share of the event rows", bad, config.max_quarantined,
            "look at events/quarantine/, correct the log or events.source",
        ),
        Threshold("min_users", "number of users", report["users"], config.min_users, _SHORT_LOG),
        Threshold("min_items", "number of items", report["items"], config.min_items, _SHORT_LOG),
        *_of_samples(config, report["samples"]),
        Threshold("min_label_rate", "label rate", rate, config.min_label_rate, _LABELS),
        Threshold("max_label_rate", "label rate", rate, config.max_label_rate, _LABELS),
        Threshold(
            "min_mean_history", "mean length of the long histories", report["histories"]["long"]["mean"],
            config.min_mean_history, "use a longer log, or raise events.min_history or retrieval.long",
        ),
        Threshold(
            "min_coverage", "share of the short histories that the long ones hold", report["coverage"]["covered"],
            config.min_coverage, "build histories and shards again; both begin like the same ranking",
        ),
    ]  # fmt: skip


def _of_samples(config: QualityConfig, samples: Mapping[str, Any]) -> list[Threshold]:
    remedy = "use a longer log, other events.fractions, or lower events.min_history"
    return [
        Threshold(
            f"min_samples[{split}]", f"number of {split} samples", samples.get(split, {}).get("crm"), limit, remedy
        )
        for split, limit in zip(SPLITS, config.min_samples, strict=True)
    ]


def _of_drift(config: QualityConfig, drift: Mapping[str, float]) -> list[Threshold]:
    limit, off = config.max_drift, config.max_drift == 0
    change = abs(drift["row_change"]) if drift else None
    indices = [
        Threshold(f"max_drift[{name}]", f"drift of the {name}", drift.get(name), limit, _CHANGED, off)
        for name in ("items", "levels", "labels")
    ]
    what = "relative change of the number of events"
    rows = Threshold(
        "max_row_change", what, change, config.max_row_change, _CHANGED, config.max_row_change == 0
    )  # fmt: skip
    return [*indices, rows]
