"""A trial as its stages: which it comes to, which are missing, and in what order they can run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.stages import (
    BaseModel,
    EvaluateStage,
    PrepareStage,
    ReferenceStage,
    Split,
    Stage,
    TrainStage,
)
from orchestrator.spec.trials import TrialSpec
from orchestrator.store.artifacts import Store
from orchestrator.store.records import unscored
from trainers.models.architecture import Architecture
from trainers.specs import DrawSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """A trial as the stages that it comes to; `key` is that of its training.

    `architecture` is that of its model where it is known, told since a node may not see what the driver sees.
    """

    spec: TrialSpec
    train: TrainStage
    evaluations: tuple[EvaluateStage, ...]
    architecture: Architecture | None = None

    @property
    def key(self) -> str:
        """The trial's identity: its training's key."""
        return self.train.key

    def missing(self, store: Store) -> list[Stage]:
        """Stages not in the store that this trial needs, in an order in which they can run.

        A training whose weights were evicted is one of them only where an evaluation of it is.
        """
        trained = store.sound_manifest(self.train.kind, self.train.key)
        wanted = self.unscored(store, trained)
        untrained = [] if trained else [self.train]
        return list(_below([*untrained, *wanted], lambda stage: stage not in wanted and usable(stage, store)))

    def unscored(self, store: Store, trained: Mapping[str, Any] | None = None) -> list[EvaluateStage]:
        """Evaluations that are missing, or of weights of before; `trained` as in the function of that name."""
        keys = unscored(store, self.key, [stage.key for stage in self.evaluations], trained)
        return [stage for stage in self.evaluations if stage.key in keys]

    def trains_again_s(self, store: Store) -> float | None:
        """Seconds that the training took whose weights were evicted and are needed again; None where none are."""
        trained = store.sound_manifest(self.train.kind, self.train.key)
        if trained is None or not store.evicted(self.train.kind, self.train.key) or self.complete(store):
            return None
        return float(trained["seconds"])

    def complete(self, store: Store) -> bool:
        """Whether nothing is missing."""
        return not self.missing(store)

    def stages(self) -> list[Stage]:
        """Everything that this trial comes to, in an order in which it can run."""
        return list(_below([self.train, *self.evaluations], lambda stage: False))


def usable(stage: Stage, store: Store) -> bool:
    """Whether what needs the stage can read it: committed, and its weights not evicted."""
    if not store.complete(stage.kind, stage.key):
        return False
    return stage.kind != "train" or not store.evicted(stage.kind, stage.key)


def _below(stages: Sequence[Stage], done: Callable[[Stage], bool]) -> Iterator[Stage]:
    """The stages and what they need that is not `done`, each once and after its needs."""
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.key in seen or done(stage):
            return
        seen.add(stage.key)
        for need in stage.needs:
            yield from visit(need)
        yield stage

    for stage in stages:
        yield from visit(stage)


def plan_trial(
    spec: TrialSpec, base: BaseModel, train_split: Split, eval_splits: Sequence[Split]
) -> TrialPlan:
    """The stages of one trial."""

    def prepare(split: Split, draw: DrawSpec) -> PrepareStage:
        return PrepareStage(base=base, split=split, draw=draw, rendering=spec.reward.type.rendering)

    def reference(prepared: PrepareStage) -> ReferenceStage | None:
        return ReferenceStage(base=base, prepared=prepared) if spec.reward.uses_reference else None

    last = spec.optim.epochs
    kept = tuple(sorted({epoch for epoch in spec.keep_epochs if epoch < last}))
    prepared = prepare(train_split, spec.train_draw)
    train = TrainStage(
        base=base,
        prepared=prepared,
        reference=reference(prepared),
        reward=spec.reward,
        optim=spec.optim,
        seed=spec.seed,
        keep_epochs=kept,
        validation=spec.validation,
    )
    eval_sets = [prepare(split, spec.eval_draw) for split in eval_splits]
    evaluations = tuple(
        EvaluateStage(train=train, prepared=item, reference=reference(item), epoch=epoch)
        for epoch in (*kept, last)
        for item in eval_sets
    )
    return TrialPlan(spec=spec, train=train, evaluations=evaluations)
