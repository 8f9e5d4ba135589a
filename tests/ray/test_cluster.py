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


def test_a_gang_spans_the_nodes_of_a_running_cluster_that_can_be_looked_at(tiny_model, tmp_path, address):
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
    flags = (*cells, "--epochs", "1", "--eval-sets", "tiny_world")
    done = grid(tmp_path, "run", *flags, RAY_ADDRESS=address, **ENVIRONMENT)
    assert done.returncode == 0, said(done)
    (info,) = [manifest["info"] for manifest in manifests(tmp_path, "train").values()]
    assert info["placement"]["world_size"] == 2
    assert info["placement"]["zero_stage"] == 3
    # It is left running, and looked at without being joined.
    assert looked_at(address, "127.0.0.1:1") == ["[1, 1] False", "[] False"]


LOOK = """
import os, ray, sys
from orchestrator.run.ray import cluster
for os.environ["RAY_ADDRESS"] in sys.argv[1:]:
    print([node.cpus for node in cluster.look() or ()], ray.is_initialized())
"""


def looked_at(*addresses: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *addresses],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.splitlines()
