"""The coordinator without Ray: what it does with a node on which a process was lost."""

import asyncio
from pathlib import Path

import pytest

from orchestrator.plan.durations import Durations
from orchestrator.plan.hardware import Node, gpu_kind
from orchestrator.plan.schedule import Request
from orchestrator.run.ray import coordinator as coordinating
from orchestrator.run.ray.coordinator import Coordinator
from orchestrator.run.trial import Execution
from orchestrator.spec.stages import SharedStage
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import Leases
from tests.orchestrator.sweep_samples import IM_RM, plan, trial
from trainers.errors import Damaged, Interrupted

NODE = Node(id="a", cpus=2)


def train(trial: str) -> Request:
    return Request(key=trial, kind="train")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinating, "capacity", lambda: (NODE,))
    monkeypatch.setattr(coordinating, "ASK_EVERY_S", 0.01)


async def granted_after_a_loss(root: Path, answers: list[bool | Exception]) -> list[bool | Exception]:
    """Lose a process on the one node, ask for it again; what was left of `answers` when it was granted."""

    async def lives(node: str) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    coordinating.lives = lives  # type: ignore[assignment]
    store = Store(root)
    execution = Execution(store=store, leases=Leases(root, "driver"))
    durations = Durations(store=store, kind=gpu_kind("H100"))
    held = Coordinator(execution, [NODE], {}, durations)
    assert await held.acquire(train("lost")) is not None
    await held.release(train("lost").id, True)
    again = await asyncio.wait_for(held.acquire(train("next")), 60)
    assert again is not None
    return answers


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("end", [True, RuntimeError("defect")], ids=["it answers", "it cannot be asked"])
def test_on_a_node_where_a_process_was_lost_nothing_starts_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bool | Exception
):
    monkeypatch.setattr(coordinating, "lives", coordinating.lives)
    assert asyncio.run(granted_after_a_loss(tmp_path, [False, False, end, True])) == [True]


@pytest.mark.usefixtures("quick")
def test_a_node_that_never_answers_is_left_to_the_retry_policy_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(coordinating, "lives", coordinating.lives)
    monkeypatch.setattr(coordinating, "SUSPECTED_S", 0.2)
    left = asyncio.run(granted_after_a_loss(tmp_path, [False] * 10_000))
    assert 0 < len(left) < 10_000


def test_a_stage_that_met_damage_is_computed_for_the_next_trial_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first trial meets damaged pairs and sets them aside; the second has both stages."""
    store, needs = Store(tmp_path), plan(trial(reward=IM_RM)).train.needs
    (prepared,) = [stage for stage in needs if stage.kind == "prepare"]
    with store.write("prepare", prepared.key) as attempt:
        (attempt.directory / "pairs.arrow").write_bytes(b"damaged")
    damaged = store.manifest("prepare", prepared.key)
    assert damaged is not None

    async def compute(self: Coordinator, stage: SharedStage) -> None:
        if stage.kind == "reference" and store.manifest("prepare", prepared.key) == damaged:
            raise Damaged("pairs.arrow is not what was written", "prepare", prepared.key, damaged["attempt"])
        with store.write(stage.kind, stage.key) as attempt:
            (attempt.directory / "file").write_bytes(b"sound")

    async def both() -> None:
        execution = Execution(store=store, leases=Leases(tmp_path, "driver"))
        held = Coordinator(execution, [NODE], {}, Durations(store=store))
        *earlier, last = needs
        for stage in earlier:
            await held.shared(stage, "first")
        with pytest.raises(Damaged):
            await held.shared(last, "first")
        store.discard("prepare", prepared.key, damaged["attempt"])
        for stage in needs:
            await held.shared(stage, "second")

    monkeypatch.setattr(Coordinator, "_compute_shared", compute)
    asyncio.run(both())
    assert all(store.complete(stage.kind, stage.key) for stage in needs)


def test_a_request_that_comes_while_the_sweep_is_being_stopped_is_granted_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Store(tmp_path)
    execution = Execution(store=store, leases=Leases(tmp_path, "driver"))
    held = Coordinator(execution, [NODE], {}, Durations(store=store, kind=gpu_kind("H100")))
    monkeypatch.setattr(held, "_refresh", lambda: held.stop(30.0))
    with pytest.raises(Interrupted):
        asyncio.run(asyncio.wait_for(held.acquire(train("late")), 60))
