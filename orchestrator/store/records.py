"""The records of a sweep in the store: its declaration and its state.

    <storage>/sweeps/<sweep>/sweep.json   the declaration: its trials, and every artifact that they need
    <storage>/sweeps/<sweep>/state.json   what only its driver knows: what runs, what failed and why

Report, status and MLflow are views of these records and of the artifacts that they name, which gc keeps.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from orchestrator.store.artifacts import WEIGHTS, Store, weights_digest
from trainers.errors import SpecError
from trainers.specs import ADDED
from trainers.storage import replace

# How a training set and an evaluation set are related.
Category = Literal["training pairs", "in-distribution", "token-level shift", "domain shift"]
# From the nearest to the training set to the farthest.
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of a trial: `dataset_digest` identifies the rows, `prepared` their tokens.

    `epoch` is the epoch whose weights are evaluated, None for the last.
    """

    dataset: str
    key: str
    category: Category
    dataset_digest: str
    epoch: int | None = None
    prepared: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One trial: its labels, every parameter of its spec, and the keys of its artifacts (`prepared`: of its pairs).

    `answers` are the keys of its evaluations on a policy's answers, which have no accuracy. `axes` are its values on the
    sweep's axes. `reward` names them too: trials with the same reward, model and training set differ only in their seed.
    """

    name: str
    key: str
    model: str
    reward: str
    train_set: str
    train_digest: str
    seed: int
    parameters: dict[str, Any]
    evaluations: tuple[EvaluationRecord, ...]
    prepared: str = ""
    axes: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = field(default=(), metadata=ADDED)

    @property
    def scored(self) -> list[str]:
        """The keys of all its evaluations, those on a policy's answers included."""
        return [*(item.key for item in self.evaluations), *self.answers]

    def whole(self, store: Store) -> bool:
        """Return whether it is trained and evaluated on every declared set. Reads manifests only."""
        return not unscored(store, self.key, self.scored) and store.complete("train", self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """The sweep's trials, in plan order, and every artifact (stage/key) that they need.

    `earlier` are the artifacts that only earlier declarations of the sweep needed.
    """

    sweep: str
    trials: tuple[TrialRecord, ...]
    artifacts: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


def unscored(store: Store, train: str, evaluations: Sequence[str]) -> set[str]:
    """Return the keys of a training's evaluations that are missing, or that scored other weights than it has now.

    Weights that were trained again on other hardware may differ in their last bits, and scores of the earlier ones are
    out of date. Once the weights are evicted, all scores must be of the same weights. Reads manifests only.
    """
    found = {key: store.sound_manifest("evaluate", key) for key in evaluations}
    # An evaluation that does not say which weights it scored is taken as valid.
    scored = {key: manifest["info"].get("weights") for key, manifest in found.items() if manifest}
    missing, known = set(evaluations) - scored.keys(), {*scored.values()} - {None}
    weights = store.sound_manifest(WEIGHTS, train) if known else None
    now = weights_digest(weights) if weights else None
    if now is None and len(known) < 2:
        return missing
    return missing | {key for key, of in scored.items() if of not in (None, now)}


def write_declaration(declaration: Declaration, store: Store) -> None:
    """Replace the sweep's declaration."""
    file = store.sweep_dir(declaration.sweep) / "sweep.json"
    replace(file, json.dumps(dataclasses.asdict(declaration), indent=1, ensure_ascii=False))


def read_declaration(sweep: str, store: Store) -> Declaration:
    """Return the sweep's declaration. Raises SpecError where there is none."""
    file = store.sweep_dir(sweep) / "sweep.json"
    try:
        loaded = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(
            f"{store.root} knows no sweep {sweep!r}; run it first, or give --name or --storage."
        ) from None
    trials = [
        TrialRecord(
            **{
                **trial,
                "evaluations": tuple(EvaluationRecord(**item) for item in trial["evaluations"]),
                "answers": tuple(trial.get("answers", ())),
            }
        )
        for trial in loaded["trials"]
    ]
    lists = {name: tuple(loaded[name]) for name in ("artifacts", "earlier")}
    return Declaration(sweep=loaded["sweep"], trials=tuple(trials), **lists)


def declared_sweeps(store: Store) -> list[str]:
    """Return the names of all sweeps in the store."""
    return sorted(file.parent.name for file in (store.root / "sweeps").glob("*/sweep.json"))


@dataclass(slots=True, kw_only=True)
class TrialNote:
    """What the driver knows about a trial. `state`: waiting, running, complete, failed or stopped.

    `train_s` is the estimated time of its whole training at its pace so far. `lost_h` holds device hours by
    <stage>/<key>: those of failed attempts, and of the stage that is running.
    """

    state: str = "waiting"
    stage: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    pairs_per_s: float | None = None
    train_s: float | None = None
    cause: str = ""
    message: str = ""
    retries: list[str] = field(default_factory=list)
    replanned: list[str] = field(default_factory=list)
    lost_h: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepState:
    """The last command's driver, its command line, and a note on each trial by key."""

    driver: str = ""
    command: tuple[str, ...] = ()
    trials: Mapping[str, TrialNote] = field(default_factory=dict)


def read_state(sweep: str, store: Store) -> SweepState:
    """Return the state that the last command wrote; an empty one where it is missing or unreadable."""
    try:
        loaded = json.loads((store.sweep_dir(sweep) / "state.json").read_text())
        trials = {key: TrialNote(**note) for key, note in loaded["trials"].items()}
        return SweepState(driver=loaded["driver"], command=tuple(loaded["command"]), trials=trials)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SweepState()


def write_state(sweep: str, store: Store, state: SweepState) -> None:
    """Replace the sweep's state. Raises StorageError."""
    replace(store.sweep_dir(sweep) / "state.json", json.dumps(dataclasses.asdict(state)))
