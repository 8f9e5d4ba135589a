"""Ray: Tune fans the trials out, Train runs each gang, tasks evaluate; the coordinator's gate says when.

A trial function is only a driver: it holds a sliver of the head node, never a CPU or GPU, so no trial can keep
another from starting. On a CPU a training of world size 1 runs in the trial's own reused process (Train's local
mode), which the gate counts as one CPU; everything else starts tasks and gangs where the gate has granted them.
"""

import contextlib
import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from orchestrator.artifacts import Store
from orchestrator.cluster import capacity
from orchestrator.compute import run_evaluations, run_train
from orchestrator.coordinator import Coordinator
from orchestrator.failures import message
from orchestrator.plan import Grant, Request
from orchestrator.redaction import is_secret_name, without_secrets
from orchestrator.rendezvous import LoopbackTorchConfig
from orchestrator.stages import EvaluateStage, TrainStage, TrialPlan
from orchestrator.workers import prepare_worker
from trainers.specs import Placement

# Holding a piece of the head node's own resource works on clusters that we did not start, too.
SLIVER = {"node:__internal_head__": 0.001}
REPORT_EVERY_S = 1.0
DRAIN_EVERY_S = 0.3

logger = logging.getLogger(__name__)
Event = Callable[[dict[str, Any]], None]


def run_on_ray(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    store: Store,
    on_event: Event,
    scratch: Path,
) -> dict[str, str]:
    """Run what is missing of each plan on the Ray that is up; trial key → message for those that failed."""
    nodes = capacity()
    # Tune would copy the driver's AWS keys into runtime environments, which Ray writes into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE -= set(filter(is_secret_name, class_cache.ENV_VARS_TO_PROPAGATE))
    unbound = PlacementGroupSchedulingStrategy(placement_group=None)
    coordinator = ray.remote(Coordinator).options(
        num_cpus=0, max_concurrency=10_000, scheduling_strategy=unbound
    )
    handle = coordinator.remote(store, nodes)
    by_key = {plan.key: plan for plan in plans}
    outcome: dict[str, str] = dict.fromkeys(by_key, "the trial did not report back; see the logs")

    def take(event: dict[str, Any]) -> None:
        if event["event"] == "complete":
            outcome.pop(event["trial"], None)
        elif event["event"] == "failed":
            outcome[event["trial"]] = event["message"]
        on_event(event)

    done = threading.Event()
    drainer = threading.Thread(target=_drain, args=(handle, done, take), name="event-drain", daemon=True)
    drainer.start()
    trial = tune.with_parameters(
        run_trial,
        plans=by_key,
        placements=dict(placements),
        store=store,
        coordinator=handle,
        scratch=str(scratch),
    )
    slots = sum(node.gpus or node.cpus for node in nodes)
    tuner = tune.Tuner(
        tune.with_resources(trial, SLIVER),
        param_space={"trial": tune.grid_search(list(by_key))},
        tune_config=tune.TuneConfig(max_concurrent_trials=window(slots), reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(scratch), name="tune", verbose=0, callbacks=[_TrialDeaths(handle)]
        ),
    )
    try:
        tuner.fit()
    finally:
        done.set()
        drainer.join(timeout=30)
        ray.kill(handle)
    return outcome


class _TrialDeaths(tune.Callback):
    """Gives back what a trial held whose process died under it, and says so."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune's hook; a trial function itself never raises."""
        key = trial.config["trial"]
        ray.get(self._coordinator.forget.remote(key))
        died = "the process of the trial died (out of memory, or killed)"
        ray.get(self._coordinator.post.remote({"trial": key, "event": "failed", "message": died}))


def window(slots: int) -> int:
    """Trials under way at once: those that run, and some that get ready. Each is a process, so few on a laptop."""
    return slots + max(1, min(8, slots // 2))


def _drain(coordinator: ActorHandle, done: threading.Event, take: Event) -> None:
    last = False
    while not last:
        last = done.wait(DRAIN_EVERY_S)
        try:
            events = ray.get(coordinator.drain.remote())
        except RayActorError:
            logger.exception("the coordinator is gone")
            return
        for event in events:
            try:
                take(event)
            except Exception:
                logger.exception("event %s", event)


def run_trial(
    config: dict[str, Any],
    *,
    plans: Mapping[str, TrialPlan],
    placements: Mapping[str, Placement],
    store: Store,
    coordinator: ActorHandle,
    scratch: str,
) -> None:
    """One Tune trial: shared stages → gate → training gang → gate → evaluation. What fails is an event, not an error."""
    plan = plans[config["trial"]]

    def post(event: dict[str, Any]) -> None:
        ray.get(coordinator.post.remote({"trial": plan.key, **event}))

    post({"event": "started"})
    try:
        missing = plan.missing(store)
        if any(isinstance(stage, TrainStage) for stage in missing):
            post({"event": "stage", "stage": "prepare"})
            _share(plan.train.needs, coordinator)
            _train(plan.train, placements[plan.key], store, coordinator, Path(scratch))
        evaluations = [stage for stage in missing if isinstance(stage, EvaluateStage)]
        if evaluations:
            _share([need for stage in evaluations for need in stage.needs if need != plan.train], coordinator)
            _evaluate(plan, evaluations, store, coordinator, placements[plan.key])
        post({"event": "complete"})
    except Exception as error:
        logger.exception("trial %s", plan.spec.name)
        post({"event": "failed", "message": message(error), "detail": traceback.format_exc()})
    # A model and its engine refer to each other; the next trial of this process needs the room.
    gc.collect()
    tune.report({"done_stages": 1})


def _share(stages: Sequence[Any], coordinator: ActorHandle) -> None:
    ray.get([coordinator.shared.remote(stage) for stage in stages])


def _train(
    stage: TrainStage, placement: Placement, store: Store, coordinator: ActorHandle, scratch: Path
) -> None:
    gpus = 1 if placement.device == "cuda" else 0
    request = Request(id=f"train {stage.key}", kind="train", workers=placement.world_size, gpus=gpus)
    with _granted(coordinator, stage.key, request) as grant:
        here = ray.get_runtime_context().get_node_id()
        in_process = placement.device == "cpu" and grant.nodes == (here,)
        scaling = ScalingConfig(num_workers=0) if in_process else _scaling(placement, grant)
        name = f"train-{stage.key}"
        TorchTrainer(
            _train_rank,
            train_loop_config={
                "stage": stage,
                "placement": placement,
                "store": store,
                "coordinator": coordinator,
                "provenance": {
                    "backend": "ray",
                    "tune_trial_id": tune.get_context().get_trial_id(),
                    "train_run_name": name,
                    "local_mode": in_process,
                },
            },
            torch_config=LoopbackTorchConfig(),
            scaling_config=scaling,
            run_config=RunConfig(
                name=name,
                storage_path=str(scratch),
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=1
                ),
            ),
        ).fit()


@contextlib.contextmanager
def _granted(coordinator: ActorHandle, trial: str, request: Request) -> Iterator[Grant]:
    """What the gate grants, waited for without holding anything, and given back however the block ends."""
    ray.get(coordinator.post.remote({"trial": trial, "event": "stage", "stage": "waiting"}))
    grant: Grant = ray.get(coordinator.acquire.remote(request))
    try:
        yield grant
    finally:
        ray.get(coordinator.release.remote(request.id))


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
    coordinator = config["coordinator"]
    reported = 0.0

    def report(row: dict[str, Any]) -> None:
        nonlocal reported
        if time.monotonic() - reported < REPORT_EVERY_S and row["step"] < row["total"]:
            return
        reported = time.monotonic()
        coordinator.post.remote({"trial": stage.key, "event": "row", "stage": "train", "row": row})

    coordinator.post.remote({"trial": stage.key, "event": "stage", "stage": "train"})
    with without_secrets():
        run_train(stage, config["placement"], config["store"], report, config["provenance"])


@ray.remote(num_cpus=0, max_retries=0)
def _evaluate_task(stages: list[EvaluateStage], store: Store) -> None:
    prepare_worker()
    with without_secrets():
        run_evaluations(stages, store, lambda row: None)


def _evaluate(
    plan: TrialPlan,
    stages: Sequence[EvaluateStage],
    store: Store,
    coordinator: ActorHandle,
    placement: Placement,
) -> None:
    gpus = 1 if placement.device == "cuda" else 0
    request = Request(id=f"evaluate {plan.key}", kind="evaluate", gpus=gpus)
    with _granted(coordinator, plan.key, request) as grant:
        ray.get(coordinator.post.remote({"trial": plan.key, "event": "stage", "stage": "evaluate"}))
        pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
        task = _evaluate_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
        ray.get(task.remote(list(stages), store))
