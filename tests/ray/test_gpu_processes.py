"""What runs on a GPU runs in a process of its own, which ends with its grant: CUDA gives its memory back only so.

The GPU is a number that Ray counts; the stages compute nothing.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import model_folder
from benchmarks.load_stages import standing_in_on_ray
from benchmarks.makespan_stages import sleeping
from orchestrator.run.events import Completed
from orchestrator.spec.catalog import ARCHITECTURES
from tests.faults.cells import EX_RM, IM_RM, Run, cells
from trainers.specs import Placement

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STAGES = sleeping(0.0002, {"tiny": ARCHITECTURES["meta-llama/Llama-3.2-1B-Instruct"]})
PROCESS_ENDS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def one_gpu():
    """A Ray of this machine with one CPU and one GPU, so that tasks come one after the other."""
    before = dict(os.environ)
    os.environ.update(RAY_AUTH_MODE="disabled")
    import ray

    from orchestrator.run.ray import cluster

    kept = {"idle_worker_killing_time_threshold_ms": 60_000}
    size = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False}
    try:
        with standing_in_on_ray(STAGES):
            ray.init(address="local", _system_config=kept, **size, **cluster.ray_options())
            yield
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def processes_of(run: Run, kind: str) -> list[int]:
    """The process of each artifact."""
    keys = {stage.key for plan in run.plans for stage in plan.stages() if stage.kind == kind}
    manifests: list[Any] = [run.store.manifest(kind, key) for key in sorted(keys)]
    return [manifest["info"]["pid"] for manifest in manifests]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_each_task_on_a_gpu_has_a_process_that_ends_with_it(one_gpu, tmp_path):
    plans = cells(tmp_path, Path(model_folder(tmp_path / "model", 0)), (EX_RM, IM_RM), epochs=1)
    run = Run(tmp_path, plans, Placement(forward_tokens=1, device="cuda"))
    assert len(run.of(Completed)) == len(plans) == 2
    on_gpu = processes_of(run, "evaluate") + processes_of(run, "reference")
    assert len(on_gpu) == 2 + 2
    assert len(set(on_gpu)) == len(on_gpu)
    deadline = time.monotonic() + PROCESS_ENDS_WITHIN_S
    while any(map(is_there, on_gpu)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_there, on_gpu))
    # What needs no GPU keeps its process, and the seconds of its imports.
    assert len(set(processes_of(run, "prepare"))) == 1
