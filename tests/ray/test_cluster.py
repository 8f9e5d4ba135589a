"""The same command on a running cluster: it is joined, a gang spans its nodes, and it is left running."""

import os
import subprocess
import sys

import pytest

from tests.ray import cluster_host
from tests.ray.test_full_grid import grid, manifests, said

pytestmark = pytest.mark.ray

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
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


def test_a_gang_spans_the_nodes_of_a_running_cluster(tmp_path, address):
    cells = ("--profile", "laptop", "--models", "gemma2-64", "--only", "reward=ex_rm", "train=tiny_world")
    flags = (*cells, "--epochs", "1", "--eval-sets", "tiny_world")
    done = grid(tmp_path, "run", *flags, RAY_ADDRESS=address, **ENVIRONMENT)
    assert done.returncode == 0, said(done)
    (info,) = [manifest["info"] for manifest in manifests(tmp_path, "train").values()]
    assert info["placement"]["world_size"] == 2
    assert info["placement"]["zero_stage"] == 3
    assert "ALIVE" in nodes(address)


def nodes(address: str) -> str:
    script = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('ALIVE', len(ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", script, address],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout + done.stderr
