"""The same command on a running cluster: it is joined, a gang spans its nodes, and it is left running."""

import os
import subprocess
import sys

import pytest

from tests.ray import cluster_host
from tests.ray.test_full_grid import grid, manifests, said

pytestmark = pytest.mark.ray

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def address():
    with subprocess.Popen(
        [sys.executable, cluster_host.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    ) as host:
        yield host.stdout.readline().strip()
        # Leaving the block closes its standard input, which ends it.


def test_a_gang_spans_the_nodes_of_a_running_cluster(tiny_model, tmp_path, address):
    # The laptop profile lays the model of this name on two processes.
    cells = (
        "--profile",
        "laptop",
        "--models",
        f"gemma2-64={tiny_model}",
        "--only",
        "reward=ex_rm",
        "train=tiny_world",
    )
    flags = (*cells, "--epochs", "1", "--eval-sets", "tiny_world", "--max-train-pairs", "8")
    done = grid(tmp_path, "run", *flags, RAY_ADDRESS=address, **ENVIRONMENT)
    assert done.returncode == 0, said(done)
    (info,) = [manifest["info"] for manifest in manifests(tmp_path, "train").values()]
    assert info["placement"]["world_size"] == 2
    assert info["placement"]["zero_stage"] == 3
    # It is left running.
    assert cpus_of_nodes(address) == "[1, 1]", address


def cpus_of_nodes(address: str) -> str:
    script = (
        "import ray, sys; from orchestrator.run.ray import cluster; ray.init(sys.argv[1], log_to_driver=False); "
        "print([node.cpus for node in cluster.capacity()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.strip()
