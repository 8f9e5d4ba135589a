"""Ray as the fault tests use it: in this process, without a token, with nodes that a test can lose."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.processes import command_line, processes

MARK = "FAULT_TEST"
# Short of Ray's patience with a worker and ours with a trial, long enough for a busy machine.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RMSWEEP_SILENCE_S": "60",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class RayWorld:
    """A running cluster; every process of it carries `mark` in its environment."""

    cluster: Any
    mark: str

    def pids(self, name: str) -> list[int]:
        """Its processes whose command line holds `name`, the remains of dead ones left out."""
        return [pid for pid in processes(f"{MARK}={self.mark}") if name in command_line(pid)]


def head_arguments(**settings: Any) -> dict[str, Any]:
    """Of a head as rmsweep would start it: without a dashboard's processes, and with workers that wait for a next task."""
    return {
        "include_dashboard": False,
        "_system_config": {"idle_worker_killing_time_threshold_ms": 60_000, **settings},
    }


@contextlib.contextmanager
def running_world() -> Iterator[RayWorld]:
    """A head with one CPU and two nodes with two: a gang of two fits on either, and survives the other."""
    mark = uuid.uuid4().hex
    before = {name: os.environ.get(name) for name in (*SETTINGS, MARK)}
    os.environ.update({**SETTINGS, MARK: mark})
    import ray
    from ray.cluster_utils import Cluster

    from orchestrator.run.ray.cluster import ray_options

    # A node is given up after ten silent seconds, where Ray by itself takes half a minute.
    patience = {"health_check_period_ms": 1000, "health_check_failure_threshold": 10}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **head_arguments(**patience)})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, **ray_options())
    try:
        yield RayWorld(cluster, mark)
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
