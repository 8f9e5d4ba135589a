"""What the store holds of each trial, read from manifests and scores.parquet: the source of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.artifacts import Store
from orchestrator.declaration import Declaration, TrialRecord
from orchestrator.spec import CATEGORIES, Category
from trainers import metrics
from trainers.scores import read_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One evaluation set of one trial; metrics are computed anew from its scores."""

    dataset: str
    category: Category
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A trial with what is there of it. `finished` is a Unix time; 0 where nothing is."""

    record: TrialRecord
    trained: bool
    train_accuracy: float | None
    train_pairs: int
    perf: dict[str, float]
    evaluations: tuple[EvaluationResult, ...]
    finished: float

    @property
    def complete(self) -> bool:
        """Trained, and evaluated on every declared set."""
        return self.trained and len(self.evaluations) == len(self.record.evaluations)

    @property
    def learned(self) -> bool:
        """Whether the last epoch's training accuracy is above chance by two standard errors."""
        if self.train_accuracy is None:
            return False
        return self.train_accuracy > metrics.chance_bound(self.train_pairs)

    def category_accuracy(self) -> dict[Category, float]:
        """Mean accuracy over the sets of each category that has one."""
        found: dict[Category, float] = {}
        for category in CATEGORIES:
            values = [item.metrics["accuracy"] for item in self.evaluations if item.category == category]
            if values:
                found[category] = sum(values) / len(values)
        return found


def trial_result(record: TrialRecord, store: Store) -> TrialResult:
    """Read one trial."""
    manifest = store.manifest("train", record.key)
    info: dict[str, Any] = manifest["info"] if manifest else {}
    finished = manifest["started"] + manifest["seconds"] if manifest else 0.0
    evaluations = []
    for wanted in record.evaluations:
        evaluated = store.manifest("evaluate", wanted.key)
        if evaluated is None:
            continue
        scores = read_scores(store.read("evaluate", wanted.key) / "scores.parquet")
        evaluations.append(
            EvaluationResult(
                dataset=wanted.dataset, category=wanted.category, metrics=metrics.summary(*scores)
            )
        )
        finished = max(finished, evaluated["started"] + evaluated["seconds"])
    return TrialResult(
        record=record,
        trained=manifest is not None,
        train_accuracy=info.get("train_accuracy"),
        train_pairs=info.get("pairs", 0),
        perf=info.get("perf", {}),
        evaluations=tuple(evaluations),
        finished=finished,
    )


def sweep_results(declaration: Declaration, store: Store) -> Sequence[TrialResult]:
    """Every trial of a sweep, in plan order."""
    return [trial_result(record, store) for record in declaration.trials]
