"""How long a trial's training and evaluation take: what finished trainings took, else what estimate.py makes of their size.

`plan`, the order of the trainings and the gate all go by these. Times in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.plan import estimate
from orchestrator.plan.estimate import Lengths, Rate
from orchestrator.plan.hardware import GpuKind, NodeGroup
from orchestrator.plan.memory import Training
from orchestrator.plan.placement import need_of
from orchestrator.plan.schedule import UNKNOWN_S
from orchestrator.spec.stages import EvaluateStage, PrepareStage
from orchestrator.spec.trial_plan import TrialPlan
from orchestrator.store.artifacts import Store
from trainers.errors import Damaged
from trainers.specs import Placement

# Where a set is not prepared yet: UltraFeedback's test pairs have 515 tokens on the mean (measured), of which a third
# is taken to be the prompt; the tiny world's have about 30. A set whose rows were never seen is taken to have so many.
UNSEEN_LENGTHS = Lengths(prompt=135, chosen=190, rejected=190)
TINY_LENGTHS = Lengths(prompt=14, chosen=8, rejected=8)
UNSEEN_PAIRS = 2000

# Model, reward type, and how the training is laid out.
RateName = tuple[str, str, Placement]


def rate_name(plan: TrialPlan, placement: Placement) -> RateName:
    """Trainings of one name go at one rate."""
    return (plan.spec.model.name, plan.spec.reward_name, placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """What times are taken from: prepared sets, the kind of GPU (None: CPUs), and the rates of finished trainings."""

    store: Store
    kind: GpuKind | None = None
    measured: Mapping[RateName, Rate] = field(default_factory=dict)

    def having(self, measured: Mapping[RateName, Rate]) -> "Durations":
        """The same with more trainings finished; of those of one name, the mean counts."""
        both = {
            name: estimate.mean_rate(self.measured[name], rate) if name in self.measured else rate
            for name, rate in measured.items()
        }
        return replace(self, measured={**self.measured, **both})

    def rate(self, plan: TrialPlan, training: Training, placement: Placement) -> Rate:
        """At which a plan's training goes, laid out so."""
        measured = self.measured.get(rate_name(plan, placement))
        if measured is not None:
            return measured
        _, lengths = _prepared(plan.train.prepared, self.store)
        step_s = estimate.step_s(training, lengths, placement, self.kind)
        return Rate(step_s=step_s, set_up_s=estimate.SET_UP_S[placement.device])

    def train_s(self, plan: TrialPlan, training: Training, placement: Placement) -> float:
        """Of the whole training."""
        rate = self.rate(plan, training, placement)
        pairs, _ = _prepared(plan.train.prepared, self.store)
        steps = plan.train.optim.epochs * math.ceil(pairs / plan.train.optim.effective_batch)
        return rate.set_up_s + steps * rate.step_s

    def scoring_s(self, training: Training, stages: Sequence[PrepareStage], placement: Placement) -> float:
        """Of a process that scores these sets one after another on one device."""
        sets = [_prepared(stage, self.store) for stage in stages]
        scores = [estimate.scoring_s(training, lengths, pairs, self.kind) for pairs, lengths in sets]
        return estimate.SET_UP_S[placement.device] + sum(scores)

    def evaluate_s(self, training: Training, stages: Sequence[EvaluateStage], placement: Placement) -> float:
        """Of the evaluations of one trial, by one process."""
        return self.scoring_s(training, [stage.prepared for stage in stages], placement)


def expected_s(
    plan: TrialPlan, kind: Literal["train", "evaluate"], placement: Placement, durations: Durations
) -> float:
    """Seconds that the gate is told of a trial's training or evaluation; gate.UNKNOWN_S where nobody knows the model's size."""
    need = need_of(plan.spec, plan.architecture)
    if need is None:
        return UNKNOWN_S
    if kind == "train":
        return durations.train_s(plan, need.training, placement)
    return durations.evaluate_s(need.training, plan.evaluations, placement)


def measured_rates(trained: Mapping[str, tuple[str, str]], store: Store) -> dict[RateName, Rate]:
    """Rates of the finished ones of these trainings (key → model and reward name); of several of one name, the mean."""
    found: dict[RateName, Rate] = {}
    for key, (model, reward) in trained.items():
        try:
            manifest = store.manifest("train", key)
        except Damaged:
            continue
        info = manifest["info"] if manifest else {}
        perf, laid = info.get("perf", {}), info.get("placement")
        if not laid or "step_s" not in perf:
            continue
        name = (model, reward, Placement(**laid))
        rate = Rate(step_s=perf["step_s"], set_up_s=perf.get("set_up_s", 0.0))
        found[name] = estimate.mean_rate(found[name], rate) if name in found else rate
    return found


def rate_of(plan: TrialPlan, store: Store) -> dict[RateName, Rate]:
    """That of a plan's own training, where it is finished and has told."""
    return measured_rates({plan.key: (plan.spec.model.name, plan.spec.reward_name)}, store)


def slowest(groups: Sequence[NodeGroup]) -> GpuKind | None:
    """The kind that a gang may get at worst; None without GPUs."""
    kinds = [group.kind for group in groups if group.kind is not None and group.gpus]
    return min(kinds, key=lambda kind: kind.bf16_tflops, default=None)


def _prepared(stage: PrepareStage, store: Store) -> tuple[int, Lengths]:
    """How many pairs a prepared set has, and their mean lengths; an assumption where it is not prepared."""
    try:
        manifest = store.manifest(stage.kind, stage.key)
    except Damaged:
        manifest = None
    info = manifest["info"] if manifest else {}
    lengths = TINY_LENGTHS if stage.base.origin is not None and not stage.base.location else UNSEEN_LENGTHS
    if "mean_tokens" in info:
        lengths = Lengths(**info["mean_tokens"])
    if "pairs" in info:
        return int(info["pairs"]), lengths
    rows = stage.split.rows if stage.split.fetched else None
    most = stage.draw.max_pairs
    return min((count for count in (rows, most) if count is not None), default=UNSEEN_PAIRS), lengths
