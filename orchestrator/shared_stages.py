"""Stages that several trials of a sweep need: each runs once, whoever asks first, and a driver beside ours waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import failures
from orchestrator.claims import POLL_S
from orchestrator.gate import Grant
from orchestrator.redaction import without_secrets
from orchestrator.stages import SharedStage
from orchestrator.trial import Execution, Rows, compute_claimed


class SharedStages:
    """One task for each stage, which all who need it await; `compute` runs one whose claim is ours.

    `require_going_on` raises Interrupted where the sweep is asked to stop.
    """

    def __init__(
        self,
        execution: Execution,
        compute: Callable[[SharedStage], Awaitable[None]],
        require_going_on: Callable[[], None],
    ) -> None:
        self._execution = execution
        self._compute = compute
        self._require_going_on = require_going_on
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._askers: dict[str, list[str]] = {}

    async def complete(self, stage: SharedStage, trial: str) -> None:
        """Return when the stage is in the store; the first asker starts it. Raises what it raised."""
        askers = self._askers.setdefault(stage.key, [])
        askers.append(trial)
        try:
            await self._once(stage)
        finally:
            askers.remove(trial)

    def asked_by(self, key: str) -> tuple[str, ...]:
        """The trials that wait for a stage now, each once: the call of a process that died lives on."""
        return tuple(dict.fromkeys(self._askers.get(key, ())))

    async def _once(self, stage: SharedStage) -> None:
        known = self._tasks.get(stage.key)
        if known is None or (known.done() and self._worth_another(known, stage)):
            self._tasks[stage.key] = asyncio.create_task(self._run(stage))
        await asyncio.shield(self._tasks[stage.key])

    def _worth_another(self, ended: asyncio.Task[None], stage: SharedStage) -> bool:
        """Whether a stage that was done is no longer, or failed for a reason that may have passed."""
        error = ended.exception()
        if error is None:
            return not self._execution.store.complete(stage.kind, stage.key)
        damaged = failures.damage(error) is not None
        return damaged or self._execution.retries.limit(failures.classify(error).cause) > 0

    async def _run(self, stage: SharedStage) -> None:
        for need in stage.needs:
            await self._once(need)  # type: ignore[arg-type]
        claims, store, name = self._execution.claims, self._execution.store, f"{stage.kind}-{stage.key}"
        watch = claims.watch()
        while not store.complete(stage.kind, stage.key):
            self._require_going_on()
            if not claims.take(name, watch):
                await asyncio.sleep(POLL_S)
                continue
            try:
                # The last holder may have finished between the two looks.
                if not store.complete(stage.kind, stage.key):
                    await self._compute(stage)
            finally:
                claims.release(name)


async def start_shared(
    stage: SharedStage, execution: Execution, grant: Grant, coordinator: ActorHandle
) -> None:
    """Compute the stage on the CPU or GPU that was granted."""
    gpus = grant.request.gpus
    pinned = NodeAffinitySchedulingStrategy(grant.nodes[0], soft=False)
    task = shared_task.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=pinned)
    await task.remote(stage, execution, coordinator)


@ray.remote(num_cpus=0, max_retries=0)
def shared_task(stage: SharedStage, execution: Execution, coordinator: ActorHandle) -> None:
    """Compute one shared stage; the gate has granted its CPU or GPU. Those who wait for it see how far it is."""
    execution.stages.prepare_process()

    def post(event: dict[str, Any]) -> None:
        coordinator.post_shared.remote(stage.key, event)

    post({"event": "stage", "stage": stage.kind})
    with without_secrets(), Rows(post).of(stage.kind) as report:
        compute_claimed(stage, execution, report)
