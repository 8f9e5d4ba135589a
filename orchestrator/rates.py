"""What a sweep's times are taken from: finished trainings, the kind of GPU, and the lengths of prepared sets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator import estimate
from orchestrator.artifacts import Store
from orchestrator.estimate import Lengths, Rate
from orchestrator.hardware import GpuKind
from orchestrator.memory_model import Training
from orchestrator.stages import PrepareStage
from orchestrator.trial_plan import TrialPlan
from trainers.errors import Damaged
from trainers.specs import Placement

# Where a set is not prepared yet: UltraFeedback's test pairs have 515 tokens on the mean (measured), of which a third
# is taken to be the prompt; the tiny world's have about 30. A set whose rows were never seen is taken to have so many.
UNSEEN_LENGTHS = Lengths(prompt=135, chosen=190, rejected=190)
TINY_LENGTHS = Lengths(prompt=14, chosen=8, rejected=8)
UNSEEN_PAIRS = 2000


def measured_rates(plans: Sequence[TrialPlan], store: Store) -> dict[tuple[str, str, Placement], Rate]:
    """Rates of the finished trainings by (model, reward, placement); of several, the mean."""
    found: dict[tuple[str, str, Placement], list[Rate]] = {}
    for item in plans:
        try:
            manifest = store.manifest("train", item.key)
        except Damaged:
            continue
        info = manifest["info"] if manifest else {}
        perf, laid = info.get("perf", {}), info.get("placement")
        if not laid or "step_s" not in perf:
            continue
        name = (item.spec.model.name, item.spec.reward.name, Placement(**laid))
        found.setdefault(name, []).append(Rate(step_s=perf["step_s"], set_up_s=perf.get("set_up_s", 0.0)))
    return {
        name: Rate(
            step_s=sum(rate.step_s for rate in rates) / len(rates),
            set_up_s=sum(rate.set_up_s for rate in rates) / len(rates),
        )
        for name, rates in found.items()
    }


@dataclass(frozen=True, slots=True)
class Rates:
    """What times are taken from: finished trainings, the kind of GPU, and what prepared sets say of their lengths."""

    measured: Mapping[tuple[str, str, Placement], Rate]
    kind: GpuKind | None
    store: Store

    def of_training(self, item: TrialPlan, training: Training, placed: Placement) -> tuple[Rate, bool]:
        """The rate of a trial's training, and whether it was measured."""
        found = self.measured.get((item.spec.model.name, item.spec.reward.name, placed))
        if found is not None:
            return found, True
        _, lengths = _prepared(item.train.prepared, self.store)
        step_s = estimate.step_s(training, lengths, placed, self.kind)
        return Rate(step_s=step_s, set_up_s=estimate.SET_UP_S[placed.device]), False

    def train_s(self, item: TrialPlan, rate: Rate) -> float:
        """Seconds of a trial's training at that rate."""
        pairs, _ = _prepared(item.train.prepared, self.store)
        steps = item.spec.optim.epochs * math.ceil(pairs / item.spec.optim.effective_batch)
        return rate.set_up_s + steps * rate.step_s

    def scoring_s(self, training: Training, prepared: PrepareStage) -> float:
        """Seconds to score a set."""
        pairs, lengths = _prepared(prepared, self.store)
        return estimate.scoring_s(training, lengths, pairs, self.kind)


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
