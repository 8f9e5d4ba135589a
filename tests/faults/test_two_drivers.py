"""Two drivers on one storage: every stage is computed once, a dead one's work is taken over, clocks need not agree."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tests.conftest import missing
from tests.faults.hooks import all_of, at_step, trace, traced
from tests.faults.lives import ROOT, artifacts, grid_life, leftovers, output


def ended(life, storage):
    life.join(600)
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
    for _ in range(6000):
        if file.exists():
            return
        assert life.is_alive(), output(storage)
        time.sleep(0.05)
    raise AssertionError(f"{file} never appeared")


def test_a_killed_driver_loses_its_leases_to_the_other(four, whole, tmp_path):
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
    # The dead one's record goes with the next command that runs something.
    assert [name for name in leftovers(storage) if str(killed.pid) not in name] == []
    # What the dead one had in hand is computed again, nothing else.
    computed = traced(log)
    twice = sorted({name for name in computed if computed.count(name) > 1})
    assert [name.split("/")[0] for name in twice] == ["train", "weights"]
    assert "resumed at step 6" in output(storage)


def faked_time(storage, words, shift):
    """The command in a fresh process whose clock is off by `shift`; what it prints goes where lives print."""
    spec = find_spec("libfaketime")
    folder = Path(spec.submodule_search_locations[0]) if spec else Path()
    library = folder / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    if not library.is_file():
        missing("libfaketime")
    faked = {"LD_PRELOAD": str(library), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    # libfaketime looks for this name each time that a thread waits, and crashes where another one changes the
    # environment meanwhile: it is the first, so that it is found at once. 0 is what libfaketime does by itself.
    found_at_once = {"FAKETIME_FORCE_MONOTONIC_FIX": "0"}
    environment = {**found_at_once, **os.environ, **faked, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    clock = [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"]
    told = subprocess.run(clock, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert abs(float(told[0]) - time.time()) > 3000
    assert abs(float(told[1]) - time.monotonic()) < 60
    command = [sys.executable, str(ROOT / "sweeps" / "full_grid.py"), *words, "--storage", str(storage)]
    with Path(f"{storage}.{shift}.txt").open("w") as said:
        return subprocess.Popen(command, env=environment, cwd=storage.parent, stdout=said, stderr=said)


def test_drivers_whose_clocks_are_an_hour_off(one, whole, tmp_path):
    storage, log, sign = tmp_path / "store", tmp_path / "trace", tmp_path / "sign"
    go = tmp_path / "go"
    first = grid_life(storage, one, tracing(log, partial(waits_at_step, 5, sign, go)))
    appeared(sign, first, storage)
    others = {Path(f"{storage}.{shift}.txt"): faked_time(storage, one, shift) for shift in ("+1h", "-1h")}
    try:
        for said, other in others.items():
            while "to run: " not in said.read_text():
                assert other.poll() is None, said.read_text()
                time.sleep(0.1)
        # Long enough for them to look at the lease several times.
        time.sleep(3)
        assert [other.poll() for other in others.values()] == [None, None]
        go.touch()
        ended(first, storage)
        for said, other in others.items():
            assert other.wait(600) == 0, said.read_text()
            assert "Traceback" not in said.read_text()
    finally:
        # Where one of these assertions fails, nobody would tell it to go on, and pytest would wait for it for ever.
        first.kill()
        for other in others.values():
            if other.poll() is None:
                other.kill()
                other.wait()
    # Had they computed anything, it would have been in the dead one's place, or beside it.
    computed = traced(log)
    assert set(computed) >= {name for name in artifacts(storage) if name.startswith(("prepare/", "train/"))}
    assert len(list((storage / "artifacts").glob("train/*/*/"))) == 1
    mine, wanted = artifacts(storage), artifacts(whole)
    assert mine == {name: wanted[name] for name in mine}
    assert leftovers(storage) == []
