"""Ray: Tune fans the trials out, Train runs each gang, tasks evaluate; the coordinator's gate says when.

A trial function is only a driver: it holds a sliver of the head node, never a CPU or GPU, so no trial can keep
another from starting. On a CPU a training of world size 1 runs in the trial's own reused process (Train's local
mode), which the gate counts as one CPU; everything else starts tasks and gangs where the gate has granted them.
"""

import contextlib
import gc
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator import failures
from orchestrator.artifacts import Store
from orchestrator.cluster import capacity
from orchestrator.compute import TrainCall
from orchestrator.coordinator import Coordinator
from orchestrator.plan import Grant, Request
from orchestrator.redaction import is_secret_name, without_secrets
from orchestrator.rendezvous import LoopbackTorchConfig
from orchestrator.stages import EvaluateStage, Stage, TrainStage
from orchestrator.supervision import Events, TrialDeaths, stop_gracefully
from orchestrator.trial import Execution, Post, Rows, complete_trial
from orchestrator.trial_plan import TrialPlan
from orchestrator.workers import prepare_worker
from trainers.errors import Interrupted
from trainers.objects import ObjectPath
from trainers.specs import Placement
from trainers.stopping import StopRequest

# Holding a piece of the head node's own resource works on clusters that we did not start, too.
SLIVER = {"node:__internal_head__": 0.001}
BEAT_EVERY_S = 2.0
ASK_EVERY_S = 1.0

logger = logging.getLogger(__name__)


def run_on_ray(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    execution: Execution,
    on_event: Post,
    scratch: Path,
    stop: StopRequest,
) -> None:
    """Run what is missing of each plan on the Ray that is up; what fails is an event.

    Raises KeyboardInterrupt when stopped.
    """
    nodes = capacity()
    # Tune would copy the driver's AWS keys into runtime environments, which Ray writes into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE -= set(filter(is_secret_name, class_cache.ENV_VARS_TO_PROPAGATE))
    unbound = PlacementGroupSchedulingStrategy(placement_group=None)
    # On the head, as the trial functions are: the loss of another node must not take it.
    coordinator = ray.remote(Coordinator).options(
        num_cpus=0, resources=SLIVER, max_concurrency=10_000, scheduling_strategy=unbound
    )
    handle = coordinator.remote(execution, nodes, {plan.key: (plan, placements[plan.key]) for plan in plans})
    trial = tune.with_parameters(
        run_trial,
        execution=execution,
        coordinator=handle,
        scratch=str(scratch),
    )
    slots = sum(node.gpus or node.cpus for node in nodes)
    # A trial function never raises: what Tune sees fail is a process that died, and its trial goes on in another.
    deaths = tune.FailureConfig(max_failures=execution.retries.worker_lost)
    tuner = tune.Tuner(
        tune.with_resources(trial, SLIVER),
        param_space={"trial": tune.grid_search([plan.key for plan in plans])},
        tune_config=tune.TuneConfig(max_concurrent_trials=window(slots), reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(scratch),
            name="tune",
            verbose=0,
            callbacks=[TrialDeaths(handle)],
            failure_config=deaths,
        ),
    )
    with Events(handle, on_event):
        try:
            with stop.deferred(lambda: stop_gracefully(handle, stop)):
                tuner.fit()
        finally:
            with contextlib.suppress(RayActorError):
                ray.get(handle.stop.remote(0.0))
    ray.kill(handle)


def window(slots: int) -> int:
    """Trials under way at once: those that run, and some that get ready. Each is a process, so few on a laptop."""
    return slots + max(1, min(8, slots // 2))


def run_trial(
    config: dict[str, Any],
    *,
    execution: Execution,
    coordinator: ActorHandle,
    scratch: str,
) -> None:
    """One Tune trial. What fails is an event, not an error."""
    plan, placement = ray.get(coordinator.plan.remote(config["trial"]))
    backend = RayBackend(plan.key, execution, coordinator, Path(scratch))
    backend.post({"event": "started"})
    try:
        with _beating(plan.key, coordinator):
            complete_trial(plan, placement, backend, execution)
        backend.post({"event": "complete"})
    except Exception as error:
        if failures.interrupted(error):
            backend.post({"event": "stopped"})
        else:
            logger.exception("trial %s", plan.spec.name)
            failure, detail = failures.classify(error), traceback.format_exc()
            event = {"event": "failed", "cause": failure.cause, "message": failure.message}
            backend.post({**event, "detail": detail})
    # A model and its engine refer to each other; the next trial of this process needs the room.
    gc.collect()
    tune.report({"done_stages": 1})


@contextlib.contextmanager
def _beating(trial: str, coordinator: ActorHandle) -> Iterator[None]:
    """Signs of life from a thread, so that a process that hangs as a whole is found out."""
    done = threading.Event()
    node, pid = ray.get_runtime_context().get_node_id(), os.getpid()

    def beat() -> None:
        while not done.wait(BEAT_EVERY_S):
            coordinator.beat.remote(trial, node, pid)

    threading.Thread(target=beat, name="signs-of-life", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        coordinator.beat.remote(trial, node, 0)


@dataclass(frozen=True, slots=True)
class RayBackend:
    """Computes on the cluster, for one trial."""

    trial: str
    execution: Execution
    coordinator: ActorHandle
    scratch: Path

    def post(self, event: dict[str, Any]) -> None:
        """Tell the driver, through the coordinator."""
        ray.get(self.coordinator.post.remote({"trial": self.trial, **event}))

    def pause(self, seconds: float) -> None:
        """Wait, as long as nobody asks to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if ray.get(self.coordinator.stop_left.remote()) is not None:
                raise Interrupted("stopped on request while waiting.")
            time.sleep(min(left, ASK_EVERY_S))

    def shared(self, stages: Sequence[Stage]) -> None:
        """Ask the coordinator for each."""
        ray.get([self.coordinator.shared.remote(stage) for stage in stages])

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """A gang where the gate grants it, or this very process."""
        gpus = 1 if placement.device == "cuda" else 0
        request = Request(id=f"train {stage.key}", kind="train", workers=placement.world_size, gpus=gpus)
        with self._granted(request) as grant:
            here = ray.get_runtime_context().get_node_id()
            in_process = placement.device == "cpu" and grant.nodes == (here,)
            scaling = ScalingConfig(num_workers=0) if in_process else _scaling(placement, grant)
            # A name of its own each time: Train would go on from the state in which the last attempt failed.
            name = f"train-{stage.key}-{uuid.uuid4().hex[:8]}"
            provenance = {
                "backend": "ray",
                "tune_trial_id": tune.get_context().get_trial_id(),
                "train_run_name": name,
                "local_mode": in_process,
            }
            TorchTrainer(
                _train_rank,
                train_loop_config={
                    "stage": stage,
                    "placement": placement,
                    "execution": self.execution,
                    "coordinator": self.coordinator,
                    "provenance": provenance,
                },
                torch_config=LoopbackTorchConfig(),
                scaling_config=scaling,
                run_config=RunConfig(
                    name=name,
                    **_train_storage(self.execution.store, self.scratch),
                    failure_config=FailureConfig(
                        max_failures=0, max_preemption_failures=0, controller_failure_limit=1
                    ),
                ),
            ).fit()

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """One task for all sets."""
        gpus = 1 if placement.device == "cuda" else 0
        request = Request(id=f"evaluate {plan.key}", kind="evaluate", gpus=gpus)
        with self._granted(request) as grant:
            self.post({"event": "stage", "stage": "evaluate"})
            pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
            task = _evaluate_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
            ray.get(task.remote(list(stages), self.execution))

    @contextlib.contextmanager
    def _granted(self, request: Request) -> Iterator[Grant]:
        """What the gate grants, waited for without holding anything, and given back however the block ends."""
        grant: Grant = ray.get(self.coordinator.acquire.remote(request))
        try:
            yield grant
        finally:
            ray.get(self.coordinator.release.remote(request.id))


def _train_storage(store: Store, scratch: Path) -> dict[str, Any]:
    """Where Train keeps what it writes of a run, which every node must see."""
    if not isinstance(store.root, ObjectPath):
        return {"storage_path": str(scratch)}
    place = store.root / "scratch" / scratch.name
    return {"storage_path": place.in_bucket, "storage_filesystem": place.filesystem()}


def _scaling(placement: Placement, grant: Grant) -> ScalingConfig:
    return ScalingConfig(
        num_workers=placement.world_size,
        use_gpu=placement.device == "cuda",
        resources_per_worker={"CPU": 1, "GPU": 1} if placement.device == "cuda" else {"CPU": 1},
        label_selector=[{"ray.io/node-id": node} for node in grant.nodes],
    )


def _train_rank(config: dict[str, Any]) -> None:
    """One rank of the gang; rank 0 commits the artifact and reports at most once a second."""
    prepare_worker()
    stage: TrainStage = config["stage"]
    execution: Execution = config["execution"]
    coordinator = config["coordinator"]

    def post(event: dict[str, Any]) -> None:
        coordinator.post.remote({"trial": stage.key, **event})

    post({"event": "stage", "stage": "train"})
    call = TrainCall(
        placement=config["placement"],
        checkpoint_steps=execution.checkpoint_steps,
        stop=_StopLeft(coordinator),
        provenance=config["provenance"],
    )
    with without_secrets(), Rows(post).of("train") as report:
        execution.stages.train(stage, call, execution.store, report)


class _StopLeft:
    """Seconds that the coordinator leaves a training to stop in; asked at most once a second."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator
        self._asked = 0.0

    def __call__(self) -> float | None:
        if time.monotonic() - self._asked < ASK_EVERY_S:
            return None
        self._asked = time.monotonic()
        left: float | None = ray.get(self._coordinator.stop_left.remote())
        return left


@ray.remote(num_cpus=0, max_retries=0)
def _evaluate_task(stages: list[EvaluateStage], execution: Execution) -> None:
    prepare_worker()
    with without_secrets():
        execution.stages.evaluate(stages, execution.store, lambda row: None)
