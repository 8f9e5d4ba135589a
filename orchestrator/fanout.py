"""Ray: Tune fans the trials out, Train runs each gang, tasks evaluate; the coordinator's gate says when.

A trial function is only a driver: it holds a sliver of the head node, never a CPU or GPU, so no trial can keep
another from starting. On a CPU a training of world size 1 runs in the trial's own reused process (Train's local
mode), which the gate counts as one CPU; everything else starts tasks and gangs where the gate has granted them.
The gate's queue goes by the durations that the stages' `expected_s` gives, and by packing.ranked.
"""

import contextlib
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
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator import attempts, failures
from orchestrator.asha import SearchScheduler, rungs_reported
from orchestrator.cluster import capacity
from orchestrator.coordinator import Coordinator, Work
from orchestrator.durations import Durations, RateName, rate_of, slowest
from orchestrator.estimate import Rate
from orchestrator.gang import ASK_EVERY_S, GrantedTraining, run_gang
from orchestrator.gate import Grant, Request
from orchestrator.hardware import groups_of
from orchestrator.packing import ranked, window
from orchestrator.placement import place
from orchestrator.plan import Node
from orchestrator.redaction import is_secret_name, without_secrets
from orchestrator.scaling import ask_for, scaling, still_absent
from orchestrator.stages import EvaluateStage, Stage, TrainStage
from orchestrator.supervision import Events, TrialDeaths, stop_gracefully
from orchestrator.trial import Execution, Post, Rows, complete_trial
from orchestrator.trial_plan import TrialPlan
from orchestrator.workers import make_room
from trainers.errors import Interrupted, PlanError
from trainers.specs import Placement
from trainers.stopping import StopRequest

# Holding a piece of the head node's own resource works on clusters that we did not start, too.
SLIVER = {"node:__internal_head__": 0.001}
BEAT_EVERY_S = 2.0

logger = logging.getLogger(__name__)


def run_on_ray(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    execution: Execution,
    on_event: Post,
    scratch: Path,
    stop: StopRequest,
    workers: Sequence[Node] = (),
    measured: Mapping[RateName, Rate] | None = None,
) -> None:
    """Run what is missing of each plan on the Ray that is up; what fails is an event.

    `workers` are all that the autoscaler may have up at once, `measured` the rates of the sweep's finished trainings.
    Raises KeyboardInterrupt when stopped.
    """
    live = capacity()
    nodes = [*live, *still_absent(workers, live).values()]
    durations = Durations(store=execution.store, kind=slowest(groups_of(nodes)), measured=measured or {})
    work = _in_turn(plans, placements, execution, durations, nodes)
    # On the head, as the trial functions are: the loss of another node must not take it.
    coordinator = ray.remote(Coordinator).options(
        num_cpus=0,
        resources=SLIVER,
        max_concurrency=10_000,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )
    handle = coordinator.remote(execution, live, work, durations, scaling(workers))
    slots = sum(node.gpus or node.cpus for node in nodes)
    scheduler = SearchScheduler([plan.train for plan in plans], execution.store, handle)
    tuner = _tuner(list(work), scheduler, execution, handle, scratch, at_once=window(slots))
    with Events(handle, on_event):
        try:
            with stop.deferred(lambda: stop_gracefully(handle, stop)):
                tuner.fit()
        finally:
            with contextlib.suppress(RayActorError):
                ray.get(handle.stop.remote(0.0))
            if workers:
                # Ray keeps a wish for nodes until it hears another.
                ask_for([])
    ray.kill(handle)


def _in_turn(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    execution: Execution,
    durations: Durations,
    nodes: Sequence[Node],
) -> dict[str, Work]:
    """What each trial is to do, in the order in which their trainings should start."""
    asked = [training(plan, placements[plan.key], execution, durations) for plan in plans]
    by_request = {training_id(plan): plan for plan in plans}
    return {
        plan.key: Work(plan=plan, placement=placements[plan.key], rank=request.rank)
        for request in ranked(asked, nodes)
        for plan in [by_request[request.id]]
    }


def _tuner(
    trials: Sequence[str],
    scheduler: SearchScheduler,
    execution: Execution,
    coordinator: ActorHandle,
    scratch: Path,
    *,
    at_once: int,
) -> tune.Tuner:
    """Tune's part: a function for each trial, so many at once, in processes that are used again."""
    # Tune would copy the driver's AWS keys into runtime environments, which Ray writes into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE -= set(filter(is_secret_name, class_cache.ENV_VARS_TO_PROPAGATE))
    trial = tune.with_parameters(
        run_trial, execution=execution, coordinator=coordinator, scratch=str(scratch)
    )
    # A trial function never raises: what Tune sees fail is a process that died, and its trial goes on in another.
    deaths = tune.FailureConfig(max_failures=execution.retries.worker_lost)
    return tune.Tuner(
        tune.with_resources(trial, SLIVER),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True, scheduler=scheduler),
        run_config=tune.RunConfig(
            storage_path=str(scratch),
            # Rounds of one command share their scratch.
            name=f"tune-{uuid.uuid4().hex[:8]}",
            verbose=0,
            callbacks=[TrialDeaths(coordinator)],
            failure_config=deaths,
        ),
    )


def run_trial(
    config: dict[str, Any],
    *,
    execution: Execution,
    coordinator: ActorHandle,
    scratch: str,
) -> None:
    """One Tune trial. What fails is an event, not an error."""
    work: Work = ray.get(coordinator.work.remote(config["trial"]))
    plan = work.plan
    backend = RayBackend(work, execution, coordinator, Path(scratch))
    backend.post({"event": "started"})
    try:
        with _beating(plan.key, coordinator), rungs_reported(plan.train, coordinator):
            complete_trial(plan, work.placement, backend, execution)
        backend.post({"event": "complete"})
    except Exception as error:
        if failures.interrupted(error):
            backend.post({"event": "stopped"})
        else:
            logger.exception("trial %s", plan.spec.name)
            failure, detail = failures.classify(error), traceback.format_exc()
            event = {"event": "failed", "cause": failure.cause, "message": failure.message}
            backend.post({**event, "detail": detail})
    make_room()
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

    work: Work
    execution: Execution
    coordinator: ActorHandle
    scratch: Path

    def post(self, event: dict[str, Any]) -> None:
        """Tell the driver, through the coordinator."""
        ray.get(self.coordinator.post.remote({"trial": self.work.plan.key, **event}))

    def pause(self, seconds: float) -> None:
        """Wait, as long as nobody asks to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if ray.get(self.coordinator.stop_left.remote()) is not None:
                raise Interrupted("stopped on request while waiting.")
            time.sleep(min(left, ASK_EVERY_S))

    def shared(self, stages: Sequence[Stage]) -> None:
        """Ask the coordinator for each."""
        ray.get([self.coordinator.shared.remote(stage, self.work.plan.key) for stage in stages])

    def train(self, stage: TrainStage, placement: Placement) -> None:
        """A gang where the gate grants it, or this very process; on fewer devices where so many are no more."""
        while True:
            durations = ray.get(self.coordinator.durations.remote())
            request = training(self.work.plan, placement, self.execution, durations, self.work.rank)
            with self._granted(request) as grant:
                if grant is not None:
                    run = self.execution.stages.gang or run_gang
                    run(
                        GrantedTraining(
                            stage=stage,
                            placement=placement,
                            grant=grant,
                            execution=self.execution,
                            coordinator=self.coordinator,
                            scratch=self.scratch,
                        )
                    )
                    self.coordinator.took.remote(rate_of(self.work.plan, self.execution.store))
                    return
            placement = self._on_fewer(placement)

    def _on_fewer(self, placement: Placement) -> Placement:
        """Another layout of the training for what the cluster has left. Raises PlanError where there is none."""
        nodes, late = ray.get(self.coordinator.room.remote())
        lost = f"; no node of type {', '.join(late)} came in time" if late else ""
        plan = self.work.plan
        try:
            fewer = attempts.on_fewer(placement, place(plan.spec, nodes, architecture=plan.architecture))
        except PlanError as error:
            raise PlanError(f"{error}{lost}") from error
        if fewer is None:
            raise PlanError(
                f"{placement.world_size} workers at once ({placement.device}) fit nowhere on this cluster, and no "
                f"smaller number will do{lost}. Add nodes, and give `retry`."
            )
        self.post({"event": "replanned", "text": attempts.describe_fewer(placement, fewer)})
        return fewer

    def evaluate(self, plan: TrialPlan, stages: Sequence[EvaluateStage], placement: Placement) -> None:
        """One task for all sets."""
        gpus = 1 if placement.device == "cuda" else 0
        durations = ray.get(self.coordinator.durations.remote())
        expected_s = self.execution.stages.expected_s(plan, "evaluate", placement, durations)
        request = Request(id=f"evaluate {plan.key}", kind="evaluate", gpus=gpus, expected_s=expected_s)
        with self._granted(request) as grant:
            if grant is None:
                raise PlanError(
                    f"no node with a {'GPU' if gpus else 'CPU'} for evaluations is left. Add one, and give `retry`."
                )
            self.post({"event": "stage", "stage": "evaluate"})
            pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
            task = _evaluate_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
            ray.get(task.remote(list(stages), self.execution, self.coordinator, plan.key))

    @contextlib.contextmanager
    def _granted(self, request: Request) -> Iterator[Grant | None]:
        """What the gate grants, waited for without holding anything, and given back however the block ends."""
        grant: Grant | None = ray.get(self.coordinator.acquire.remote(request))
        try:
            yield grant
        finally:
            ray.get(self.coordinator.release.remote(request.id))


def training_id(plan: TrialPlan) -> str:
    """How the gate calls a trial's training."""
    return f"train {plan.key}"


def training(
    plan: TrialPlan, placement: Placement, execution: Execution, durations: Durations, rank: int = 0
) -> Request:
    """What a trial's training asks of the gate."""
    return Request(
        id=training_id(plan),
        kind="train",
        workers=placement.world_size,
        gpus=1 if placement.device == "cuda" else 0,
        expected_s=execution.stages.expected_s(plan, "train", placement, durations),
        rank=rank,
    )


@ray.remote(num_cpus=0, max_retries=0)
def _evaluate_task(
    stages: list[EvaluateStage], execution: Execution, coordinator: ActorHandle, trial: str
) -> None:
    execution.stages.prepare_process()

    def post(event: dict[str, Any]) -> None:
        coordinator.post.remote({"trial": trial, **event})

    with without_secrets(), Rows(post).of("evaluate") as report:
        execution.stages.evaluate(stages, execution.store, report)
