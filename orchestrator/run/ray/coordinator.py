"""The one actor of a sweep on Ray: it grants devices as they come free, runs each shared stage once, passes events on.

Trials ask it for a shared stage or for devices, and hold nothing while they wait. `schedule.decide`, a pure function that
`plan` uses too, decides who starts next; the coordinator keeps track of nodes, grants and requests. It holds no CPU and
computes nothing itself.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray.actor import ActorHandle

from orchestrator.plan.durations import Durations, Rate, RateName
from orchestrator.plan.hardware import Node
from orchestrator.plan.schedule import Grant, Request, RequestId, Running, bundles, decide
from orchestrator.run import compute, failures
from orchestrator.run.events import Event, Notice
from orchestrator.run.ray.cluster import capacity, lives, task_on
from orchestrator.run.ray.scaling import NOTHING_SCALES, Scaling, ask_for, node_types, still_absent
from orchestrator.run.trial import Execution
from orchestrator.run.workers import working
from orchestrator.spec.stages import SharedStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import POLL_S
from trainers.errors import Interrupted, PlanError
from trainers.specs import Placement

REFRESH_EVERY_S = 2.0
# How often we ask a node that lost a process whether it lives, and when we trust it again regardless: by then Ray has
# noticed a dead node, which it goes on listing as alive for a while.
ASK_EVERY_S = 2.0
SUSPECTED_S = 90.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A trial to run: its stages, the placement of its training, and its turn among the trainings."""

    plan: TrialPlan
    placement: Placement
    rank: int


class Nodes:
    """The cluster's nodes: those that are up, those that may be dead, and those that the autoscaler may still add."""

    def __init__(self, up: Sequence[Node], scaling: Scaling) -> None:
        self.up = {node.id: node for node in up}
        self.scaling = scaling
        self.suspected: set[str] = set()
        # Node types that did not come in time.
        self.late: list[str] = []

    @property
    def absent(self) -> dict[str, Node]:
        return still_absent(self.scaling.nodes, list(self.up.values()))

    def whole(self) -> list[Node]:
        """Return every node, up or still to come, at its full size."""
        return [*self.up.values(), *self.absent.values()]

    def free(self, held: Iterable[Grant] = ()) -> list[Node]:
        """Return what these grants leave free on every node, except on those that may be dead."""
        left = {id: node for id, node in self.up.items() if id not in self.suspected}
        for grant in held:
            for id in grant.nodes:
                if (node := left.get(id)) is not None:
                    cpus, gpus = node.cpus - grant.request.cpus, node.gpus - grant.request.gpus
                    left[id] = replace(node, cpus=cpus, gpus=gpus)
        return [*left.values(), *self.absent.values()]

    def fits(self, request: Request) -> bool:
        """Return whether the request could be granted if nothing ran."""
        return bool(decide(self.whole(), [request]))

    def suspect(self, grant: Grant) -> set[str]:
        """Distrust the grant's nodes, so that nothing starts there; return those that were trusted until now."""
        new = self.up.keys() & set(grant.nodes) - self.suspected
        self.suspected |= new
        return new

    def follow(self, up: Sequence[Node]) -> None:
        """Remove lost nodes and add new ones."""
        live = {node.id: node for node in up}
        for id in self.up.keys() - live.keys():
            logger.warning("node %s is gone", id)
        self.up = live
        self.suspected &= live.keys()

    def absent_types(self, grant: Grant) -> str:
        """Return the types, as text, of the grant's nodes that are not up yet."""
        return node_types(id for id in grant.nodes if id in self.absent)

    def give_up(self, grant: Grant) -> None:
        """Stop counting on the types of the grant's absent nodes; one that comes later is still used."""
        self.late.append(self.absent_types(grant))
        self.scaling = self.scaling.without(id for id in grant.nodes if id in self.absent)


class Coordinator:
    """Run it as an async actor with 0 CPUs: `ray.remote(Coordinator).remote(…)`."""

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
        self._nodes = Nodes(capacity, scaling)
        self._waiting: dict[RequestId, tuple[Request, asyncio.Future[Grant | None]]] = {}
        self._granted: dict[RequestId, Running] = {}
        # Grants that wait for nodes of the autoscaler, and since when.
        self._promised: dict[RequestId, tuple[Grant, float]] = {}
        self._asked: list[dict[str, float]] = []
        self._shared: dict[str, asyncio.Task[None]] = {}
        self._askers: dict[str, list[str]] = {}
        self._events: list[Event] = []
        self._beats: dict[str, tuple[float, str, int]] = {}
        self._stop_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._looking: set[asyncio.Task[None]] = set()

    async def work(self, trial: str) -> Work:
        """Return one trial's work."""
        return self._work[trial]

    async def durations(self) -> Durations:
        """Return how long stages take, estimated from the trainings finished so far."""
        return self._durations

    async def took(self, rates: Mapping[RateName, Rate]) -> None:
        """Record how fast a finished training ran."""
        self._durations = self._durations.having(rates)

    # Devices.

    async def acquire(self, request: Request) -> Grant | None:
        """Wait until the request is granted; return None where it fits nowhere, even after losing a node.

        Raises Interrupted when stopping.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_refreshing())
        # The trial may have just lost a node; a grant on that node would never start.
        await self._refresh()
        self._require_going_on()
        if not self._nodes.fits(request):
            return None
        future: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = (request, future)
        self._decide()
        return await future

    async def room(self) -> tuple[list[Node], list[str]]:
        """Return all nodes that are up or may still come, and the node types that did not come in time."""
        return self._nodes.whole(), self._nodes.late

    async def release(self, request: RequestId, lost: bool = False) -> None:
        """Take back a grant, if it is still held. If a process was `lost`, its nodes must answer before anything starts there."""
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            waiting[1].cancel()
        running = self._granted.pop(request, None)
        if running is not None:
            for node in self._nodes.suspect(running.grant) if lost else ():
                task = asyncio.create_task(self._suspect(node))
                self._looking.add(task)
                task.add_done_callback(self._looking.discard)
        self._decide()

    async def forget(self, trial: str) -> None:
        """Release the devices of a dead trial and cancel its requests."""
        self._beats.pop(trial, None)
        await self.release(RequestId(kind="train", key=trial))
        await self.release(RequestId(kind="evaluate", key=trial))

    def _decide(self) -> None:
        now_s = time.monotonic()
        waiting = [request for request, _ in self._waiting.values()]
        running = list(self._granted.values())
        free, absent = self._nodes.free(item.grant for item in running), self._nodes.absent
        promised = []
        for grant in decide(free, waiting, running, now_s, absent):
            if not absent.keys().isdisjoint(grant.nodes):
                promised.append(grant)
                continue
            _, future = self._waiting.pop(grant.request.id)
            self._granted[grant.request.id] = Running(grant=grant, until_s=now_s + grant.request.expected_s)
            if not future.done():
                future.set_result(grant)
        self._promise(promised, now_s)

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Update the nodes, and ask for more; a waiting request that no longer fits anywhere gets None."""
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
        await self._ask()

    async def _suspect(self, node: str) -> None:
        """Ask a node that lost a process until it answers; a dead one would fail every trial that starts on it."""
        logger.warning("node %s may be dead; nothing starts there until it answers", node)
        give_up_at = time.monotonic() + SUSPECTED_S
        try:
            while node in self._nodes.suspected and not await lives(node) and time.monotonic() < give_up_at:
                await asyncio.sleep(ASK_EVERY_S)
        finally:
            # If Ray lists a dead node even now, the retry policy deals with it.
            self._nodes.suspected.discard(node)
            self._decide()

    # Nodes that the autoscaler may add.

    def _promise(self, promised: Sequence[Grant], now_s: float) -> None:
        """Count on the nodes of these grants; each is decided anew until its nodes are up."""
        before, self._promised = self._promised, {}
        for grant in promised:
            id = grant.request.id
            self._promised[id] = (grant, before[id][1] if id in before else now_s)
            if id not in before:
                types, wait_s = self._nodes.absent_types(grant), self._nodes.scaling.wait_s
                self._say(grant, f"waits for a node of type {types}, {wait_s:.0f} s at most")

    async def _ask(self) -> None:
        """Tell the autoscaler what is held and promised; it may take down the rest."""
        held = [running.grant for running in self._granted.values()]
        wanted = bundles([*held, *(grant for grant, _ in self._promised.values())])
        if self._nodes.scaling.nodes and wanted != self._asked:
            try:
                await asyncio.to_thread(ask_for, wanted)
                self._asked = wanted
            except Exception:
                logger.exception("the autoscaler cannot be asked for nodes")

    def _give_up_late(self) -> None:
        """Stop counting on node types that did not come in time."""
        now_s, wait_s = time.monotonic(), self._nodes.scaling.wait_s
        for grant, since_s in self._promised.values():
            late = self._nodes.absent_types(grant)
            if late and now_s - since_s > wait_s:
                self._say(grant, f"no node of type {late} came within {wait_s:.0f} s")
                self._nodes.give_up(grant)

    def _say(self, grant: Grant, text: str) -> None:
        request = grant.request
        logger.warning("%s %s: %s", request.kind, request.key, text)
        if request.kind != "shared":
            self._events.append(Notice(trial=request.key, text=text))

    # Stages that several trials need.

    async def shared(self, stage: SharedStage, trial: str) -> None:
        """Return when the stage is in the store; the first trial that asks starts it. Raises the stage's error."""
        askers = self._askers.setdefault(stage.key, [])
        askers.append(trial)
        try:
            await self._once(stage)
        finally:
            askers.remove(trial)

    async def _once(self, stage: SharedStage) -> None:
        known = self._shared.get(stage.key)
        if known is None or (known.done() and self._worth_another(known, stage)):
            self._shared[stage.key] = asyncio.create_task(self._run_shared(stage))
        await asyncio.shield(self._shared[stage.key])

    def _worth_another(self, ended: asyncio.Task[None], stage: SharedStage) -> bool:
        """Return whether a stage that ended should run again: its artifact is gone, or its failure may have passed."""
        error = ended.exception()
        if error is None:
            return not self._execution.store.complete(stage.kind, stage.key)
        # The trial that met a damaged input has set it aside; the next one that asks computes it again.
        again = failures.damage_behind(error) is not None
        return again or failures.classify(error).cause in self._execution.retries.limits

    async def _run_shared(self, stage: SharedStage) -> None:
        """Compute the stage and its needs, or wait while another driver computes it."""
        for need in stage.needs:
            await self._once(need)  # type: ignore[arg-type]
        leases, store, name = self._execution.leases, self._execution.store, f"{stage.kind}-{stage.key}"
        while not store.complete(stage.kind, stage.key):
            self._require_going_on()
            if not leases.take(name):
                await asyncio.sleep(POLL_S)
                continue
            try:
                await self._compute_shared(stage)
            finally:
                leases.release(name)

    async def _compute_shared(self, stage: SharedStage) -> None:
        """Compute the stage in a task, on a GPU where it runs a model."""
        has_gpus = any(node.gpus for node in self._nodes.whole())
        gpus = 1 if has_gpus and stage.kind in ("reference", "sample") else 0
        request = Request(kind="shared", key=stage.key, gpus=gpus)
        grant = await self.acquire(request)
        if grant is None:
            raise PlanError(
                f"{stage.label} needs a {'GPU' if gpus else 'CPU'}, and the cluster has none left."
            )
        lost = False
        try:
            task = task_on(grant.nodes[0], shared_task, cpus=request.cpus, gpus=request.gpus)
            await task.remote(stage, self._execution.store, ray.get_runtime_context().current_actor)
        except Exception as error:
            lost = failures.lost(error)
            raise
        finally:
            await self.release(request.id, lost)

    # Events and heartbeats.

    async def post(self, event: Event) -> None:
        self._events.append(event)

    async def post_shared(self, key: str, event: Event) -> None:
        """Post an event of a shared stage for every trial that waits for it; a Notice only for the first."""
        # A trial asks twice if its first process died.
        trials = list(dict.fromkeys(self._askers.get(key, ())))
        told = trials[:1] if isinstance(event, Notice) else trials
        self._events += [replace(event, trial=trial) for trial in told]

    async def drain(self) -> list[Event]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    async def beat(self, trial: str, node: str, pid: int) -> None:
        """Record a heartbeat of a trial's process; pid 0 marks the last."""
        self._beats[trial] = (time.monotonic(), node, pid)
        if not pid:
            del self._beats[trial]

    async def silent(self, timeout_s: float) -> list[tuple[str, str, int]]:
        """Return (trial, node, pid) of trials without a heartbeat for `timeout_s`."""
        now = time.monotonic()
        return [(trial, node, pid) for trial, (at, node, pid) in self._beats.items() if now - at > timeout_s]

    # The end.

    async def stop(self, grace_s: float) -> None:
        """Start nothing new, and ask everything that runs to end within `grace_s` seconds."""
        self._stop_at = time.monotonic() + grace_s
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(Interrupted("stopped on request while waiting."))
        self._waiting.clear()

    async def stop_left(self) -> float | None:
        """Return the seconds left until everything must have ended; None unless stopping."""
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    async def training(self) -> int:
        """Return how many trainings hold devices."""
        return sum(running.grant.request.kind == "train" for running in self._granted.values())

    def _require_going_on(self) -> None:
        if self._stop_at is not None:
            raise Interrupted("stopped on request.")


def shared_task(stage: SharedStage, store: Store, coordinator: ActorHandle) -> None:
    """Compute one shared stage on the granted device; the trials that wait for it see its progress."""

    def post(event: Event) -> None:
        coordinator.post_shared.remote(stage.key, event)

    with working(stage.kind, post, stage.key) as report:
        compute.run_shared(stage, store, report)
