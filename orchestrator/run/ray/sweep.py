"""Runs a sweep on Ray: Tune starts a function per trial, Train runs each gang, tasks evaluate; the coordinator says when.

A trial function only drives: it holds a sliver of the head node, never a CPU or GPU, so no trial can keep another from
starting. A training of world size 1 on a CPU runs in the trial's own process (Train's local mode), which the coordinator
counts as one CPU; everything else starts tasks and gangs on the nodes that the coordinator grants.
"""

import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.plan.durations import Durations, Rate, RateName, slowest
from orchestrator.plan.hardware import Node
from orchestrator.plan.schedule import ranked, window
from orchestrator.run.events import Event, Failed, Post, Retried, Stopped
from orchestrator.run.ray.backend import RayBackend, training
from orchestrator.run.ray.cluster import capacity, start_ray, task_on
from orchestrator.run.ray.coordinator import Coordinator, Work
from orchestrator.run.ray.scaling import Scaling, ask_for, still_absent
from orchestrator.run.trial import Execution, run_to_end
from orchestrator.run.workers import make_room
from orchestrator.spec.redaction import is_secret_name
from orchestrator.spec.stages import TrialPlan
from trainers.errors import Interrupted, WorkerLost
from trainers.specs import Placement
from trainers.train.stopping import StopRequest

# A resource of the head node that also exists on clusters that we did not start.
SLIVER = {"node:__internal_head__": 0.001}
BEAT_EVERY_S = 2.0
DRAIN_EVERY_S = 0.3
# How long the end of a sweep waits for its last events.
LAST_WORDS_S = 60.0
# A trial's process that sends no heartbeat for this long is killed; RMSWEEP_SILENCE_S changes it.
SILENCE_S = 120.0
DIED = "the process of the trial died or stopped answering"

logger = logging.getLogger(__name__)


def run_on_ray(
    plans: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    on_event: Post,
    execution: Execution,
    scratch: Path,
    stop: StopRequest,
    workers: Sequence[Node] = (),
    measured: Mapping[RateName, Rate] | None = None,
) -> None:
    """Run the missing stages of each plan on the cluster that was joined, else on a new local one; failures are events.

    `workers` are all nodes that the autoscaler may run at once, `measured` the rates of finished trainings. Raises
    KeyboardInterrupt when stopped.
    """
    start_ray(len(os.sched_getaffinity(0)))
    # Ray's own handler would exit with the signal's number.
    with stop.listening():
        live = capacity()
        nodes = [*live, *still_absent(workers, live).values()]
        durations = Durations(store=execution.store, kind=slowest(nodes), measured=measured or {})
        by_key = {plan.key: plan for plan in plans}
        asked = [training(plan, placements[plan.key], durations) for plan in plans]
        # In the order in which trainings should start.
        work = {
            request.key: Work(plan=by_key[request.key], placement=placements[request.key], rank=request.rank)
            for request in ranked(asked, nodes)
        }
        # On the head, like the trial functions, so that losing another node does not end it.
        coordinator = ray.remote(Coordinator).options(
            num_cpus=0,
            resources=SLIVER,
            max_concurrency=10_000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
        )
        handle = coordinator.remote(execution, live, work, durations, Scaling(nodes=tuple(workers)))
        slots = sum(node.gpus or node.cpus for node in nodes)
        tuner = _tuner(list(work), execution, handle, scratch, at_once=window(slots))
        with passing_events(handle, on_event):
            try:
                with stop.deferred(lambda: stop_gracefully(handle, stop)):
                    tuner.fit()
            finally:
                with contextlib.suppress(RayActorError):
                    ray.get(handle.stop.remote(0.0))
                if workers:
                    # Ray keeps a request for nodes until the next one.
                    ask_for([])
        ray.kill(handle)


def _tuner(
    trials: Sequence[str],
    execution: Execution,
    coordinator: ActorHandle,
    scratch: Path,
    *,
    at_once: int,
) -> tune.Tuner:
    """Return a tuner that runs the trial functions, `at_once` at a time, in reused processes."""
    # Otherwise Tune copies the driver's AWS keys into runtime environments, which Ray writes into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE -= set(filter(is_secret_name, class_cache.ENV_VARS_TO_PROPAGATE))
    trial = tune.with_parameters(
        run_trial, execution=execution, coordinator=coordinator, scratch=str(scratch)
    )
    # A trial function never raises, so a failure in Tune means that its process died; the trial restarts in another.
    deaths = tune.FailureConfig(max_failures=execution.retries.limits["WorkerLost"])
    return tune.Tuner(
        tune.with_resources(trial, SLIVER),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(scratch),
            # The rounds of one command share a scratch folder.
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
    """Tune's trial function: drive one trial to its end. Failures are events, not errors."""
    work: Work = ray.get(coordinator.work.remote(config["trial"]))
    plan = work.plan
    backend = RayBackend(work, execution, coordinator, Path(scratch))
    try:
        with _beating(plan.key, coordinator):
            run_to_end(plan, work.placement, backend, execution)
    except Interrupted:
        backend.post(Stopped())
    make_room()
    tune.report({"done_stages": 1})


@contextlib.contextmanager
def _beating(trial: str, coordinator: ActorHandle) -> Iterator[None]:
    """Send heartbeats from a thread, so that a hanging process is noticed."""
    done = threading.Event()
    node, pid = ray.get_runtime_context().get_node_id(), os.getpid()

    def beat() -> None:
        while not done.wait(BEAT_EVERY_S):
            coordinator.beat.remote(trial, node, pid)

    threading.Thread(target=beat, name="trial-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        coordinator.beat.remote(trial, node, 0)


@contextlib.contextmanager
def passing_events(coordinator: ActorHandle, on_event: Post) -> Iterator[None]:
    """Pass events from the coordinator to `on_event` in a thread, until the block ends and none are left."""
    done = threading.Event()
    drain = threading.Thread(
        target=_drain, args=(coordinator, on_event, done), name="event-drain", daemon=True
    )
    drain.start()
    try:
        yield
    finally:
        done.set()
        drain.join(timeout=LAST_WORDS_S)
        if drain.is_alive():
            logger.error("the coordinator did not answer within %s s; its last events are lost", LAST_WORDS_S)


def _drain(coordinator: ActorHandle, on_event: Post, done: threading.Event) -> None:
    """Pass events on until `done`, and kill the processes of trials that send no heartbeat any more."""
    silence_s = float(os.environ.get("RMSWEEP_SILENCE_S", SILENCE_S))
    looked, last = time.monotonic(), False
    while not last:
        last = done.wait(DRAIN_EVERY_S)
        try:
            events = ray.get(coordinator.drain.remote())
        except RayError:
            logger.exception("the coordinator does not answer")
            return
        for event in events:
            try:
                on_event(event)
            # Rich exits when nobody reads its output any more; the sweep goes on.
            except (Exception, SystemExit):
                logger.exception("event %s", event)
        if not last and time.monotonic() - looked > min(5.0, silence_s / 4):
            looked = time.monotonic()
            _end_silent(coordinator, silence_s)


def _end_silent(coordinator: ActorHandle, silence_s: float) -> None:
    try:
        for trial, node, pid in ray.get(coordinator.silent.remote(silence_s), timeout=30):
            logger.warning(
                "trial %s sent no heartbeat for %s s; killing its process %s", trial, silence_s, pid
            )
            ray.get(task_on(node, _end_process).remote(pid), timeout=30)
            ray.get(coordinator.beat.remote(trial, node, 0), timeout=30)
    except RayError:
        logger.exception("cannot check for hanging trials; trying again later")


def _end_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class TrialDeaths(tune.Callback):
    """Releases the devices of a trial whose process died, and posts the event."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when the trial restarts in another process."""
        key = trial.config["trial"]
        how = "again in another process"
        self._note(Retried(trial=key, cause=WorkerLost.__name__, message=DIED, how=how))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when the trial's processes have died too often."""
        self._note(Failed(trial=trial.config["trial"], cause=WorkerLost.__name__, message=DIED))

    def _note(self, event: Event) -> None:
        ray.get(self._coordinator.forget.remote(event.trial))
        ray.get(self._coordinator.post.remote(event))


def stop_gracefully(coordinator: ActorHandle, stop: StopRequest) -> None:
    """Ask trainings for a last checkpoint; return when all have ended or the grace period is over."""
    try:
        ray.get(coordinator.stop.remote(stop.left_s() or 0.0), timeout=10)
        while (stop.left_s() or 0.0) > 0 and ray.get(coordinator.training.remote(), timeout=10):
            time.sleep(0.2)
        # The next drain brings the trials' last events.
        time.sleep(2 * DRAIN_EVERY_S)
    except RayError:
        logger.exception("the coordinator does not answer")
