"""SIGTERM leaves a checkpoint, and nothing running."""

import contextlib
import io
import json
import signal
import time
from pathlib import Path

import pytest

from orchestrator.cli.main import Grid, main
from sweeps.full_grid import full_grid
from tests.ray.test_full_grid import marked_processes, start_grid

pytestmark = pytest.mark.ray

LONG = ("--profile", "laptop", "--only", "train=tiny_world", "--epochs", "100000")


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"nothing within {seconds} s")


def status(storage: Path) -> list[dict]:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main(Grid(build=full_grid), "full_grid.py", arguments=["status", "--json", "--storage", str(storage)])
    return json.loads(said.getvalue())


def attempts_at_training(storage: Path) -> list[Path]:
    return list((storage / "artifacts" / "train").glob("*/*"))


def test_an_interrupted_sweep_leaves_checkpoints_and_no_process(tiny_model, tmp_path):
    # A busy machine takes its time for two last checkpoints; who is killed for being late leaves its attempt to gc.
    with start_grid(tmp_path, "run", *LONG, "--models", str(tiny_model), "--grace-s", "300") as running:
        wait_for(lambda: attempts_at_training(tmp_path), 900)
        wait_for(lambda: [row for row in status(tmp_path) if row["stage"].startswith("train")], 300)
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=500)
        assert running.returncode == 130, output
    assert "interrupted; the same command goes on" in output
    wait_for(lambda: not marked_processes(tmp_path), 300)
    assert not attempts_at_training(tmp_path)
    assert list((tmp_path / "checkpoints").glob("*/step*.json"))
    assert {row["state"] for row in status(tmp_path)} == {"missing"}
