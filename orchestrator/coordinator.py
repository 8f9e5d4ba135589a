"""The one actor that trials talk to: shared stages run once, the gate grants capacity, events reach the driver.

It holds no CPU, decides nothing itself (plan.decide does) and computes nothing.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import failures
from orchestrator.claims import POLL_S
from orchestrator.cluster import capacity
from orchestrator.plan import Grant, Node, Request, decide
from orchestrator.redaction import without_secrets
from orchestrator.stages import SharedStage
from orchestrator.trial import Execution, compute_claimed
from orchestrator.trial_plan import TrialPlan
from orchestrator.workers import prepare_worker
from trainers.errors import Interrupted, PlanError
from trainers.specs import Placement

REFRESH_EVERY_S = 2.0

logger = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_retries=0)
def shared_task(stage: SharedStage, execution: Execution) -> None:
    """Compute one shared stage; the gate has granted its CPU or GPU."""
    prepare_worker()
    with without_secrets():
        compute_claimed(stage, execution, lambda row: None)


class Coordinator:
    """Run as an async actor with 0 CPUs: `ray.remote(Coordinator).remote(…)`."""

    def __init__(
        self,
        execution: Execution,
        capacity: Sequence[Node],
        work: Mapping[str, tuple[TrialPlan, Placement]],
    ) -> None:
        self._execution = execution
        self._work = work
        self._capacity = {node.id: node for node in capacity}
        self._free = dict(self._capacity)
        self._waiting: dict[str, tuple[Request, asyncio.Future[Grant]]] = {}
        self._granted: dict[str, Grant] = {}
        self._shared: dict[str, asyncio.Task[None]] = {}
        self._events: list[dict[str, Any]] = []
        self._beats: dict[str, tuple[float, str, int]] = {}
        self._stop_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def plan(self, trial: str) -> tuple[TrialPlan, Placement]:
        """What a trial is to do: to be asked for by itself, as no trial needs the plans of all."""
        return self._work[trial]

    async def shared(self, stage: SharedStage) -> None:
        """Return when the stage is in the store; the first asker starts it. Raises what it raised."""
        known = self._shared.get(stage.key)
        if known is None or (known.done() and self._worth_another(known, stage)):
            self._shared[stage.key] = asyncio.create_task(self._run_shared(stage))
        await asyncio.shield(self._shared[stage.key])

    def _worth_another(self, ended: asyncio.Task[None], stage: SharedStage) -> bool:
        """Whether a stage that was done is no longer, or failed for a reason that may have passed."""
        error = ended.exception()
        if error is None:
            return not self._execution.store.complete(stage.kind, stage.key)
        damaged = failures.damage(error) is not None
        return damaged or self._execution.retries.limit(failures.classify(error).cause) > 0

    async def acquire(self, request: Request) -> Grant:
        """Wait until the gate grants the request. Raises PlanError where it never could, Interrupted when stopping."""
        self._require_going_on()
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_refreshing())
        # Who asks may have just lost a node; a grant on it would wait in vain.
        await self._refresh()
        self._require_fit(request)
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = (request, future)
        self._decide()
        return await future

    async def release(self, request_id: str) -> None:
        """Give back what was granted; nothing happens where it was given back before."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting[1].cancel()
        grant = self._granted.pop(request_id, None)
        if grant is not None:
            self._change(grant, +1)
        self._decide()

    async def forget(self, trial: str) -> None:
        """Take back whatever a trial that died holds or waits for."""
        self._beats.pop(trial, None)
        for kind in ("train", "evaluate"):
            await self.release(f"{kind} {trial}")

    async def post(self, event: dict[str, Any]) -> None:
        """Note an event for the driver."""
        self._events.append(event)

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

    async def stop_left(self) -> float | None:
        """None while nobody has asked to stop, else the seconds that are left."""
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    async def training(self) -> int:
        """How many trainings hold a grant."""
        return sum(grant.request.kind == "train" for grant in self._granted.values())

    def _require_going_on(self) -> None:
        if self._stop_at is not None:
            raise Interrupted("stopped on request.")

    def _decide(self) -> None:
        for grant in decide(list(self._free.values()), [request for request, _ in self._waiting.values()]):
            _, future = self._waiting.pop(grant.request.id)
            self._granted[grant.request.id] = grant
            self._change(grant, -1)
            if not future.done():
                future.set_result(grant)

    def _change(self, grant: Grant, sign: int) -> None:
        for id in grant.nodes:
            node = self._free.get(id)
            # A node that is gone took what it had with it.
            if node is not None:
                self._free[id] = replace(
                    node,
                    cpus=node.cpus + sign * grant.request.cpus,
                    gpus=node.gpus + sign * grant.request.gpus,
                )

    def _require_fit(self, request: Request) -> None:
        if not decide(list(self._capacity.values()), [request]):
            raise PlanError(f"{request.workers} workers for {request.id} fit nowhere on this cluster.")

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Follow nodes that are lost and nodes that join; who waits for what is gone for good is told."""
        try:
            live = {node.id: node for node in await asyncio.to_thread(capacity)}
        except Exception:
            logger.exception("the cluster's nodes cannot be listed")
            return
        for id in self._capacity.keys() - live.keys():
            logger.warning("node %s is gone", id)
            del self._capacity[id], self._free[id]
        for id in live.keys() - self._capacity.keys():
            self._capacity[id] = self._free[id] = live[id]
        for id, (request, future) in list(self._waiting.items()):
            try:
                self._require_fit(request)
            except PlanError as error:
                del self._waiting[id]
                if not future.done():
                    future.set_exception(error)
        self._decide()

    async def _run_shared(self, stage: SharedStage) -> None:
        for need in stage.needs:
            await self.shared(need)  # type: ignore[arg-type]
        claims, name = self._execution.claims, f"{stage.kind}-{stage.key}"
        watch = claims.watch()
        while not self._execution.store.complete(stage.kind, stage.key):
            self._require_going_on()
            if not claims.take(name, watch):
                await asyncio.sleep(POLL_S)
                continue
            try:
                await self._compute_shared(stage)
            finally:
                claims.release(name)

    async def _compute_shared(self, stage: SharedStage) -> None:
        if self._execution.store.complete(stage.kind, stage.key):
            return
        has_gpus = any(node.gpus for node in self._capacity.values())
        gpus = 1 if has_gpus and stage.kind == "reference" else 0
        request = Request(id=f"shared {stage.key}", kind="shared", gpus=gpus)
        grant = await self.acquire(request)
        try:
            pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
            task = shared_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
            await task.remote(stage, self._execution)
        finally:
            await self.release(request.id)
