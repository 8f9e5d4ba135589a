"""The one actor that trials talk to: shared stages run once, the gate grants capacity, events reach the driver.

It holds no CPU, decides nothing itself (plan.decide does) and computes nothing.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.artifacts import Store
from orchestrator.compute import run_shared
from orchestrator.plan import Grant, Node, Request, decide
from orchestrator.redaction import without_secrets
from orchestrator.stages import SharedStage
from orchestrator.workers import prepare_worker
from trainers.errors import PlanError

logger = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_retries=0)
def shared_task(stage: SharedStage, store: Store) -> None:
    """Compute one shared stage; the gate has granted its CPU or GPU."""
    prepare_worker()
    with without_secrets():
        run_shared(stage, store, lambda row: None)


class Coordinator:
    """Run as an async actor with 0 CPUs: `ray.remote(Coordinator).remote(…)`."""

    def __init__(self, store: Store, capacity: Sequence[Node]) -> None:
        self._store = store
        self._capacity = tuple(capacity)
        self._free = {node.id: node for node in capacity}
        self._has_gpus = any(node.gpus for node in capacity)
        self._waiting: dict[str, tuple[Request, asyncio.Future[Grant]]] = {}
        self._granted: dict[str, Grant] = {}
        self._shared: dict[str, asyncio.Task[None]] = {}
        self._events: list[dict[str, Any]] = []

    async def shared(self, stage: SharedStage) -> None:
        """Return when the stage is in the store; the first asker starts it. Raises what it raised."""
        if stage.key not in self._shared:
            self._shared[stage.key] = asyncio.create_task(self._run_shared(stage))
        await asyncio.shield(self._shared[stage.key])

    async def acquire(self, request: Request) -> Grant:
        """Wait until the gate grants the request. Raises PlanError where it never could."""
        if not decide(self._capacity, [request]):
            raise PlanError(f"{request.workers} workers for {request.id} fit nowhere on this cluster.")
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
        for kind in ("train", "evaluate"):
            await self.release(f"{kind} {trial}")

    async def post(self, event: dict[str, Any]) -> None:
        """Note an event for the driver."""
        self._events.append(event)

    async def drain(self) -> list[dict[str, Any]]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _decide(self) -> None:
        for grant in decide(list(self._free.values()), [request for request, _ in self._waiting.values()]):
            _, future = self._waiting.pop(grant.request.id)
            self._granted[grant.request.id] = grant
            self._change(grant, -1)
            if not future.done():
                future.set_result(grant)

    def _change(self, grant: Grant, sign: int) -> None:
        for id in grant.nodes:
            node = self._free[id]
            self._free[id] = replace(
                node, cpus=node.cpus + sign * grant.request.cpus, gpus=node.gpus + sign * grant.request.gpus
            )

    async def _run_shared(self, stage: SharedStage) -> None:
        for need in stage.needs:
            await self.shared(need)  # type: ignore[arg-type]
        if self._store.complete(stage.kind, stage.key):
            return
        gpus = 1 if self._has_gpus and stage.kind == "reference" else 0
        request = Request(id=f"shared {stage.key}", kind="shared", gpus=gpus)
        grant = await self.acquire(request)
        try:
            pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
            task = shared_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
            await task.remote(stage, self._store)
        finally:
            await self.release(request.id)
