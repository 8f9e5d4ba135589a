"""Faults on a real Ray of three nodes: processes killed and stopped, a node lost; the trial goes on where it was."""

import contextlib
import functools
import os
import signal
from pathlib import Path

import pytest

from orchestrator.run.compute import TrainCall, run_shared, run_train
from orchestrator.run.events import Completed, Notice, Retried
from orchestrator.store.artifacts import Store
from tests.faults.cells import ALONE, EX_RM, GANG, IM_RM, Run, cells, equal, weights_of
from tests.trainers import gang

# Tune leaves files open that its own process would close at its end.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EPOCHS = 40
# A gang takes longer over a step.
GANG_EPOCHS = 15


@pytest.fixture(scope="module")
def undisturbed_gang(tiny_model, tmp_path_factory):
    """The weights of the gang that nobody disturbs, which needs no Ray for them."""
    storage = tmp_path_factory.mktemp("undisturbed")
    (plan,) = cells(storage, tiny_model, epochs=GANG_EPOCHS)
    store = Store(storage)
    run_shared(plan.train.prepared, store, print)
    work = functools.partial(run_train, plan.train, TrainCall(placement=GANG), store, print)
    gang.together(work, storage / "gang", GANG.world_size)
    return weights_of(store, plan)


def resumed(run: Run) -> list[str]:
    return [event.text for event in run.of(Notice) if event.text.startswith("resumed at step")]


def causes(run: Run) -> list[str]:
    return [event.cause for event in run.of(Retried)]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylets(node) -> list[int]:
    return [item.process.pid for item in node.all_processes["raylet"]]


def test_a_killed_rank_is_replaced_and_the_weights_are_those_of_the_undisturbed(
    ray_world, tiny_model, tmp_path, undisturbed_gang
):
    def inject(run: Run) -> None:
        run.wait_for_checkpoint()
        kill(ray_world.pids("RayTrainWorker")[-1])

    run = Run(tmp_path, cells(tmp_path, tiny_model, epochs=GANG_EPOCHS), GANG, inject)
    assert causes(run) == ["WorkerLost"], run.events
    assert len(resumed(run)) == 1
    assert run.of(Completed)
    assert equal(run.weights(), undisturbed_gang)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.slow
def test_a_node_that_is_lost_takes_no_trial_with_it(ray_world, tiny_model, tmp_path, undisturbed_gang):
    def inject(run: Run) -> None:
        run.wait_for_checkpoint()
        raylet = parent(ray_world.pids("RayTrainWorker")[0])
        (node,) = [node for node in ray_world.cluster.worker_nodes if raylet in raylets(node)]
        ray_world.cluster.remove_node(node, allow_graceful=False)

    run = Run(tmp_path, cells(tmp_path, tiny_model, epochs=GANG_EPOCHS), GANG, inject)
    ray_world.cluster.add_node(num_cpus=2)
    # No second attempt is sent to the dead node before Ray has given it up.
    assert causes(run) == ["WorkerLost"], run.events
    assert len(resumed(run)) == 1
    assert run.of(Completed)
    assert equal(run.weights(), undisturbed_gang)


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_and_replaced(ray_world, tiny_model, tmp_path, undisturbed_gang):
    stopped = []

    def inject(run: Run) -> None:
        run.wait_for_checkpoint()
        stopped.append(ray_world.pids("RayTrainWorker")[-1])
        kill(stopped[0], signal.SIGSTOP)

    run = Run(tmp_path, cells(tmp_path, tiny_model, epochs=GANG_EPOCHS), GANG, inject)
    assert causes(run) == ["WorkerLost"], run.events
    assert run.of(Completed)
    assert equal(run.weights(), undisturbed_gang)
    assert stopped[0] not in ray_world.pids("")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["killed", "hung"]
)
def test_a_trial_process_that_is_killed_or_hangs_is_replaced(ray_world, tiny_model, tmp_path, number):
    def inject(run: Run) -> None:
        run.wait_for_checkpoint()
        for pid in ray_world.pids("ImplicitFunc"):
            kill(pid, number)

    # One that hangs is missed only after a while.
    epochs = 150 if number == signal.SIGSTOP else 2 * EPOCHS
    run = Run(tmp_path, cells(tmp_path, tiny_model, [EX_RM], epochs=epochs), ALONE, inject)
    assert causes(run) == ["WorkerLost"], run.events
    # A training on another node goes on while the process that drives it hangs.
    assert number == signal.SIGSTOP or len(resumed(run)) == 1
    assert run.of(Completed)


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_a_checkpoint_and_goes_on_from_it(ray_world, tiny_model, tmp_path):
    plans = cells(tmp_path, tiny_model, [EX_RM, IM_RM], epochs=EPOCHS)

    def inject(run: Run) -> None:
        run.wait_for_checkpoint()
        run.stop.ask()

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, plans, ALONE, inject)
    run = Run(tmp_path, plans, ALONE)
    assert resumed(run)
    assert len(run.of(Completed)) == 2
