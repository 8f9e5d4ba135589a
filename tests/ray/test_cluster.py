"""The command on a running cluster: it is joined, a gang spans its nodes, a cell that cannot work is a named hole, and it is left running."""

import json
import os
import subprocess
import sys

import pytest

from tests.ray import cluster_host
from tests.ray.test_failures import status
from tests.ray.test_full_grid import grid, manifests, said

pytestmark = pytest.mark.ray

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def host():
    """A process that has a cluster and prints its address."""
    with subprocess.Popen(
        [sys.executable, cluster_host.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    ) as host:
        yield host
        # Leaving the block closes its standard input, which ends it.


def test_a_gang_spans_the_nodes_of_a_running_cluster_and_a_failed_cell_takes_it_not_down(
    tiny_model, tmp_path, host
):
    address = host.stdout.readline().strip()
    # Longer than any limit: this set prepares to nothing, which only its stage can find out.
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "yes " * 3000, "chosen": "yes", "rejected": "no"})
    )
    # The laptop profile lays the model of this name on two processes.
    cells = ("--profile", "laptop", "--models", f"gemma2-64={tiny_model}", "--rewards", "ex_rm")
    sets = ("--train-sets", "tiny_world", str(tmp_path / "long.jsonl"), "--eval-sets", "tiny_world")
    flags = (*cells, *sets, "--epochs", "1", "--max-train-pairs", "8")
    done = grid(tmp_path, "run", *flags, RAY_ADDRESS=address, **ENVIRONMENT)
    assert done.returncode == 3, said(done)
    (info,) = [manifest["info"] for manifest in manifests(tmp_path, "train").values()]
    assert info["placement"]["world_size"] == 2
    assert info["placement"]["zero_stage"] == 3
    assert "complete: gemma2-64 · ex_rm · tiny_world · s0" in said(done)
    cause = "data set long, split train, all 1 pairs are over the limit"
    assert said(done).count(f"failed: gemma2-64 · ex_rm · long · s0: {cause}") == 1
    assert "missing: gemma2-64 · ex_rm · long · s0: it failed, see above" in said(done)
    assert "Traceback" not in said(done)
    rows = status(tmp_path)
    assert [row["state"] for row in rows] == ["complete", "failed"]
    assert "over the limit" in rows[1]["cause"]
    # It is left running.
    host.stdin.write("\n")
    host.stdin.flush()
    assert host.stdout.readline().strip() == "[1, 1]", address
