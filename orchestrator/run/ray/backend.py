"""Computes one trial's stages on the cluster, in tasks and gangs on the nodes that the coordinator grants."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from orchestrator.plan.durations import Durations, measured_rates
from orchestrator.plan.placement import gpus_of, place
from orchestrator.plan.schedule import Grant, Request
from orchestrator.run import compute, failures
from orchestrator.run.compute import TrainCall
from orchestrator.run.events import Event, Replanned, posting_for
from orchestrator.run.ray.cluster import task_on
from orchestrator.run.ray.coordinator import Work
from orchestrator.run.trial import Execution
from orchestrator.run.workers import working
from orchestrator.spec.stages import EvaluateStage, Stage, TrainStage, TrialPlan
from orchestrator.store.artifacts import Store
from trainers.errors import Interrupted, PlanError
from trainers.specs import Placement
from trainers.storage import ObjectPath
from trainers.train.stopping import StopLeft

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

ASK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class RayBackend:
    """Computes the stages of one trial on the cluster."""

    work: Work
    execution: Execution
    coordinator: ActorHandle
    scratch: Path

    def post(self, event: Event) -> None:
        ray.get(self.coordinator.post.remote(replace(event, trial=self.work.plan.key)))

    def pause(self, seconds: float) -> None:
        """Wait. Raises Interrupted when the sweep is asked to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if ray.get(self.coordinator.stop_left.remote()) is not None:
                raise Interrupted("stopped on request while waiting.")
            time.sleep(min(left, ASK_EVERY_S))

    def gpus(self) -> int:
        """Return the number of GPUs that the cluster has or may still get."""
        nodes, _ = ray.get(self.coordinator.room.remote())
        return gpus_of(nodes).number

    def shared(self, stages: Sequence[Stage]) -> None:
        ray.get([self.coordinator.shared.remote(stage, self.work.plan.key) for stage in stages])

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """Train in a gang or in this process, on fewer devices when the cluster has lost some."""
        while True:
            durations = ray.get(self.coordinator.durations.remote())
            request = training(self.work.plan, placement, durations, self.work.rank)
            with self._granted(request) as grant:
                if grant is not None:
                    self.trainer(stage, placement, grant).fit()
                    spec = self.work.plan.spec
                    trained = {stage.key: (spec.model.name, spec.reward_name, spec.train_set.name)}
                    self.coordinator.took.remote(measured_rates(trained, self.execution.store))
                    return
            placement = self._on_fewer(placement)

    def trainer(self, stage: TrainStage, placement: Placement, grant: Grant) -> "TorchTrainer":
        """Return the trainer for the granted nodes."""
        # These imports take seconds, which a process that only waits should not spend.
        from ray import tune
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from orchestrator.run.ray.rendezvous import LoopbackTorchConfig
        from trainers.train.engine import COLLECTIVE_TIMEOUT

        on_gpus = placement.device == "cuda"
        here = ray.get_runtime_context().get_node_id()
        in_process = not on_gpus and grant.nodes == (here,)
        scaling = ScalingConfig(num_workers=0)
        if not in_process:
            scaling = ScalingConfig(
                num_workers=placement.world_size,
                use_gpu=on_gpus,
                resources_per_worker={"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1},
                label_selector=[{"ray.io/node-id": node} for node in grant.nodes],
            )
        # A new name each time, or Train would continue the failed state of the last attempt.
        name = f"train-{stage.key}-{uuid.uuid4().hex[:8]}"
        call = TrainCall(
            placement=placement,
            checkpoint_steps=self.execution.checkpoint_steps,
            provenance={
                "backend": "ray",
                "tune_trial_id": tune.get_context().get_trial_id(),
                "train_run_name": name,
                "local_mode": in_process,
            },
        )
        # Every node must see where Train writes its own files.
        root, storage = self.execution.store.root, str(self.scratch)
        if isinstance(root, ObjectPath):
            storage = (root / "scratch" / self.scratch.name).arrow_uri()
        once = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=1)
        return TorchTrainer(
            train_rank,
            train_loop_config={
                **{"stage": stage, "call": call},
                **{"store": self.execution.store, "coordinator": self.coordinator},
            },
            torch_config=LoopbackTorchConfig(timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())),
            scaling_config=scaling,
            run_config=RunConfig(name=name, storage_path=storage, failure_config=once),
        )

    def _on_fewer(self, placement: Placement) -> Placement:
        """Plan the training for the nodes that are left. Raises PlanError where it does not fit."""
        nodes, late = ray.get(self.coordinator.room.remote())
        lost = f"; no node of type {', '.join(late)} came in time" if late else ""
        plan = self.work.plan
        try:
            fewer = failures.on_fewer(placement, place(plan.spec, nodes, architecture=plan.architecture))
        except PlanError as error:
            raise PlanError(f"{error}{lost}") from error
        if fewer is None:
            raise PlanError(
                f"{placement.world_size} workers at once ({placement.device}) fit nowhere on this cluster, and no "
                f"smaller number will do{lost}. Add nodes, and give `retry`."
            )
        self.post(Replanned(text=failures.describe_fewer(placement, fewer)))
        return fewer

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """Score all sets in one task."""
        durations = ray.get(self.coordinator.durations.remote())
        seconds = durations.scoring_s(plan, [stage.prepared for stage in stages], placement)
        request = Request.of("evaluate", plan.key, placement, seconds)
        with self._granted(request) as grant:
            if grant is None:
                raise PlanError(
                    f"no node with a {'GPU' if request.gpus else 'CPU'} for evaluations is left. Add one, and give `retry`."
                )
            task = task_on(grant.nodes[0], evaluate_task, cpus=request.cpus, gpus=request.gpus)
            ray.get(task.remote(list(stages), self.execution.store, self.coordinator, plan.key))

    @contextlib.contextmanager
    def _granted(self, request: Request) -> Iterator[Grant | None]:
        """Wait for devices without holding any, yield the grant, and give it back at the end of the block."""
        grant: Grant | None = ray.get(self.coordinator.acquire.remote(request))
        lost = False
        try:
            yield grant
        except Exception as error:
            lost = failures.lost(error)
            raise
        finally:
            ray.get(self.coordinator.release.remote(request.id, lost))


def training(plan: TrialPlan, placement: Placement, durations: Durations, rank: int = 0) -> Request:
    """Return the device request of a trial's training."""
    return Request.of("train", plan.key, placement, durations.train_s(plan, placement), rank)


def evaluate_task(stages: list[EvaluateStage], store: Store, coordinator: ActorHandle, trial: str) -> None:
    """Score a trained model on the granted device."""
    with working("evaluate", posting_for(trial, coordinator.post.remote), stages[0].key) as report:
        compute.run_evaluations(stages, store, report)


def train_rank(config: dict[str, Any]) -> None:
    """Train as one rank of a gang."""
    from trainers.train.engine import import_deepspeed

    import_deepspeed()
    stage, coordinator = config["stage"], config["coordinator"]
    call = replace(config["call"], stop=_asking(coordinator))
    post, ranks = posting_for(stage.key, coordinator.post.remote), call.placement.world_size
    with working("train", post, stage.key, ranks) as report:
        compute.run_train(stage, call, config["store"], report)


def _asking(coordinator: ActorHandle) -> StopLeft:
    """Return a function that asks the coordinator, at most once a second, how many seconds are left when stopping."""
    asked = 0.0

    def stop_left() -> float | None:
        nonlocal asked
        if time.monotonic() - asked < ASK_EVERY_S:
            return None
        asked = time.monotonic()
        left: float | None = ray.get(coordinator.stop_left.remote())
        return left

    return stop_left
