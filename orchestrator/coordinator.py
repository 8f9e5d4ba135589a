"""The one actor that trials talk to: shared stages run once, the gate grants capacity, events reach the driver.

It holds no CPU, decides nothing itself (gate.decide does) and computes nothing.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator import failures
from orchestrator.cluster import capacity
from orchestrator.durations import Durations, RateName
from orchestrator.estimate import Rate
from orchestrator.free_nodes import FreeNodes
from orchestrator.gate import Grant, Request, Running, bundles, decide
from orchestrator.plan import Node
from orchestrator.rungs import Rungs, Scored
from orchestrator.scaling import NOTHING_SCALES, Scaling, ask_for
from orchestrator.shared_stages import SharedStages, start_shared
from orchestrator.stages import SharedStage
from orchestrator.suspicion import Suspicion
from orchestrator.trial import Execution
from orchestrator.trial_plan import TrialPlan
from trainers.errors import Interrupted, PlanError
from trainers.specs import Placement

REFRESH_EVERY_S = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a trial is to do: its stages, how its training is laid out, and its turn among the trainings."""

    plan: TrialPlan
    placement: Placement
    rank: int


class Coordinator:
    """Run as an async actor with 0 CPUs: `ray.remote(Coordinator).remote(…)`."""

    def __init__(
        self,
        execution: Execution,
        capacity: Sequence[Node],
        work: Mapping[str, Work],
        durations: Durations,
        scaling: Scaling = NOTHING_SCALES,
    ) -> None:
        self._execution = execution
        self._durations = durations
        self._work = work
        self._nodes = FreeNodes(capacity, scaling)
        self._promised: dict[str, tuple[Grant, float]] = {}
        self._asked: list[dict[str, float]] = []
        self._asking: asyncio.Task[None] | None = None
        self._waiting: dict[str, tuple[Request, asyncio.Future[Grant | None]]] = {}
        self._granted: dict[str, Running] = {}
        self._shared = SharedStages(execution, self._compute_shared, self._require_going_on)
        self._events: list[dict[str, Any]] = []
        self._beats: dict[str, tuple[float, str, int]] = {}
        self._rungs = Rungs()
        self._stop_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._suspicion = Suspicion(self._nodes, self._decide)

    async def work(self, trial: str) -> Work:
        """What a trial is to do: to be asked for by itself, as no trial needs the plans of all."""
        return self._work[trial]

    async def durations(self) -> Durations:
        """How long stages take, by what trainings have taken up to now."""
        return self._durations

    async def took(self, rates: Mapping[RateName, Rate]) -> None:
        """Take in the rate of a training that has ended."""
        self._durations = self._durations.having(rates)

    async def shared(self, stage: SharedStage, trial: str) -> None:
        """Return when the stage is in the store; the first asker starts it. Raises what it raised.

        `trial` hears how far it is until then.
        """
        await self._shared.complete(stage, trial)

    async def acquire(self, request: Request) -> Grant | None:
        """Wait until the gate grants the request; None where it fits nowhere, now or since a node was lost.

        Raises Interrupted when stopping.
        """
        self._require_going_on()
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_refreshing())
        # Who asks may have just lost a node; a grant on it would wait in vain.
        await self._refresh()
        if not self._nodes.fits(request):
            return None
        future: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = (request, future)
        self._decide()
        return await future

    async def room(self) -> tuple[list[Node], list[str]]:
        """All nodes that there are and may yet come, and the types of those that were waited for in vain."""
        return self._nodes.whole(), self._nodes.late

    async def release(self, request_id: str, lost: bool = False) -> None:
        """Give back what was granted; nothing happens where it was given back before.

        Where a process was `lost`, its nodes are looked at before anything else is started there.
        """
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting[1].cancel()
        running = self._granted.pop(request_id, None)
        if running is not None:
            self._nodes.give_back(running.grant)
            if lost:
                self._suspicion.of(running.grant)
        self._decide()

    async def forget(self, trial: str) -> None:
        """Take back whatever a trial that died holds or waits for."""
        self._beats.pop(trial, None)
        self._rungs.begin(trial)
        for kind in ("train", "evaluate"):
            await self.release(f"{kind} {trial}")

    async def goes_on(self, training: str, scored: Scored) -> bool:
        """Whether a training of a search goes on after a rung, once Tune has ruled. Raises Interrupted when stopping."""
        self._require_going_on()
        return await self._rungs.goes_on(training, scored)

    async def undecided(self, training: str) -> Scored | None:
        """Wait for a rung of the training that Tune has yet to rule on; None at its end."""
        return await self._rungs.undecided(training)

    async def rule(self, training: str, epoch: int, goes_on: bool) -> None:
        """What Tune has ruled."""
        self._rungs.rule(training, epoch, goes_on)

    async def end_rungs(self, training: str) -> None:
        """The training comes to no further rung."""
        await self._rungs.end(training)

    async def post(self, event: dict[str, Any]) -> None:
        """Note an event for the driver."""
        self._events.append(event)

    async def post_shared(self, key: str, event: dict[str, Any]) -> None:
        """Note an event of a shared stage, for each trial that waits for it; what is to be read, for one of them."""
        trials = self._shared.asked_by(key)
        told = trials[:1] if event["event"] == "notice" else trials
        self._events += [{"trial": trial, **event} for trial in told]

    async def drain(self) -> list[dict[str, Any]]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    async def beat(self, trial: str, node: str, pid: int) -> None:
        """A sign of life of the process that drives a trial; pid 0 is its last."""
        self._beats[trial] = (time.monotonic(), node, pid)
        if not pid:
            del self._beats[trial]

    async def silent(self, timeout_s: float) -> list[tuple[str, str, int]]:
        """(trial, node, pid) of trials whose process gave no sign for longer than that."""
        now = time.monotonic()
        return [(trial, node, pid) for trial, (at, node, pid) in self._beats.items() if now - at > timeout_s]

    async def stop(self, grace_s: float) -> None:
        """Ask everything to end within `grace_s` seconds; nothing new starts."""
        self._stop_at = time.monotonic() + grace_s
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(Interrupted("stopped on request while waiting."))
        self._waiting.clear()
        self._rungs.stop()

    async def stop_left(self) -> float | None:
        """None while nobody has asked to stop, else the seconds that are left."""
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    async def training(self) -> int:
        """How many trainings hold a grant."""
        return sum(running.grant.request.kind == "train" for running in self._granted.values())

    def _require_going_on(self) -> None:
        if self._stop_at is not None:
            raise Interrupted("stopped on request.")

    def _decide(self) -> None:
        now_s = time.monotonic()
        grants = decide(
            self._nodes.free(),
            [request for request, _ in self._waiting.values()],
            list(self._granted.values()),
            now_s,
            self._nodes.absent,
        )
        promised = [grant for grant in grants if not self._nodes.absent.keys().isdisjoint(grant.nodes)]
        for grant in grants:
            if grant in promised:
                continue
            _, future = self._waiting.pop(grant.request.id)
            self._granted[grant.request.id] = Running(grant=grant, until_s=now_s + grant.request.expected_s)
            self._nodes.hold(grant)
            if not future.done():
                future.set_result(grant)
        self._promise(promised, now_s)

    def _promise(self, promised: Sequence[Grant], now_s: float) -> None:
        """Have the nodes come that these wait for; they hold nothing, and are decided on anew until they start."""
        for grant in promised:
            if grant.request.id not in self._promised:
                types, wait_s = self._nodes.absent_types(grant), self._nodes.scaling.wait_s
                self._say(grant, f"waits for a node of type {types}, {wait_s:.0f} s at most")
        before = self._promised
        self._promised = {
            grant.request.id: (grant, before.get(grant.request.id, (grant, now_s))[1]) for grant in promised
        }
        if self._nodes.scaling.nodes and self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Tell the autoscaler what is held and promised; what it no longer hears of it may take down."""
        try:
            while (wanted := self._wanted()) != self._asked:
                await asyncio.to_thread(ask_for, wanted)
                self._asked = wanted
        except Exception:
            logger.exception("the autoscaler cannot be asked for nodes")
        finally:
            self._asking = None

    def _wanted(self) -> list[dict[str, float]]:
        held = [running.grant for running in self._granted.values()]
        return bundles([*held, *(grant for grant, _ in self._promised.values())])

    def _say(self, grant: Grant, text: str) -> None:
        kind, _, trial = grant.request.id.partition(" ")
        logger.warning("%s: %s", grant.request.id, text)
        if kind != "shared":
            self._events.append({"trial": trial, "event": "notice", "text": text})

    def _give_up_late(self) -> None:
        """Count no longer on the types of node that did not come in time; one that comes later is welcome."""
        now_s, wait_s = time.monotonic(), self._nodes.scaling.wait_s
        for grant, since_s in self._promised.values():
            late = self._nodes.absent_types(grant)
            if late and now_s - since_s > wait_s:
                self._say(grant, f"no node of type {late} came within {wait_s:.0f} s")
                self._nodes.give_up(grant)

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Follow nodes that are lost and nodes that join; who waits for what is gone for good is told."""
        try:
            live = await asyncio.to_thread(capacity)
        except Exception:
            logger.exception("the cluster's nodes cannot be listed")
            return
        self._nodes.follow(live)
        self._give_up_late()
        for id, (request, future) in list(self._waiting.items()):
            if not self._nodes.fits(request):
                del self._waiting[id]
                if not future.done():
                    future.set_result(None)
        self._decide()

    async def _compute_shared(self, stage: SharedStage) -> None:
        has_gpus = any(node.gpus for node in self._nodes.whole())
        gpus = 1 if has_gpus and stage.kind == "reference" else 0
        request = Request(id=f"shared {stage.key}", kind="shared", gpus=gpus)
        grant = await self.acquire(request)
        if grant is None:
            raise PlanError(
                f"{stage.label} needs a {'GPU' if gpus else 'CPU'}, and the cluster has none left."
            )
        lost = False
        try:
            await start_shared(stage, self._execution, grant, ray.get_runtime_context().current_actor)
        except Exception as error:
            lost = failures.lost(error)
            raise
        finally:
            await self.release(request.id, lost)
