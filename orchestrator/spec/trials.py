"""What a user asks for: trials, and the sweep that holds them.

Grid algebra: `grid` is the full product, tuples of trials add, `only` filters, `Sweep` refuses duplicates.
"""

import fnmatch
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from orchestrator.store.records import Category
from trainers.errors import SpecError
from trainers.rewards import RewardSpec
from trainers.specs import (
    BRADLEY_TERRY,
    DatasetSpec,
    DrawSpec,
    LoraSpec,
    LossSpec,
    ModelSpec,
    OptimSpec,
    ValidationSpec,
)

Recipe = Callable[[ModelSpec, DatasetSpec], OptimSpec]
# Epochs after which a model is evaluated besides the last.
KeepEpochs = Union[tuple[int, ...], Literal["every"]]

ONLY_KEYS = ("model", "reward", "train", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One cell: one training with its evaluations.

    Weights are kept, and evaluated, after `keep_epochs` (from 1) and after the last. `variant` tells trials apart that
    differ in how they are trained only, such as what is frozen. `validation` pairs are held out of the training set, and
    scored after each epoch.
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
    variant: str = ""
    validation: ValidationSpec | None = None
    loss: LossSpec = BRADLEY_TERRY
    lora: LoraSpec | None = None

    def __post_init__(self) -> None:
        self.reward.type.require_takes(self.loss)
        if self.lora:
            self.lora.require_alone(self.optim)
        outside = [epoch for epoch in self.keep_epochs if not 1 <= epoch <= self.optim.epochs]
        if outside:
            raise SpecError(
                f"--keep-epochs {outside[0]}: {self.name} has the epochs 1 to {self.optim.epochs}."
            )

    @property
    def reward_name(self) -> str:
        """`im_rm`, or with the variant: `im_rm_unembedding_only`."""
        return "_".join(filter(None, (self.reward.name, self.variant)))

    @property
    def name(self) -> str:
        """`llama-64 · im_rm · tiny_world · s0`, as MLflow and the tables show it."""
        return f"{self.model.name} · {self.reward_name} · {self.train_set.name} · s{self.seed}"

    @property
    def labels(self) -> dict[str, str]:
        """What `--only KEY=GLOB` matches against."""
        values = (self.model.name, self.reward_name, self.train_set.name, str(self.seed))
        return dict(zip(ONLY_KEYS, values, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRule:
    """Lays the CPU trials whose labels match on `world_size` processes under a ZeRO stage."""

    match: tuple[tuple[str, str], ...]
    world_size: int
    zero_stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a trial is tried again after each kind of failure; waits (seconds) double from one to the next.

    What is not named here (a Diverged loss, bad data, a defect) fails at once.
    """

    worker_lost: int = 3
    out_of_memory: int = 6
    timeout: int = 2
    storage: int = 1
    unreachable: int = 3
    back_off_s: float = 5.0
    back_off_most_s: float = 300.0

    def limit(self, cause: str) -> int:
        """Retries after errors of the class `cause`."""
        limits = {
            "WorkerLost": self.worker_lost,
            "OutOfMemory": self.out_of_memory,
            "Timeout": self.timeout,
            "StorageError": self.storage,
            "Unreachable": self.unreachable,
        }
        return limits.get(cause, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A named set of trials. `categories` overrides the category of (training set, evaluation set) pairs."""

    name: str
    trials: tuple[TrialSpec, ...]
    categories: tuple[tuple[str, str, Category], ...] = ()
    placements: tuple[PlacementRule, ...] = ()
    retries: RetryPolicy = RetryPolicy()

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
                    f"trial {trial.name!r} is declared twice, as {first} and as {second}; give equal names apart "
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
    variant: str = "",
    validation: ValidationSpec | None = None,
) -> tuple[TrialSpec, ...]:
    """The full product, seeds outermost so that a first answer covers every model early.

    A training set that has a draw of its own is drawn by it.
    """

    return tuple(
        TrialSpec(
            model=model,
            reward=reward,
            train_set=train_set,
            train_draw=train_set.train_draw or train_draw,
            optim=(optim := recipe(model, train_set)),
            seed=seed,
            eval_sets=tuple(eval_sets),
            eval_draw=eval_draw,
            keep_epochs=tuple(range(1, optim.epochs + 1)) if keep_epochs == "every" else keep_epochs,
            variant=variant,
            validation=validation,
        )
        for seed, model, train_set, reward in itertools.product(seeds, models, train_sets, rewards)
    )


def matches(labels: dict[str, str], patterns: Sequence[tuple[str, str]]) -> bool:
    """Whether every pattern's key is met by one of its globs: `model=a model=b` means a or b."""
    keys = {key for key, _ in patterns}
    return all(
        any(fnmatch.fnmatchcase(labels[key], glob) for name, glob in patterns if name == key) for key in keys
    )


def only(trials: Sequence[TrialSpec], patterns: Sequence[tuple[str, str]]) -> tuple[TrialSpec, ...]:
    """The trials that meet the patterns. Raises SpecError on an unknown key."""
    for key, _ in patterns:
        if key not in ONLY_KEYS:
            raise SpecError(f"--only {key}=…: the keys are {', '.join(ONLY_KEYS)}.")
    return tuple(trial for trial in trials if matches(trial.labels, patterns))
