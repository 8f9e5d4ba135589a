"""What a user asks for: trials, and the sweep that holds them.

Grid algebra: `grid` is the full product, tuples of trials add, `only` filters, `Sweep` refuses duplicates.
"""

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union

from orchestrator.spec.axes import AXES, NO_AXES, Axes, in_a_name, shown
from orchestrator.store.records import Category
from trainers.errors import SpecError, nearest
from trainers.rewards import RewardSpec
from trainers.specs import (
    BRADLEY_TERRY,
    DatasetSpec,
    DrawSpec,
    LoraSpec,
    LossSpec,
    ModelSpec,
    OptimSpec,
    SamplingSpec,
    ValidationSpec,
    require_seed,
)

Recipe = Callable[[ModelSpec, DatasetSpec], OptimSpec]
# Epochs after which a model is evaluated besides the last.
KeepEpochs = Union[tuple[int, ...], Literal["every"]]

ONLY_KEYS = ("model", "reward", "train", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersSpec:
    """A policy's answers to the first `max_prompts` test prompts of a set, and the gold reward model, if there is one."""

    policy: ModelSpec
    prompts: DatasetSpec
    sampling: SamplingSpec
    max_prompts: int | None = None
    gold: ModelSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One training with its evaluations.

    Weights are kept and evaluated after `keep_epochs` (from 1) and after the last. `validation` pairs are held out of
    the training set, and scored after each epoch. `axes` (the values that vary in the sweep) tell trials apart that
    differ only in how they are trained. `answers` are scored, too.
    """

    model: ModelSpec
    reward: RewardSpec
    train_set: DatasetSpec
    train_draw: DrawSpec
    optim: OptimSpec
    seed: int
    eval_sets: tuple[DatasetSpec, ...]
    eval_draw: DrawSpec
    keep_epochs: tuple[int, ...] = ()
    axes: tuple[tuple[str, Any], ...] = ()
    validation: ValidationSpec | None = None
    loss: LossSpec = BRADLEY_TERRY
    lora: LoraSpec | None = None
    answers: AnswersSpec | None = None

    def __post_init__(self) -> None:
        try:
            require_seed(self.seed)
        except SpecError as error:
            raise SpecError(f"--seeds {self.seed}: {error}") from None
        self.reward.type.require_takes(self.loss, ties=any(part.ties for part in self.train_set.parts))
        if self.lora:
            self.lora.require_alone(self.optim)
        frozen, output = {*self.optim.freeze}, self.reward.type.output
        if output == "head" and "unembedding" in frozen:
            raise SpecError(
                f"--freeze unembedding: {self.reward.name} has none; name the types that have one: --axis im_rm.freeze=…"
            )
        if output == "unembedding" and frozen >= {"backbone", "unembedding"}:
            raise SpecError(
                f"--freeze {' '.join(sorted(frozen))}: nothing of {self.reward.name} is left to train."
            )
        outside = [epoch for epoch in self.keep_epochs if not 1 <= epoch <= self.optim.epochs]
        if outside:
            raise SpecError(
                f"--keep-epochs {outside[0]}: {self.name} has the epochs 1 to {self.optim.epochs}."
            )

    @property
    def variant(self) -> str:
        """The values of what varies: `lr=1e-05 epochs=2`."""
        return " ".join(f"{name}={shown(value)}" for name, value in self.axes)

    @property
    def reward_name(self) -> str:
        """The reward type with the values that vary, `im_rm_lr=1e-05`: trials that share it differ only in their seed."""
        return self.reward.name + "".join(in_a_name(*item) for item in self.axes)

    @property
    def name(self) -> str:
        """`llama-64 · im_rm lr=1e-05 · tiny_world · s0`, as MLflow and the tables show it."""
        kind = f"{self.reward.name} {self.variant}".strip()
        return f"{self.model.name} · {kind} · {self.train_set.name} · s{self.seed}"

    @property
    def labels(self) -> dict[str, str]:
        """The values that `--only KEY=GLOB` matches, every axis that the trial reads included."""
        values = (self.model.name, self.reward.name, self.train_set.name, str(self.seed))
        axes = {name: shown(axis.of(self)) for name, axis in AXES.items() if not axis.unread(self)}
        # An experiment may have an axis of its own.
        axes |= {name: shown(value) for name, value in self.axes}
        return {**dict(zip(ONLY_KEYS, values, strict=True)), **axes}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRule:
    """Runs the CPU trials whose labels match on `world_size` processes with a ZeRO stage."""

    match: tuple[tuple[str, str], ...]
    world_size: int
    zero_stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The most retries after each class of error, and the waits between them (seconds), which double each time.

    Any other error (a Diverged loss, bad data, a defect) is not retried.
    """

    limits: Mapping[str, int] = field(
        default_factory=lambda: {
            "WorkerLost": 3,
            "OutOfMemory": 6,
            "Timeout": 2,
            "StorageError": 1,
            "Unreachable": 3,
        }
    )
    back_off_s: float = 5.0
    back_off_most_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A named set of trials. `categories` overrides the category of (training set, evaluation set) pairs."""

    name: str
    trials: tuple[TrialSpec, ...]
    categories: tuple[tuple[str, str, Category], ...] = ()
    placements: tuple[PlacementRule, ...] = ()

    def __post_init__(self) -> None:
        if not self.trials:
            raise SpecError(
                "the sweep holds no trial; check --only and the lists of models, rewards and seeds."
            )
        seen: dict[str, TrialSpec] = {}
        for trial in self.trials:
            if trial.name in seen:
                first, second = (
                    f"{item.model.source} on {item.train_set.source}" for item in (seen[trial.name], trial)
                )
                raise SpecError(
                    f"trial {trial.name!r} is declared twice, as {first} and as {second}; tell equal names apart "
                    "with NAME=PATH or NAME=ID, and list every seed, model and training set once."
                )
            seen[trial.name] = trial


def grid(
    *,
    models: Sequence[ModelSpec],
    rewards: Sequence[RewardSpec],
    train_sets: Sequence[DatasetSpec],
    eval_sets: Sequence[DatasetSpec],
    seeds: Sequence[int],
    recipe: Recipe,
    train_draw: DrawSpec,
    eval_draw: DrawSpec,
    keep_epochs: KeepEpochs = (),
    axes: Axes = NO_AXES,
) -> tuple[TrialSpec, ...]:
    """Return the full product: seeds outermost, so that early results cover every model, and axes innermost.

    A training set's own draw goes before `train_draw`. An evaluation set that stands twice counts once.
    """
    cells = itertools.product(seeds, models, train_sets, rewards)
    return tuple(
        replace(
            trial,
            keep_epochs=tuple(range(1, trial.optim.epochs + 1)) if keep_epochs == "every" else keep_epochs,
        )
        for seed, model, train_set, reward in cells
        for trial in axes.of(
            TrialSpec(
                model=model,
                reward=reward,
                train_set=train_set,
                train_draw=train_set.train_draw or train_draw,
                optim=recipe(model, train_set),
                seed=seed,
                eval_sets=tuple(dict.fromkeys(eval_sets)),
                eval_draw=eval_draw,
            )
        )
    )


def matches(labels: dict[str, str], patterns: Sequence[tuple[str, str]]) -> bool:
    """Whether, for every key, the label matches one of its globs: `model=a model=b` means a or b."""
    keys = {key for key, _ in patterns}
    return all(
        any(fnmatch.fnmatchcase(labels.get(key, ""), glob) for name, glob in patterns if name == key)
        for key in keys
    )


def only(trials: Sequence[TrialSpec], patterns: Sequence[tuple[str, str]]) -> tuple[TrialSpec, ...]:
    """Return the trials that match the patterns; a number may be written in any way. Raises SpecError for an unknown key."""
    asked = []
    known = dict.fromkeys((*ONLY_KEYS, *AXES, *(name for trial in trials for name, _ in trial.axes)))
    for key, glob in patterns:
        if key not in known:
            raise SpecError(
                f"--only {key}=…: the keys are {', '.join(ONLY_KEYS)} and every axis; {nearest(key, known)}"
            )
        try:
            asked.append((key, shown(AXES[key].read(glob))))
        except (KeyError, SpecError):
            asked.append((key, glob))
    return tuple(trial for trial in trials if matches(trial.labels, asked))
