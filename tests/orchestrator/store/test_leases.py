"""Leases of drivers, those of another machine among them, of which one sees nothing but a counter."""

import json
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.store import leases
from orchestrator.store.leases import Leases, heartbeat, live_drivers
from trainers.errors import StorageError

LEASE_S = 0.4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.02)
    monkeypatch.setattr(leases, "BEAT_S", 0.05)


def elsewhere(root: Path, driver: str = "far", counter: int = 7) -> None:
    """The record of a driver on another machine."""
    record = {"machine": "another", "pid": 1, "started": "1", "counter": counter}
    leases.replace(root / "drivers" / f"{driver}.json", json.dumps(record))


class Beating:
    """Raises a foreign driver's counter while it is open."""

    def __init__(self, root: Path) -> None:
        self._root, self._done = root, threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        counter = 0
        while not self._done.wait(0.05):
            counter += 1
            elsewhere(self._root, counter=counter)

    def __enter__(self) -> "Beating":
        elsewhere(self._root, counter=0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def drivers(root: Path) -> set[str]:
    return {file.stem for file in (root / "drivers").glob("*.json")}


def holder(root: Path, name: str = "x") -> str:
    return (root / "leases" / name).read_text()


def taken_within(lease: Leases, seconds: float) -> float | None:
    """Seconds until `x` is ours."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if lease.take("x"):
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def test_a_counter_that_stands_still_for_the_lease_is_a_dead_driver(tmp_path):
    elsewhere(tmp_path)
    assert Leases(tmp_path, "far").take("x")
    took_s = taken_within(Leases(tmp_path, "near", LEASE_S), 30.0)
    assert took_s is not None
    assert took_s >= LEASE_S
    assert holder(tmp_path) == "near"


def test_a_counter_that_moves_keeps_its_leases(tmp_path):
    with Beating(tmp_path):
        assert Leases(tmp_path, "far").take("x")
        # A lease of many beats: on a busy machine some of them are late.
        assert taken_within(Leases(tmp_path, "near", 3.0), 4.0) is None
        assert holder(tmp_path) == "far"
    assert taken_within(Leases(tmp_path, "near", LEASE_S), 30.0) is not None


def test_a_counter_that_was_reset_has_moved(tmp_path):
    elsewhere(tmp_path, counter=7)
    near = Leases(tmp_path, "near", LEASE_S)
    assert near.alive("far")
    time.sleep(LEASE_S)
    elsewhere(tmp_path, counter=0)
    assert near.alive("far")


def test_what_was_seen_on_one_machine_says_nothing_on_another(tmp_path):
    elsewhere(tmp_path)
    near = Leases(tmp_path, "near", LEASE_S)
    assert near.alive("far")
    time.sleep(LEASE_S)
    assert pickle.loads(pickle.dumps(near)).alive("far")
    assert not near.alive("far")


def test_a_lease_renewed_between_the_look_and_the_taking_stays(tmp_path, monkeypatch):
    elsewhere(tmp_path, "third")
    assert Leases(tmp_path, "dead").take("x")
    near, alive = Leases(tmp_path, "near", LEASE_S), Leases.alive

    def renewed_first(self, driver):
        # Another waiter is quicker than the one that finds the driver dead.
        lives = alive(self, driver)
        leases.replace(tmp_path / "leases" / "x", "third")
        return lives

    monkeypatch.setattr(Leases, "alive", renewed_first)
    assert not near.take("x")
    assert holder(tmp_path) == "third"


def test_of_many_that_lease_at_once_one_gets_it(tmp_path):
    gate, won = threading.Barrier(8), []

    def waits(number: int) -> None:
        elsewhere(tmp_path, f"near{number}")
        gate.wait()
        if Leases(tmp_path, f"near{number}").take("x"):
            won.append(f"near{number}")

    threads = [threading.Thread(target=waits, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [holder(tmp_path)]


def test_held_waits_for_who_has_it_and_computes_nothing_that_is_done(tmp_path):
    done, order = threading.Event(), []
    with heartbeat(tmp_path) as first, heartbeat(tmp_path) as second:

        def other() -> None:
            with second.held("x", done.is_set, time.sleep) as ours:
                order.append(("second", ours))

        with first.held("x", done.is_set) as ours:
            order.append(("first", ours))
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.2)
            assert order == [("first", True)]
            done.set()
        thread.join()
    assert order == [("first", True), ("second", False)]
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_lease_is_released_when_the_block_fails(tmp_path):
    def fails() -> None:
        with Leases(tmp_path, "near").held("x", lambda: False):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert list((tmp_path / "leases").iterdir()) == []


def test_an_unreadable_lease_is_nobodys(tmp_path):
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "x").write_bytes(b"\xff")
    assert Leases(tmp_path, "near").take("x")
    assert holder(tmp_path) == "near"


def test_on_one_machine_the_process_itself_is_looked_at(tmp_path):
    with heartbeat(tmp_path) as beat:
        record = json.loads((tmp_path / "drivers" / f"{beat.driver}.json").read_text())
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        process.wait()
        for name, pid, started in (("dead", process.pid, "1"), ("reused", record["pid"], "1")):
            other = {**record, "pid": pid, "started": started}
            (tmp_path / "drivers" / f"{name}.json").write_text(json.dumps(other))
        near = Leases(tmp_path, "near")
        alive = [near.alive(name) for name in (beat.driver, "dead", "reused", "unknown")]
        assert alive == [True, False, False, False]
        assert live_drivers(tmp_path) == {beat.driver}
        near.forget_dead_drivers()
        assert drivers(tmp_path) == {beat.driver}
        # A driver is alone when no other has said that it is here.
        assert beat.others() == set()
        elsewhere(tmp_path)
        assert beat.others() == {"far"}
    assert drivers(tmp_path) == {"far"}


def test_another_machines_driver_lives_while_its_counter_moves(tmp_path, monkeypatch):
    elsewhere(tmp_path, "still")
    elsewhere(tmp_path, "far", counter=7)
    paused, sleep = [], time.sleep

    def beats_meanwhile(seconds: float) -> None:
        paused.append(seconds)
        elsewhere(tmp_path, "far", counter=8)
        sleep(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(leases.time, "sleep", beats_meanwhile)
        assert live_drivers(tmp_path) == {"far"}
    (seconds,) = paused
    assert seconds >= 2 * leases.BEAT_S
    Leases(tmp_path, "near").forget_dead_drivers()
    # One cannot know whether it is dead or slow.
    assert drivers(tmp_path) == {"far", "still"}


def test_a_heart_beats_on_when_a_beat_cannot_be_written(tmp_path, monkeypatch):
    with heartbeat(tmp_path) as beat:
        write, failed = leases.replace, []

        def fails_once(file: Path, text: str) -> None:
            if not failed:
                failed.append(json.loads(text)["counter"])
                raise StorageError("no room")
            write(file, text)

        monkeypatch.setattr(leases, "replace", fails_once)
        file = tmp_path / "drivers" / f"{beat.driver}.json"
        deadline = time.monotonic() + 30
        while not failed or json.loads(file.read_text())["counter"] <= failed[0]:
            assert time.monotonic() < deadline, "it beats no more"
            time.sleep(0.02)


def test_a_driver_of_another_machine_that_shows_no_life_is_forgotten_with_its_leases(tmp_path):
    for driver in ("far", "still"):
        elsewhere(tmp_path, driver)
        assert Leases(tmp_path, driver).take(driver)
    with Beating(tmp_path):
        with heartbeat(tmp_path, lease_s=2.0) as beat:
            beat.forget_dead_drivers()
            assert drivers(tmp_path) == {"far", "still", beat.driver}
            time.sleep(2.1)
        assert drivers(tmp_path) == {"far"}
        assert [file.name for file in (tmp_path / "leases").iterdir()] == ["far"]
