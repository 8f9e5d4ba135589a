"""The command on Ray, killed in different ways and run again: it ends as if undisturbed, and leaves no process."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.lives import artifacts, grid_life, leftovers, output
from tests.processes import command_line, processes
from tests.ray.test_full_grid import MARK, start_grid

pytestmark = pytest.mark.ray

CELLS = ("--profile", "laptop", "--rewards", "ex_rm", "im_rm")
# Longer than Ray takes to end the processes of a driver that was killed, about two seconds: else nothing is left to resume.
SIZE = ("--max-train-pairs", "32", "--max-eval-pairs", "8", "--epochs", "40", "--effective-batch", "4")
SETS = ("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "--lr", "1e-3", "--checkpoint-steps", "10")
SHORT = ("driver",)
LONG = ("driver", "raylet", "everything", "any", "trial")


@pytest.fixture
def flags(tiny_model, kills):
    return flags_of(tiny_model, len(kills))


def flags_of(model, seeds):
    return (*CELLS, *SIZE, *SETS, "--seeds", *map(str, range(seeds)), "--models", str(model))


@pytest.fixture
def undisturbed(flags, tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed") / "store"
    life = grid_life(storage, (*flags, "--backend", "inline"))
    life.join(900)
    assert life.exitcode == 0, output(storage)
    return storage


def victims(kind: str, driver: int, alive: list[int]) -> list[int]:
    if kind == "driver":
        return [driver]
    if kind == "raylet":
        return [pid for pid in alive if "raylet/raylet" in command_line(pid).split(" ")[0]]
    if kind == "trial":
        return [pid for pid in alive if "ImplicitFunc" in command_line(pid)]
    return alive if kind == "everything" else [random.Random(0).choice(alive)]


@pytest.mark.parametrize("kills", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_killed_on_ray_it_ends_as_if_undisturbed(flags, undisturbed, tiny_model, tmp_path, kills):
    storage = tmp_path / "store"
    storage.mkdir()
    said = ""
    for number, kill in enumerate(kills, 1):
        seen = markers(storage)
        # Two more trials in each life: one may survive its kill, and end what it was asked for.
        with start_grid(storage, *flags_of(tiny_model, number)) as life:
            while life.poll() is None and not markers(storage) - seen:
                time.sleep(0.1)
            found = victims(kill, life.pid, processes(f"{MARK}={storage}"))
            assert found, f"nothing to kill for {kill}"
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            said += life.communicate(timeout=900)[0]
        gone(storage)
    with start_grid(storage, *flags) as life:
        said += life.communicate(timeout=900)[0]
        assert life.returncode == 0, said
    gone(storage)
    assert "resumed at step" in said
    assert "Traceback" not in said
    assert artifacts(storage) == artifacts(undisturbed)
    assert leftovers(storage) == []


def markers(storage: Path) -> set[Path]:
    """Checkpoints so far."""
    return set((storage / "checkpoints").glob("*/step*.json"))


def gone(storage: Path) -> None:
    """Wait until no process of the command is left."""
    deadline = time.monotonic() + 400
    while left := processes(f"{MARK}={storage}"):
        assert time.monotonic() < deadline, [command_line(pid) for pid in left]
        time.sleep(0.3)
