"""Leases of drivers, those of another machine among them, of which one sees nothing but a counter."""

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
    monkeypatch.setattr(leases, "LEASE_S", LEASE_S)
    monkeypatch.setattr(leases, "_SEEN", {})


def elsewhere(root: Path, driver: str = "far", counter: int = 7) -> None:
    """The record of a driver on another machine."""
    leases.replace(root / "drivers" / driver, f"another 1 1 {counter}")


def drivers(root: Path) -> set[str]:
    return {file.name for file in (root / "drivers").glob("[!.]*")}


def holder(root: Path, name: str = "x") -> str:
    return (root / "leases" / name).read_text()


def test_a_driver_loses_its_lease_when_its_counter_has_stood_still_for_the_lease(tmp_path):
    near = Leases(tmp_path, "near")
    elsewhere(tmp_path)
    assert Leases(tmp_path, "far").take("x")
    # Any change counts, that of a driver that began anew too.
    for counter in (8, 0, 1):
        assert not near.take("x")
        time.sleep(0.6 * LEASE_S)
        elsewhere(tmp_path, counter=counter)
    began = time.monotonic()
    while not near.take("x"):
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    assert time.monotonic() - began >= LEASE_S
    assert holder(tmp_path) == "near"


def test_a_lease_renewed_between_the_look_and_the_taking_stays(tmp_path, monkeypatch):
    elsewhere(tmp_path, "third")
    assert Leases(tmp_path, "dead").take("x")
    near, alive = Leases(tmp_path, "near"), Leases.alive

    def renewed_first(self, driver):
        # Another waiter is quicker than the one that finds the driver dead.
        lives = alive(self, driver)
        leases.replace(tmp_path / "leases" / "x", "third")
        return lives

    monkeypatch.setattr(Leases, "alive", renewed_first)
    assert not near.take("x")
    assert holder(tmp_path) == "third"


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"x" * 300, b"a\0b", b"../../outside", b'{"driver": "far"}']
)
def test_a_damaged_lease_is_nobodys(tmp_path, content):
    lease = tmp_path / "leases" / "x"
    for folder in ("leases", "drivers"):
        (tmp_path / folder).mkdir()
    lease.write_bytes(content)
    Leases(tmp_path, "near").forget_dead()
    assert not lease.exists()
    lease.write_bytes(content)
    assert Leases(tmp_path, "near").take("x")
    assert holder(tmp_path) == "near"


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

        with first.held("x", done.is_set, time.sleep) as ours:
            order.append(("first", ours))
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.2)
            assert order == [("first", True)]
            done.set()
        thread.join()
        with pytest.raises(RuntimeError), first.held("x", lambda: False, time.sleep):
            raise RuntimeError
    assert order == [("first", True), ("second", False)]
    assert list((tmp_path / "leases").iterdir()) == []


def test_on_one_machine_the_process_itself_is_looked_at(tmp_path):
    with heartbeat(tmp_path) as beat:
        machine, pid, _, _ = (tmp_path / "drivers" / beat.driver).read_text().split()
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        process.wait()
        for name, said in (("dead", f"{process.pid} 1 0"), ("reused", f"{pid} 1 0"), ("damaged", "")):
            (tmp_path / "drivers" / name).write_text(f"{machine} {said}")
        near = Leases(tmp_path, "near")
        alive = [near.alive(name) for name in (beat.driver, "dead", "reused", "damaged", "unknown")]
        assert alive == [True, False, False, False, False]
        assert live_drivers(tmp_path) == {beat.driver}
        assert near.forget_dead() == drivers(tmp_path) == {beat.driver}
        # A driver is alone when no other has said that it is here.
        assert beat.forget_dead() == set()
        elsewhere(tmp_path)
        assert beat.forget_dead() == {"far"}
    # One cannot know whether it is dead or slow.
    assert drivers(tmp_path) == {"far"}


def test_another_machines_driver_lives_while_its_counter_moves(tmp_path, monkeypatch):
    elsewhere(tmp_path, "still")
    elsewhere(tmp_path, "far")
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
    for driver in ("far", "still"):
        assert Leases(tmp_path, driver).take(driver)
    with heartbeat(tmp_path):
        time.sleep(LEASE_S)
        elsewhere(tmp_path, "far", counter=9)
    assert drivers(tmp_path) == {"far"}
    assert [file.name for file in (tmp_path / "leases").iterdir()] == ["far"]


def test_a_heart_beats_on_when_a_beat_cannot_be_written(tmp_path, monkeypatch):
    with heartbeat(tmp_path) as beat:
        write, failed = leases.replace, []

        def fails_once(file: Path, text: str) -> None:
            if not failed:
                failed.append(int(text.split()[-1]))
                raise StorageError("no room")
            write(file, text)

        monkeypatch.setattr(leases, "replace", fails_once)
        deadline = time.monotonic() + 30
        while not failed or int((tmp_path / "drivers" / beat.driver).read_text().split()[-1]) <= failed[0]:
            assert time.monotonic() < deadline, "it beats no more"
            time.sleep(0.02)
