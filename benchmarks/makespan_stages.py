"""Stages that only take time: a training sleeps in one task that holds its gang's GPUs. Ray's workers import them."""

import math
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.load_stages import Stages, evaluate_at_once, shared_at_once, train_at_once
from orchestrator.plan.durations import UNSEEN_LENGTHS, Durations, step_parts
from orchestrator.plan.hardware import gpu_kind
from orchestrator.plan.memory import PairTokens, Training
from orchestrator.plan.schedule import Grant
from orchestrator.run.compute import TrainCall
from orchestrator.run.events import StageBegan, TakeRow
from orchestrator.run.ray.backend import RayBackend
from orchestrator.spec.stages import EvaluateStage, ReferenceStage, SharedStage, TrainStage, TrialPlan
from orchestrator.spec.trials import TrialSpec
from orchestrator.store.artifacts import Store
from trainers.models.architecture import Architecture
from trainers.specs import Placement, Precision

# The paper's: 2,000 pairs, five epochs.
PAIRS = 2000 * 5
KIND = gpu_kind("H100")
# Of no account to time.
LONGEST = PairTokens(prompt=1, chosen=1, rejected=1)
ON_A_GPU_S = 1.0


def planned_s(
    architecture: Architecture, spec: TrialSpec | TrainStage, precision: Precision, placement: Placement
) -> float:
    """Seconds that a training of the paper's size is planned to take, unscaled, its set-up left out."""
    training = Training(
        architecture=architecture, reward=spec.reward, optim=spec.optim, precision=precision, pair=LONGEST
    )
    parts = step_parts(training, UNSEEN_LENGTHS, placement, KIND)
    return sum(parts.values()) * math.ceil(PAIRS / spec.optim.effective_batch)


@ray.remote(num_cpus=0, max_retries=0)
def sleep_as_a_gang(stage: TrainStage, call: TrainCall, store: Store, seconds: float) -> None:
    """Hold a gang's GPUs for so many seconds, then commit."""
    time.sleep(seconds)
    train_at_once(stage, call, store, lambda row: None)


def nothing() -> None:
    """No torch to import."""


def sleeping(scale: float, shapes: Mapping[str, Architecture]) -> Stages:
    """Return stages that only take time: a training `scale` times what it is planned to take, the others a second."""

    def train_s(durations: Durations, plan: TrialPlan, placement: Placement) -> float:
        """Return what the gate is told to expect."""
        spec = plan.spec
        return scale * planned_s(shapes[spec.model.name], spec, spec.model.precision, placement)

    def sleeper(
        backend: RayBackend, stage: TrainStage, placement: Placement, grant: Grant
    ) -> SimpleNamespace:
        """Stand in the place of Train: one task holds what was granted for as long as the training is planned to take."""
        (node,) = set(grant.nodes)
        gpus = placement.world_size if placement.device == "cuda" else 0
        call = TrainCall(placement=placement, provenance={"node": node, "world_size": placement.world_size})
        on = NodeAffinitySchedulingStrategy(node, soft=False)
        gang = sleep_as_a_gang.options(num_gpus=gpus, scheduling_strategy=on)
        seconds = scale * planned_s(shapes[stage.base.name], stage, stage.base.precision, placement)

        def fit() -> None:
            backend.post(StageBegan(stage="train"))
            ray.get(gang.remote(stage, call, backend.execution.store, seconds))

        return SimpleNamespace(fit=fit)

    def shared(stage: SharedStage, store: Store, report: TakeRow) -> None:
        if isinstance(stage, ReferenceStage):
            time.sleep(ON_A_GPU_S)
        shared_at_once(stage, store, report)

    def evaluate(stages: Sequence[EvaluateStage], store: Store, report: TakeRow) -> None:
        time.sleep(ON_A_GPU_S)
        evaluate_at_once(stages, store, report)

    return {
        "orchestrator.run.compute.run_shared": shared,
        "orchestrator.run.compute.run_evaluations": evaluate,
        "orchestrator.run.workers.prepare_worker": nothing,
        "orchestrator.plan.durations.Durations.train_s": train_s,
        "orchestrator.plan.durations.Durations.scoring_s": lambda *_: ON_A_GPU_S,
        "orchestrator.run.ray.backend.RayBackend.trainer": sleeper,
    }
