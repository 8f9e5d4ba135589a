"""What the store holds of each trial, read from manifests and scores.parquet: the source of every table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from orchestrator.report.audit import leaked_rows
from orchestrator.spec.trials import CATEGORIES, Category
from orchestrator.store.artifacts import Store, weights_digest
from orchestrator.store.records import Declaration, EvaluationRecord, TrialRecord
from trainers import metrics
from trainers.errors import Damaged
from trainers.scores import PairScores, read_pair_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One evaluation set of one trial; metrics are computed anew from its scores. `finished` is a Unix time.

    `epoch` is as in the record, `weights` the digest of the training's weights that were scored, where it is known;
    `leaked` are the pairs that training has seen, None where that is not known; `left_out` counts the pairs that were
    over the length limits.
    """

    dataset: str
    category: Category
    metrics: dict[str, float]
    finished: float
    scores: PairScores = field(compare=False, repr=False)
    leaked: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)
    left_out: int = 0
    epoch: int | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A trial with what is there of it. Times are Unix times, None where nothing is.

    What is damaged is not there, and `faults` says so. `train_left_out` counts the pairs over the length limits.
    """

    record: TrialRecord
    trained: bool
    train_accuracy: float | None
    train_pairs: int
    perf: dict[str, float]
    evaluations: tuple[EvaluationResult, ...]
    started: float | None
    trained_at: float
    faults: tuple[str, ...] = ()
    train_left_out: int = 0

    @property
    def finished(self) -> float:
        """When its last stage was committed."""
        return max((item.finished for item in self.evaluations), default=self.trained_at)

    @property
    def complete(self) -> bool:
        """Trained, and evaluated on every declared set."""
        return self.trained and len(self.evaluations) == len(self.record.evaluations)

    @property
    def learned(self) -> bool:
        """Whether the last epoch's training accuracy is above chance by two standard errors."""
        if self.train_accuracy is None or not self.train_pairs:
            return False
        return self.train_accuracy > metrics.chance_bound(self.train_pairs)

    @property
    def last_epoch(self) -> int | None:
        """The epoch that the trial is judged by."""
        return max((item.epoch or 0 for item in self.record.evaluations), default=0) or None

    @property
    def final(self) -> tuple[EvaluationResult, ...]:
        """The evaluations after the last epoch."""
        last = self.last_epoch
        return tuple(item for item in self.evaluations if item.epoch == last)

    def category_accuracy(self) -> dict[Category, float]:
        """Mean accuracy after the last epoch over the sets of each category whose declared sets are all evaluated."""
        found: dict[Category, float] = {}
        last, final = self.last_epoch, self.final
        for category in CATEGORIES:
            declared = [
                item for item in self.record.evaluations if (item.category, item.epoch) == (category, last)
            ]
            values = [item.metrics["accuracy"] for item in final if item.category == category]
            if values and len(values) == len(declared):
                found[category] = sum(values) / len(values)
        return found


# Of a manifest: how many pairs of the set that it was made with were over the length limits.
_LeftOut = Callable[[dict[str, Any]], int]


def trial_result(record: TrialRecord, store: Store, left_out: _LeftOut | None = None) -> TrialResult:
    """Read one trial."""
    left_out = left_out or _left_out_in(store)
    manifest, evaluations, faults = None, [], list[str]()
    try:
        manifest = store.manifest("train", record.key)
    except Damaged as error:
        faults.append(str(error))
    info: dict[str, Any] = manifest["info"] if manifest else {}
    for wanted in record.evaluations:
        try:
            found = _evaluation(wanted, record.train_digest, store, left_out)
        except Damaged as error:
            faults.append(str(error))
        else:
            evaluations += [found] if found else []
    stale = _stale(evaluations, weights_digest(manifest))
    if stale:
        faults.append(f"{of_other_weights([item.dataset for item in stale])}; run the sweep again")
    return TrialResult(
        record=record,
        trained=manifest is not None,
        train_accuracy=info.get("train_accuracy"),
        train_pairs=info.get("pairs", 0),
        perf=info.get("perf", {}),
        evaluations=tuple(item for item in evaluations if item not in stale),
        started=manifest["started"] if manifest else None,
        trained_at=_committed(manifest) if manifest else 0.0,
        faults=tuple(faults),
        train_left_out=left_out(manifest) if manifest else 0,
    )


def _stale(evaluations: Sequence[EvaluationResult], now: str | None) -> list[EvaluationResult]:
    """Where a trial was scored with several weights, the evaluations that are not of those that it has `now`."""
    mixed = len({item.weights for item in evaluations} - {None}) > 1
    return [item for item in evaluations if mixed and item.weights not in (None, now)]


def of_other_weights(datasets: Sequence[str]) -> str:
    """That scores on these sets do not count."""
    sets = ", ".join(dict.fromkeys(datasets))
    return f"the scores on {sets} are of weights of before: it was trained again since, to other last bits"


def _left_out_in(store: Store) -> _LeftOut:
    @cache
    def of_prepared(key: str) -> int:
        prepared = store.sound_manifest("prepare", key)
        return int(prepared["info"].get("too_long", 0)) if prepared else 0

    return lambda manifest: of_prepared(manifest["inputs"].get("data", ""))


def pair_metrics(scores: PairScores, leaked: NDArray[np.bool_] | None) -> dict[str, float]:
    """Every metric of a set."""
    return {
        **metrics.summary(scores.chosen, scores.rejected),
        **metrics.controlled(scores.chosen, scores.rejected, scores.longer, leaked),
    }


def _evaluation(
    wanted: EvaluationRecord, train_digest: str, store: Store, left_out: _LeftOut
) -> EvaluationResult | None:
    found = store.found("evaluate", wanted.key, "scores.parquet")
    if found is None:
        return None
    evaluated, folder = found
    scores = read_pair_scores(folder / "scores.parquet")
    leaked = leaked_rows(store, train_digest, wanted.dataset_digest)
    seen = None if leaked is None else np.isin(scores.index, leaked)
    return EvaluationResult(
        dataset=wanted.dataset,
        category=wanted.category,
        metrics=pair_metrics(scores, seen),
        finished=_committed(evaluated),
        scores=scores,
        leaked=seen,
        left_out=left_out(evaluated),
        epoch=wanted.epoch,
        weights=evaluated["info"].get("weights"),
    )


def all_scores(result: TrialResult, store: Store) -> pa.Table:
    """One row per evaluated pair of a trial, with the set that it is of and the epoch after which it was scored."""
    keys = {(item.dataset, item.epoch): item.key for item in result.record.evaluations}
    tables = []
    for item in result.evaluations:
        file = store.read_file("evaluate", keys[item.dataset, item.epoch], "scores.parquet")
        scores = parquet.read_table(file).replace_schema_metadata(None)
        names = pa.array([item.dataset] * len(scores))
        epochs = pa.array([item.epoch] * len(scores), pa.int64())
        scores = scores.set_column(scores.column_names.index("dataset"), "dataset", names)
        tables.append(scores.append_column("epoch", epochs))
    return pa.concat_tables(tables, promote_options="permissive")


def _committed(manifest: dict[str, Any]) -> float:
    return float(manifest["started"] + manifest["seconds"])


def sweep_results(declaration: Declaration, store: Store) -> Sequence[TrialResult]:
    """Every trial of a sweep, in plan order."""
    left_out = _left_out_in(store)
    return [trial_result(record, store, left_out) for record in declaration.trials]


def trial_rows(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """The rows of trials.parquet: one per trial and evaluation set, missing ones included."""
    rows: list[dict[str, Any]] = []
    for result in results:
        record = result.record
        spec = {
            "trial": record.name,
            "key": record.key,
            **{
                name: record.parameters.get(name)
                for name in ("model", "reward", "train_set", "seed", "lr", "epochs")
            },
            "parameters": json.dumps(record.parameters, sort_keys=True),
            "state": "complete" if result.complete else "missing",
            "learned": result.learned,
            "train_accuracy": result.train_accuracy,
            "train_left_out": result.train_left_out,
        }
        found = {(item.dataset, item.epoch): item.metrics for item in result.evaluations}
        left_out = {(item.dataset, item.epoch): item.left_out for item in result.evaluations}
        rows += [
            {
                **spec,
                "evaluation_set": wanted.dataset,
                "category": wanted.category,
                "epoch": wanted.epoch,
                "evaluated": (wanted.dataset, wanted.epoch) in found,
                "left_out": left_out.get((wanted.dataset, wanted.epoch)),
                **{
                    name: found.get((wanted.dataset, wanted.epoch), {}).get(name)
                    for name in (*metrics.METRICS, *metrics.CONTROLLED)
                },
            }
            for wanted in record.evaluations
        ]
    return rows
