"""The driver's side of a sweep on Ray: events drained, silent trials ended, dead ones given up, a stop carried out."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainers.stopping import StopRequest

DRAIN_EVERY_S = 0.3
# How long the end of a sweep waits for what its coordinator has still to say.
LAST_WORDS_S = 60.0
# A process that gives no sign of life for so long hangs; RMSWEEP_SILENCE_S sets another time.
SILENCE_S = 120.0
DIED = "the process of the trial died or stopped answering"

logger = logging.getLogger(__name__)


class Events:
    """Carries events from the coordinator to the driver, from a thread; a context manager, drained at its end.

    A trial that ends without a word is reported as failed.
    """

    def __init__(self, coordinator: ActorHandle, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._coordinator, self._on_event = coordinator, on_event
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="event-drain", daemon=True)
        self._silence_s = float(os.environ.get("RMSWEEP_SILENCE_S", SILENCE_S))

    def __enter__(self) -> "Events":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=LAST_WORDS_S)
        if self._thread.is_alive():
            logger.error("the coordinator did not answer within %s s; its last events are lost", LAST_WORDS_S)

    def _drain(self) -> None:
        looked = time.monotonic()
        last, asked = False, None
        while True:
            if asked is None:
                last = self._done.wait(DRAIN_EVERY_S)
                asked = self._coordinator.drain.remote()
            try:
                events = ray.get(asked, timeout=10)
            except GetTimeoutError:
                # Asked for again it would be an empty answer: the events are in this one and nowhere else.
                logger.warning("the coordinator is slow to answer")
                continue
            except RayError:
                logger.exception("the coordinator does not answer")
                return
            asked = None
            self._tell(events)
            if last:
                return
            if time.monotonic() - looked > min(5.0, self._silence_s / 4):
                looked = time.monotonic()
                self._end_silent()

    def _tell(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            try:
                self._on_event(event)
            # Rich wants to exit where nobody reads its output any more; the sweep goes on.
            except (Exception, SystemExit):
                logger.exception("event %s", event)

    def _end_silent(self) -> None:
        try:
            for trial, node, pid in ray.get(self._coordinator.silent.remote(self._silence_s), timeout=30):
                logger.warning(
                    "trial %s has been silent for %s s; its process %s is ended", trial, self._silence_s, pid
                )
                pinned = NodeAffinitySchedulingStrategy(node, soft=False)
                ray.get(_end_process.options(scheduling_strategy=pinned).remote(pid), timeout=30)
                ray.get(self._coordinator.beat.remote(trial, node, 0), timeout=30)
        except RayError:
            logger.exception("silent trials are looked for again")


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class TrialDeaths(tune.Callback):
    """Gives back what a trial held whose process died under it, and says so."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune's hook: the trial starts again in another process."""
        self._note(trial.config["trial"], {"event": "retry", "how": "again in another process"})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune's hook: the trial has died too often."""
        self._note(trial.config["trial"], {"event": "failed"})

    def _note(self, key: str, event: dict[str, str]) -> None:
        ray.get(self._coordinator.forget.remote(key))
        ray.get(
            self._coordinator.post.remote({"trial": key, "cause": "WorkerLost", "message": DIED, **event})
        )


def stop_gracefully(coordinator: ActorHandle, stop: StopRequest) -> None:
    """Ask trainings for a last checkpoint, and return when none is left or the grace period is over."""
    try:
        ray.get(coordinator.stop.remote(stop.left_s() or 0.0), timeout=10)
        while (stop.left_s() or 0.0) > 0 and ray.get(coordinator.training.remote(), timeout=10):
            time.sleep(0.2)
        # What trials have to say about it comes with the next drain.
        time.sleep(2 * DRAIN_EVERY_S)
    except RayError:
        logger.exception("the coordinator does not answer")
