"""A cell that cannot work, or whose process dies, is a named hole; Ctrl-C and SIGTERM leave nothing running."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ray.test_full_grid import grid, marked_processes, said, start_grid

TURN = {"prompt": "why", "chosen": "yes", "rejected": "no"}
LONG = ("--profile", "laptop", "--models", "llama-64", "--only", "train=tiny_world", "--epochs", "100000")


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"nothing within {seconds} s")


def attempts_at_training(storage: Path) -> list[Path]:
    return list((storage / "artifacts" / "train").glob("*/*"))


def trial_process(storage: Path) -> int | None:
    """A live Tune trial process of a command on this storage."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"GRID_TEST_STORAGE={storage}".encode() in (process / "environ").read_bytes().split(b"\0")
            if ours and "ImplicitFunc" in (process / "cmdline").read_text():
                return int(process.name)
    return None


def test_a_failed_cell_takes_no_other_down(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(TURN))
    # Longer than any limit: this set prepares to nothing, which only its stage can find out.
    (tmp_path / "long.jsonl").write_text(json.dumps({**TURN, "prompt": "yes " * 3000}))
    (tmp_path / "test.jsonl").write_text(json.dumps({**TURN, "prompt": "no"}))
    sets = ("--train-sets", str(tmp_path / "train.jsonl"), str(tmp_path / "long.jsonl"), "--eval-sets")
    flags = (
        "--models",
        "llama-64",
        "--rewards",
        "ex_rm",
        *sets,
        str(tmp_path / "test.jsonl"),
        "--epochs",
        "1",
    )
    done = grid(tmp_path, "run", *flags)
    assert done.returncode == 3, said(done)
    assert "complete: llama-64 · ex_rm · train · s0" in said(done)
    assert "missing: llama-64 · ex_rm · long · s0: all 1 pairs are over the limit" in said(done)
    assert "Traceback" not in said(done)
    status = json.loads(grid(tmp_path, "status", "--json").stdout)
    assert [row["state"] for row in status] == ["complete", "missing"]


def test_a_trial_whose_process_is_killed_is_a_hole_and_gives_its_cpu_back(tmp_path):
    # Two endless trainings hold both CPUs; killing their processes must end the sweep.
    with start_grid(tmp_path, "run", *LONG) as running:
        wait_for(lambda: len(attempts_at_training(tmp_path)) == 2, 240)
        while running.poll() is None:
            process = trial_process(tmp_path)
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(2)
        output = running.stdout.read()
        assert running.returncode == 3, output
    assert output.count("the process of the trial died") >= 2
    wait_for(lambda: not marked_processes(tmp_path), 30)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_exits_130_and_leaves_no_process(tmp_path, sent):
    with start_grid(tmp_path, "run", *LONG) as running:
        wait_for(lambda: attempts_at_training(tmp_path), 240)
        running.send_signal(sent)
        running.wait(timeout=90)
        output = running.stdout.read()
        assert running.returncode == 130, output
    assert "interrupted; the same command goes on" in output
    wait_for(lambda: not marked_processes(tmp_path), 30)
