"""A head without GPUs: what the autoscaler may add is granted, waited for, and used when it comes.

The trainings only sleep, on a real Ray to which the test adds the node.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import model_folder
from benchmarks.load_stages import standing_in_on_ray
from benchmarks.makespan_stages import sleeping
from orchestrator.plan.hardware import Node
from orchestrator.run.events import Completed, Notice, Replanned
from orchestrator.run.trial import Execution
from orchestrator.spec.catalog import ARCHITECTURES
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import Leases
from tests.faults.cells import cells
from tests.faults.ray_world import head_arguments
from trainers.specs import Placement
from trainers.train.stopping import StopRequest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COMES_AFTER_S = 2.0
SLEEPING = sleeping(0.002, {"tiny": ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"]})


@pytest.fixture(scope="module")
def head():
    """A cluster of a head with two CPUs and no GPU."""
    before = dict(os.environ)
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    import ray
    from ray.cluster_utils import Cluster

    from orchestrator.run.ray import cluster as joining

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **head_arguments()})
    # A node that is added from a thread can set no signal handler; the shutdown below ends it all the same.
    cluster._shutdown_at_exit = False
    try:
        with standing_in_on_ray(SLEEPING):
            ray.init(address=cluster.address, **joining.ray_options())
            yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def run(storage: Path, placement: Placement, workers: tuple[Node, ...], on_event) -> dict[str, Any]:
    """One trial of a second's sleep."""
    from orchestrator.run.ray.sweep import run_on_ray

    store = Store(storage)
    plans = cells(storage, Path(model_folder(storage / "model", 0)), epochs=1)
    leases = Leases(storage, "test")
    execution = Execution(store=store, leases=leases, retries=RetryPolicy(back_off_s=0.5))
    (storage / "scratch").mkdir()
    placements = {plan.key: placement for plan in plans}
    seen = []

    def follow(event) -> None:
        seen.append(event)
        on_event(event)

    run_on_ray(plans, placements, follow, execution, storage / "scratch", StopRequest(5), workers)
    (key,) = placements
    manifest = store.manifest("train", key)
    assert manifest is not None, seen
    return manifest["info"]


def on_gpus(count: int) -> Placement:
    return Placement(world_size=count, zero_stage=3, forward_tokens=1, device="cuda")


def test_a_training_starts_on_the_node_that_comes_after_its_grant(head, tmp_path):
    events, added = [], []

    def add() -> None:
        time.sleep(COMES_AFTER_S)
        added.append(head.add_node(num_cpus=4, num_gpus=2))

    def on_event(event) -> None:
        events.append((time.monotonic(), event))
        if isinstance(event, Notice) and not added:
            threading.Thread(target=add).start()
            added.append(None)

    info = run(tmp_path, on_gpus(2), (Node(id="gpu_worker 0", cpus=4, gpus=2),), on_event)
    ((asked_at, asked),) = [(at, event) for at, event in events if isinstance(event, Notice)]
    assert "waits for a node of type gpu_worker" in asked.text
    assert info["node"] == added[1].node_id
    assert info["world_size"] == 2
    (began,) = [at for at, event in events if getattr(event, "stage", "") == "train"]
    assert began - asked_at >= COMES_AFTER_S
    assert sum(isinstance(event, Completed) for _, event in events) == 1


def test_what_does_not_come_in_time_is_done_without(head, tmp_path, monkeypatch):
    """The node of the test before is up: the training planned for four GPUs goes on what is there, and says so."""
    monkeypatch.setenv("RMSWEEP_NODE_WAIT_S", "1")
    events = []
    info = run(tmp_path, on_gpus(4), (Node(id="huge 0", cpus=8, gpus=4),), events.append)
    said = [event.text for event in events if type(event) is Notice]
    assert "waits for a node of type huge, 1 s at most" in said[0]
    assert "no node of type huge came within 1 s" in said[1]
    (replanned,) = [event.text for event in events if isinstance(event, Replanned)]
    assert "planned for 4 GPUs" in replanned
    assert "effective batch as before" in replanned
    assert info["world_size"] == 1
    assert isinstance(events[-1], Completed)
