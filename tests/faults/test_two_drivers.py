"""Two drivers on one storage: every stage is computed once, a dead one's work is taken over, clocks need not agree."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.faults.hooks import all_of, at_step, trace, traced
from tests.faults.lives import ROOT, artifacts, grid_life, leftovers, output


def ended(life, storage):
    life.join(120)
    assert life.exitcode == 0, output(storage)


def tracing(log, *more):
    return partial(all_of, partial(trace, log), *more)


def test_started_at_once_they_share_the_work(four, whole, tmp_path):
    storage, log = tmp_path / "store", tmp_path / "trace"
    lives = [grid_life(storage, four, tracing(log)) for _ in range(2)]
    for life in lives:
        ended(life, storage)
    assert "Traceback" not in output(storage)
    computed = traced(log)
    assert sorted(computed) == sorted(set(computed))
    assert set(computed) == {name for name in artifacts(whole) if not name.startswith("dataset/")}
    assert artifacts(storage) == artifacts(whole)
    assert leftovers(storage) == []


def stops_at_step(number, sign):
    """Leave a sign at that step of this process, and do nothing more."""
    at_step(number, partial(signs_and_waits, sign))


def signs_and_waits(sign):
    sign.touch()
    time.sleep(600)


def waits_at_step(number, sign, go):
    """Leave a sign at that step, and go on when told to."""
    at_step(number, partial(signs_until, sign, go))


def signs_until(sign, go):
    sign.touch()
    while not go.exists():
        time.sleep(0.05)


def appeared(file, life, storage):
    """Wait for a file that a life makes."""
    for _ in range(1200):
        if file.exists():
            return
        assert life.is_alive(), output(storage)
        time.sleep(0.05)
    raise AssertionError(f"{file} never appeared")


def test_a_killed_driver_loses_its_claims_to_the_other(four, whole, tmp_path):
    storage, log, sign = tmp_path / "store", tmp_path / "trace", tmp_path / "sign"
    killed = grid_life(storage, four, tracing(log, partial(stops_at_step, 8, sign)))
    appeared(sign, killed, storage)
    other = grid_life(storage, four, tracing(log))
    # It waits for the training that the first has in hand.
    time.sleep(2)
    assert other.is_alive()
    assert len([name for name in traced(log) if name.startswith("train/")]) == 1
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    ended(other, storage)
    assert artifacts(storage) == artifacts(whole)
    assert leftovers(storage) == []
    # What the dead one had in hand is computed again, nothing else.
    computed = traced(log)
    (twice,) = {name for name in computed if computed.count(name) > 1}
    assert twice.startswith("train/")
    assert "resumed at step 6" in output(storage)


def faked_time(storage, words, shift):
    """The command in a fresh process whose clock is off by `shift`; what it prints goes where lives print."""
    spec = find_spec("libfaketime")
    folder = Path(spec.submodule_search_locations[0]) if spec else Path()
    library = folder / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    if not library.is_file():
        missing("libfaketime")
    faked = {"LD_PRELOAD": str(library), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    environment = {**os.environ, **faked, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), *words, "--storage", str(storage)]
    with Path(f"{storage}.{shift}.txt").open("w") as said:
        return subprocess.Popen(command, env=environment, cwd=storage.parent, stdout=said, stderr=said)


@pytest.mark.parametrize("shift", ["+1h", "-1h"])
def test_a_driver_whose_clock_is_an_hour_off(one, whole, tmp_path, shift):
    storage, log, sign = tmp_path / "store", tmp_path / "trace", tmp_path / "sign"
    go = tmp_path / "go"
    first = grid_life(storage, one, tracing(log, partial(waits_at_step, 5, sign, go)))
    appeared(sign, first, storage)
    second = faked_time(storage, one, shift)
    said = Path(f"{storage}.{shift}.txt")
    try:
        while "to run: " not in said.read_text():
            assert second.poll() is None, said.read_text()
            time.sleep(0.1)
        # Long enough for it to look at the claim several times.
        time.sleep(3)
        assert second.poll() is None, said.read_text()
        go.touch()
        ended(first, storage)
        assert second.wait(60) == 0, said.read_text()
    finally:
        if second.poll() is None:
            second.kill()
            second.wait()
    assert "Traceback" not in said.read_text()
    computed = traced(log)
    assert sorted(computed) == sorted(set(computed))
    assert set(computed) == {name for name in artifacts(storage) if not name.startswith("dataset/")}
    mine, wanted = artifacts(storage), artifacts(whole)
    assert mine == {name: wanted[name] for name in mine}
    assert leftovers(storage) == []
