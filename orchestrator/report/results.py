"""The results of trials, read from the store, and the pairs on which models are compared: the source of every table.

A model's tokenizer decides which pairs are over the length limits, so models may have scored different pairs of a set.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from orchestrator.report.audit import leaked_rows
from orchestrator.report.tables import sentence
from orchestrator.spec.datasets import pairs_of
from orchestrator.store.artifacts import WEIGHTS, Store, weights_digest
from orchestrator.store.records import (
    CATEGORIES,
    Category,
    Declaration,
    EvaluationRecord,
    TrialRecord,
    declared_sweeps,
    read_declaration,
)
from trainers.data.records import Message
from trainers.errors import Damaged, SpecError, StorageError
from trainers.evaluate import metrics
from trainers.evaluate.scores import SUITE_SCORE, PairScores, read_pair_scores
from trainers.specs import given_name
from trainers.storage import Location, matching

# The columns of a training's log that are shown, and at how many steps.
CURVES = ("loss", "accuracy", "margin", "grad_norm", "lr")
CURVE_POINTS = 100

logger = logging.getLogger(__name__)

SCORES = "scores.parquet"
# The columns of trials.parquet that are a trial's parameters, and those that are metrics.
_COLUMNS = ("model", "reward", "train_set", "seed", "lr", "epochs")
_METRICS = (*metrics.METRICS, *metrics.CONTROLLED, SUITE_SCORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(EvaluationRecord):
    """A finished evaluation, by its manifest. `finished` is a Unix time.

    `left_out` counts the pairs over the length limits; `weights` is the digest of the weights that were scored, if it is known.
    """

    finished: float
    attempt: str = ""
    left_out: int = 0
    weights: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult(Evaluated):
    """A finished evaluation with its scores and the metrics that are computed from them.

    `leaked` marks the pairs that training has seen; None if that is unknown.
    """

    metrics: dict[str, float]
    scores: PairScores = field(compare=False, repr=False)
    leaked: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """A trial and what the store has of it, by the manifests. Times are Unix times.

    Damaged artifacts count as missing, and `faults` names them. `train_left_out` counts the pairs over the length limits;
    `validation_accuracy` is the accuracy on held-out training pairs after the last epoch.
    """

    record: TrialRecord
    trained: bool
    train_accuracy: float | None
    train_pairs: int
    perf: dict[str, float]
    evaluations: tuple[Evaluated, ...]
    started: float | None
    trained_at: float
    faults: tuple[str, ...] = ()
    train_left_out: int = 0
    validation_accuracy: float | None = None
    answered: bool = True

    @property
    def finished(self) -> float:
        return max((item.finished for item in self.evaluations), default=self.trained_at)

    @property
    def complete(self) -> bool:
        """Trained, and evaluated on every declared set and on all answers."""
        return self.trained and self.answered and len(self.evaluations) == len(self.record.evaluations)

    @property
    def learned(self) -> bool:
        """Whether the last epoch's training accuracy is above chance by two standard errors."""
        if self.train_accuracy is None or not self.train_pairs:
            return False
        return self.train_accuracy > metrics.chance_bound(self.train_pairs)

    @property
    def last_epoch(self) -> int | None:
        return max((item.epoch or 0 for item in self.record.evaluations), default=0) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult(TrialState):
    """A trial with the scores of its evaluations."""

    evaluations: tuple[EvaluationResult, ...]

    @property
    def final(self) -> tuple[EvaluationResult, ...]:
        last = self.last_epoch
        return tuple(item for item in self.evaluations if item.epoch == last)

    def category_accuracy(self) -> dict[Category, float]:
        """Return the mean accuracy after the last epoch of each category whose declared sets are all evaluated."""
        found: dict[Category, float] = {}
        last, final = self.last_epoch, self.final
        for category in CATEGORIES:
            wanted = sum((item.category, item.epoch) == (category, last) for item in self.record.evaluations)
            values = [item.metrics["accuracy"] for item in final if item.category == category]
            if values and len(values) == wanted:
                found[category] = sum(values) / len(values)
        return found


def trial_states(records: Sequence[TrialRecord], store: Store) -> list[TrialState]:
    """Return what the store has of each trial, without reading scores."""

    @functools.cache
    def too_long(prepared: str) -> int:
        manifest = store.sound_manifest("prepare", prepared)
        return int(manifest["info"].get("too_long", 0)) if manifest else 0

    scored = [key for record in records for key in record.scored]
    store.look(train=[record.key for record in records], evaluate=scored)
    return [_trial_state(record, store, too_long) for record in records]


def sweep_results(declaration: Declaration, store: Store) -> list[TrialResult]:
    return with_scores(trial_states(declaration.trials, store), store)


def with_scores(states: Sequence[TrialState], store: Store) -> list[TrialResult]:
    """Return the trials with the scores of their evaluations; trials that have them are returned as they are."""
    # Seeds, models and reward types share splits.
    known = Known(
        functools.cache(functools.partial(leaked_rows, store)),
        functools.cache(functools.partial(_prompts, store)),
    )
    unread = [
        item.key for state in states if not isinstance(state, TrialResult) for item in state.evaluations
    ]
    store.fetch_ahead("evaluate", unread, SCORES)
    return [
        state if isinstance(state, TrialResult) else _with_scores(state, store, known) for state in states
    ]


class Known(NamedTuple):
    """What is known of splits by their digests: the evaluated rows that a training split holds, and each row's prompt."""

    leaked: Callable[[str, str], NDArray[np.int64] | None]
    prompts: Callable[[str], NDArray[np.int64] | None]


def _prompts(store: Store, digest: str) -> NDArray[np.int64] | None:
    """Return for each row of a split the first row with its prompt; None where no two rows have the same one.

    None, too, where the rows are missing, or all have one prompt, which then tells nothing apart.
    """
    first: dict[tuple[Message, ...], int] = {}
    found = [first.setdefault(pair.prompt, row) for row, pair in enumerate(pairs_of(store, digest))]
    return np.array(found) if 1 < len(first) < len(found) else None


def _with_scores(state: TrialState, store: Store, known: Known) -> TrialResult:
    scored = [_result(item, state.record, store, known) for item in state.evaluations]
    if None in scored:
        # Another driver has scored it again since its state was read.
        return _with_scores(trial_states([state.record], store)[0], store, known)
    return TrialResult(**{**_fields(state), "evaluations": tuple(item for item in scored if item)})


def _trial_state(record: TrialRecord, store: Store, too_long: Callable[[str], int]) -> TrialState:
    """Read one trial; `too_long` counts the pairs of a prepared set that are over the length limits."""
    manifest, evaluations, faults = None, list[Evaluated](), list[str]()
    try:
        manifest = store.manifest("train", record.key)
    except Damaged as error:
        faults.append(str(error))
    for wanted in record.evaluations:
        try:
            found = store.sound("evaluate", wanted.key, SCORES)
        except Damaged as error:
            faults.append(str(error))
        else:
            if found:
                evaluations.append(
                    Evaluated(
                        **_fields(wanted),
                        finished=_committed(found),
                        attempt=found["attempt"],
                        left_out=too_long(found["inputs"].get("data", "")),
                        weights=found["info"].get("weights"),
                    )
                )
    # If it was scored with several weights, only the scores of its present weights count.
    mixed = len({item.weights for item in evaluations} - {None}) > 1
    weights = store.sound_manifest(WEIGHTS, record.key) if mixed else None
    now = weights and weights_digest(weights)
    stale = [item for item in evaluations if mixed and item.weights not in (None, now)]
    if stale:
        faults.append(f"{of_other_weights([item.dataset for item in stale])}; run the sweep again")
    info: dict[str, Any] = manifest["info"] if manifest else {}
    return TrialState(
        record=record,
        trained=manifest is not None,
        train_accuracy=info.get("train_accuracy"),
        train_pairs=info.get("pairs", 0),
        perf=info.get("perf", {}),
        evaluations=tuple(item for item in evaluations if item not in stale),
        started=manifest["started"] if manifest else None,
        trained_at=_committed(manifest) if manifest else 0.0,
        faults=tuple(faults),
        train_left_out=too_long(manifest["inputs"].get("data", "")) if manifest else 0,
        validation_accuracy=next(iter(info.get("validation_accuracy", ())[-1:]), None),
        answered=all(store.complete("evaluate", key) for key in record.answers),
    )


def _fields(item: EvaluationRecord | TrialState) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _result(item: Evaluated, record: TrialRecord, store: Store, known: Known) -> EvaluationResult | None:
    """Read the scores of an evaluation; None if another attempt has replaced them."""
    try:
        found = store.found("evaluate", item.key, SCORES)
    except Damaged:
        return None
    if found is None or found[0]["attempt"] != item.attempt:
        return None
    scores = read_pair_scores(found[1] / SCORES)
    if scores.prompts is None and (prompts := known.prompts(item.dataset_digest)) is not None:
        scores = replace(scores, prompts=prompts[scores.index])
    rows = known.leaked(record.train_digest, item.dataset_digest)
    leaked = None if rows is None else np.isin(scores.index, rows)
    return EvaluationResult(**_fields(item), metrics=_metrics(scores, leaked), scores=scores, leaked=leaked)


def _metrics(scores: PairScores, leaked: NDArray[np.bool_] | None) -> dict[str, float]:
    return {
        **metrics.summary(scores.chosen, scores.rejected),
        **metrics.controlled(scores.chosen, scores.rejected, scores.longer, leaked),
        **scores.suite,
    }


def _committed(manifest: dict[str, Any]) -> float:
    return float(manifest["started"] + manifest["seconds"])


def of_other_weights(datasets: Sequence[str]) -> str:
    """Say that scores on these sets do not count, because they are of other weights."""
    sets = ", ".join(dict.fromkeys(datasets))
    return f"the scores on {sets} are of earlier weights: it was trained again since, and its weights differ in their last bits"


def all_scores(result: TrialState, store: Store) -> pa.Table:
    """Return one row per evaluated pair of a trial, with its set and the epoch after which it was scored."""
    tables = []
    for item in result.evaluations:
        file = store.read_file("evaluate", item.key, SCORES)
        scores = parquet.read_table(file).replace_schema_metadata(None)
        names = pa.array([item.dataset] * len(scores))
        scores = scores.set_column(scores.column_names.index("dataset"), "dataset", names)
        tables.append(scores.append_column("epoch", pa.array([item.epoch] * len(scores), pa.int64())))
    return pa.concat_tables(tables, promote_options="permissive")


def trial_rows(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Return the rows of trials.parquet: one per trial and evaluation set, missing ones included."""
    rows: list[dict[str, Any]] = []
    for result in results:
        record = result.record
        spec = {
            "trial": record.name,
            "key": record.key,
            **{name: record.parameters.get(name) for name in _COLUMNS},
            "parameters": json.dumps(record.parameters, sort_keys=True),
            "state": "complete" if result.complete else "missing",
            "learned": result.learned,
            "train_accuracy": result.train_accuracy,
            "train_left_out": result.train_left_out,
        }
        done = {item.key: item for item in result.evaluations}
        for wanted in record.evaluations:
            found = done.get(wanted.key)
            values = found.metrics if found else {}
            said = {"evaluation_set": wanted.dataset, "category": wanted.category, "epoch": wanted.epoch}
            said |= {"evaluated": found is not None, "left_out": found.left_out if found else None}
            rows.append({**spec, **said, **{name: values.get(name) for name in _METRICS}})
    return rows


def curve_rows(store: Store, key: str) -> list[dict[str, Any]]:
    """Return at most CURVE_POINTS rows of a training's log, or of its last complete checkpoint while it is running.

    A damaged log gives no rows, as nothing is trained again for a curve.
    """
    if store.complete("train", key):
        try:
            rows = parquet.read_table(store.read_file("train", key, "log.parquet")).to_pylist()
        except Damaged as error:
            logger.warning("%s; its curve is left out", error)
            return []
        return thinned(rows, len(rows), CURVE_POINTS)
    rows, total = _checkpointed(store.root / "checkpoints" / key)
    return thinned(rows, total, CURVE_POINTS)


def thinned(rows: Sequence[dict[str, Any]], total: int, points: int) -> list[dict[str, Any]]:
    """Return the rows of at most `points` steps, evenly spread from 1 to `total`.

    The steps depend only on `total` and `points`, so the points of an unfinished curve are all in the finished one.
    """
    if total <= points:
        return list(rows)
    wanted = {1 + round(i * (total - 1) / (points - 1)) for i in range(points)}
    return [row for row in rows if int(row["step"]) in wanted]


def _checkpointed(folder: Location) -> tuple[list[dict[str, Any]], int]:
    """Return the rows and the total number of steps of the newest checkpoint; skip other and half-written files."""
    best: tuple[int, list[dict[str, Any]], int] = (0, [], 0)
    for file in matching(folder, "*.json"):
        try:
            marker = json.loads(file.read_text())
            step, total = int(marker["step"]), int(marker["total"])
            rows = [_curve_row(row) for row in marker["log"]]
        # A running training removes and replaces its markers.
        except (OSError, ValueError, KeyError, TypeError):
            continue
        best = max(best, (step, rows, total), key=lambda item: item[0])
    return best[1], best[2]


def _curve_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a log row's values for a curve. Raises KeyError, ValueError or TypeError for anything else."""
    values = {name: float(row.get(name, math.nan)) for name in CURVES}
    return {"step": int(row["step"]), "time": float(row["time"]), **values}


def by_seeds(results: Sequence[TrialResult]) -> list[list[TrialResult]]:
    """Group the trials that differ only in their seed: by training set, model and reward type."""
    found: dict[tuple[str, str, str], list[TrialResult]] = {}
    for item in results:
        record = item.record
        found.setdefault((record.train_set, record.model, record.reward), []).append(item)
    return list(found.values())


def on_common_pairs(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Restrict each set to the pairs that all trials on the same training set have scored, and compute its metrics there.

    A set without a common pair is left out of all results.
    """
    placed = [
        [(item, (result.record.train_set, item.dataset, item.dataset_digest)) for item in result.evaluations]
        for result in results
    ]
    common: dict[tuple[str, str, str], NDArray[np.int64]] = {}
    for item, place in (found for items in placed for found in items):
        common[place] = np.intersect1d(common.get(place, item.scores.index), item.scores.index)
    nothing = {(train_set, dataset) for (train_set, dataset, _), rows in common.items() if not len(rows)}
    shared = []
    for result, items in zip(results, placed, strict=True):
        record = result.record
        wanted = tuple(one for one in record.evaluations if (record.train_set, one.dataset) not in nothing)
        evaluations = tuple(_on(item, common[place]) for item, place in items if len(common[place]))
        # A trial that is not evaluated on a set that is left out stays incomplete.
        answered = result.answered if wanted == record.evaluations else result.complete
        shared.append(
            replace(
                result,
                record=replace(record, evaluations=wanted),
                evaluations=evaluations,
                answered=answered,
            )
        )
    return shared


def _on(item: EvaluationResult, rows: NDArray[np.int64]) -> EvaluationResult:
    kept = np.isin(item.scores.index, rows)
    if kept.all():
        return item
    arrays = {name: getattr(item.scores, name)[kept] for name in ("chosen", "rejected", "index", "longer")}
    # A suite's own numbers stay over all prompts that the model scored.
    prompts = None if item.scores.prompts is None else item.scores.prompts[kept]
    scores = PairScores(**arrays, suite=item.scores.suite, prompts=prompts)
    leaked = None if item.leaked is None else item.leaked[kept]
    return replace(item, scores=scores, leaked=leaked, metrics=_metrics(scores, leaked))


def left_out_lines(results: Sequence[TrialResult], compared: Sequence[TrialResult]) -> list[str]:
    """Say for each set how many pairs each model lacks, and on how many pairs models are compared.

    `compared` are the results on common pairs. Sets of which every model has every pair are not mentioned.
    """
    # By set: the pairs that a model has, those left out for length, and those on which models are compared; and whose these are.
    sets: dict[str, dict[tuple[int, int, int], dict[str, None]]] = {}
    for result, shared in zip(results, compared, strict=True):
        trained_on = f"trained on {result.record.train_set}"
        common = {item.dataset: len(item.scores.index) for item in shared.evaluations}
        own = (result.train_pairs, result.train_left_out, result.train_pairs)
        uses = {trained_on: own} if result.trained else {}
        for item in result.evaluations:
            use = (len(item.scores.index), item.left_out, common.get(item.dataset, 0))
            uses[f"{trained_on}, evaluated on {item.dataset}"] = use
        for place, use in uses.items():
            sets.setdefault(place, {}).setdefault(use, {})[result.record.model] = None
    lines = []
    for place, of_set in sets.items():
        if any(left_out or pairs != shared for pairs, left_out, shared in of_set):
            models = {use: " and ".join(names) for use, names in of_set.items()}
            counts = [f"{use[1]} of {use[0] + use[1]} pairs for {names}" for use, names in models.items()]
            line = f"left out for length, {place}: {', '.join(counts)}"
            if any(pairs != shared for pairs, _, shared in of_set):
                having = ", ".join(f"{names} has {use[0]}" for use, names in models.items())
                line += f"; compared on the {min(use[2] for use in of_set)} pairs that all have ({having})"
            lines.append(line)
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrials:
    """The input of an analysis of a sweep's scores: its complete trials, and how many others are missing."""

    trials: tuple[TrialRecord, ...]
    missing: int


def scored(store: Store, sweep: str) -> ScoredTrials:
    """Return the sweep's complete trials. Raises SpecError if there is none."""
    name, known = given_name("--sweep", sweep), declared_sweeps(store)
    if name not in known:
        said = f"knows no sweep of that name (it knows {', '.join(known) or 'none'})"
        raise SpecError(f"--sweep {sweep}: {store.root} {said}; run it first.")
    trials = read_declaration(name, store).trials
    # The key of a trial covers its parameters.
    complete = tuple(replace(trial, parameters={}) for trial in trials if trial.whole(store))
    if not complete:
        raise SpecError(f"--sweep {sweep}: none of its {len(trials)} trials is complete; run it first.")
    return ScoredTrials(trials=complete, missing=len(trials) - len(complete))


def results_of(parameters: ScoredTrials, store: Store) -> tuple[list[TrialResult], str]:
    """Return the trials with their scores on the pairs that all of them have, and sentences about the data."""
    models, seeds = (
        sorted({str(getattr(trial, name)) for trial in parameters.trials}) for name in ("model", "seed")
    )
    said = [f"{len(parameters.trials)} trials: {', '.join(models)}; seeds {', '.join(seeds)}."]
    if parameters.missing:
        said.append(f"Missing: {parameters.missing} trials; they are not imputed.")
    results = sweep_results(Declaration(sweep="", trials=parameters.trials), store)
    if lacking := [
        f"{item.record.name}: {'; '.join(item.faults) or 'missing'}" for item in results if not item.complete
    ]:
        raise StorageError(f"{'; '.join(lacking)}. Run its sweep again, and then this command.")
    compared = on_common_pairs(results)
    said += map(sentence, left_out_lines(results, compared))
    return compared, " ".join(said)
