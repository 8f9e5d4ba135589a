"""Claims of drivers, those of another machine among them, of which one sees nothing but a counter."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.store import leases
from orchestrator.store.leases import Claims, Heartbeat, forget_dead_drivers, is_alone, live_drivers

LEASE_S = 0.4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.02)
    monkeypatch.setattr(leases, "BEAT_S", 0.05)


def elsewhere(root: Path, driver: str = "far", counter: int = 7) -> None:
    """The record of a driver on another machine."""
    file = root / "drivers" / f"{driver}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    leases.replace(file, json.dumps({"machine": "another", "pid": 1, "process": "1", "counter": counter}))


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


def counter_of(root: Path, driver: str) -> int:
    return json.loads((root / "drivers" / f"{driver}.json").read_text())["counter"]


def holder(root: Path, name: str = "x") -> str:
    return json.loads((root / "claims" / f"{name}.json").read_text())["driver"]


def taken_within(claim: Claims, seconds: float) -> float | None:
    """Seconds until `x` is ours."""
    watch, began = claim.watch(), time.monotonic()
    while time.monotonic() - began < seconds:
        if claim.take("x", watch):
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def test_a_counter_that_stands_still_for_the_lease_is_a_dead_driver(tmp_path):
    elsewhere(tmp_path)
    assert Claims(tmp_path, "far").take("x", Claims(tmp_path, "far").watch())
    took_s = taken_within(Claims(tmp_path, "near", LEASE_S), 30.0)
    assert took_s is not None
    assert took_s >= LEASE_S
    assert holder(tmp_path) == "near"


def test_a_counter_that_moves_keeps_its_claims(tmp_path):
    with Beating(tmp_path):
        assert Claims(tmp_path, "far").take("x", Claims(tmp_path, "far").watch())
        # A lease of many beats: on a busy machine some of them are late.
        assert taken_within(Claims(tmp_path, "near", 3.0), 4.0) is None
        assert holder(tmp_path) == "far"
    assert taken_within(Claims(tmp_path, "near", LEASE_S), 30.0) is not None


def test_a_counter_that_was_reset_has_moved(tmp_path):
    elsewhere(tmp_path, counter=7)
    watch = Claims(tmp_path, "near", LEASE_S).watch()
    assert watch.alive("far")
    time.sleep(LEASE_S)
    elsewhere(tmp_path, counter=0)
    assert watch.alive("far")


def test_a_claim_renewed_between_the_look_and_the_taking_stays(tmp_path, monkeypatch):
    elsewhere(tmp_path, "third")
    dead = Claims(tmp_path, "dead")
    assert dead.take("x", dead.watch())
    near = Claims(tmp_path, "near", LEASE_S)
    take_from = Claims._take_from

    def renewed_first(self, name, was, watch):
        # Another waiter was quicker.
        leases.replace(tmp_path / "claims" / "x.json", json.dumps({"driver": "third"}))
        return take_from(self, name, was, watch)

    monkeypatch.setattr(Claims, "_take_from", renewed_first)
    assert not near.take("x", near.watch())
    assert holder(tmp_path) == "third"
    assert [file.name for file in (tmp_path / "claims").iterdir()] == ["x.json"]


def test_a_turn_whose_taker_died_is_given_to_the_next(tmp_path):
    dead = Claims(tmp_path, "dead")
    assert dead.take("x", dead.watch())
    leases.publish(tmp_path / "claims" / ".turn-x", json.dumps({"driver": "dead too"}))
    assert taken_within(Claims(tmp_path, "near", LEASE_S), 30.0) is not None
    assert [file.name for file in (tmp_path / "claims").iterdir()] == ["x.json"]


def test_of_many_waiters_for_a_dead_drivers_claim_one_gets_it(tmp_path):
    dead = Claims(tmp_path, "dead")
    assert dead.take("x", dead.watch())
    gate, won = threading.Barrier(8), []

    def waits(number: int) -> None:
        elsewhere(tmp_path, f"near{number}")
        claim = Claims(tmp_path, f"near{number}")
        gate.wait()
        if claim.take("x", claim.watch()):
            won.append(f"near{number}")

    threads = [threading.Thread(target=waits, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [holder(tmp_path)]


def test_held_waits_for_who_has_it_and_computes_nothing_that_is_done(tmp_path):
    done, order = threading.Event(), []
    with Heartbeat(tmp_path, "s") as first, Heartbeat(tmp_path, "s") as second:

        def other() -> None:
            with Claims(tmp_path, second.driver).held("x", done.is_set, time.sleep) as ours:
                order.append(("second", ours))

        with Claims(tmp_path, first.driver).held("x", done.is_set) as ours:
            order.append(("first", ours))
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.2)
            assert order == [("first", True)]
            done.set()
        thread.join()
    assert order == [("first", True), ("second", False)]
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_claim_is_released_when_the_block_fails(tmp_path):
    def fails() -> None:
        with Claims(tmp_path, "near").held("x", lambda: False):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert list((tmp_path / "claims").iterdir()) == []


def test_an_unreadable_claim_is_nobodys(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "x.json").write_text("{")
    claim = Claims(tmp_path, "near")
    assert claim.take("x", claim.watch())
    assert holder(tmp_path) == "near"


def test_on_one_machine_the_process_itself_is_looked_at(tmp_path):
    with Heartbeat(tmp_path, "s") as beat:
        record = json.loads((tmp_path / "drivers" / f"{beat.driver}.json").read_text())
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        process.wait()
        for name, pid, started in (("dead", process.pid, "1"), ("reused", record["pid"], "1")):
            other = {**record, "pid": pid, "process": started}
            (tmp_path / "drivers" / f"{name}.json").write_text(json.dumps(other))
        watch = Claims(tmp_path, "near").watch()
        alive = [watch.alive(name) for name in (beat.driver, "dead", "reused", "unknown")]
        assert alive == [True, False, False, False]
        assert list(live_drivers(tmp_path)) == [beat.driver]
        forget_dead_drivers(tmp_path)
        assert [file.stem for file in (tmp_path / "drivers").glob("*.json")] == [beat.driver]
    assert list((tmp_path / "drivers").iterdir()) == []


def test_another_machines_driver_lives_while_its_counter_moves(tmp_path, monkeypatch):
    elsewhere(tmp_path, "still")
    elsewhere(tmp_path, "far", counter=7)
    paused = []

    def beats_meanwhile(seconds: float) -> None:
        paused.append(seconds)
        elsewhere(tmp_path, "far", counter=8)

    with monkeypatch.context() as patched:
        patched.setattr(leases.time, "sleep", beats_meanwhile)
        assert list(live_drivers(tmp_path)) == ["far"]
    (seconds,) = paused
    assert seconds >= 2 * leases.BEAT_S
    forget_dead_drivers(tmp_path)
    # One cannot know whether it is dead or slow.
    assert {file.stem for file in (tmp_path / "drivers").glob("*.json")} == {"far", "still"}


def test_a_heart_beats_on_when_a_beat_cannot_be_written(tmp_path, monkeypatch):
    from trainers.errors import StorageError

    with Heartbeat(tmp_path, "s") as beat:
        write, failed = beat._write, []

        def fails_once(counter: int) -> None:
            if not failed:
                failed.append(counter)
                raise StorageError("no room")
            write(counter)

        monkeypatch.setattr(beat, "_write", fails_once)
        deadline = time.monotonic() + 30
        while not failed or counter_of(tmp_path, beat.driver) <= failed[0]:
            assert time.monotonic() < deadline, "it beats no more"
            time.sleep(0.02)


def test_a_driver_is_alone_until_another_says_that_it_is_here(tmp_path):
    with Heartbeat(tmp_path, "demo") as mine:
        assert is_alone(tmp_path, mine.driver)
        elsewhere(tmp_path)
        assert not is_alone(tmp_path, mine.driver)


def test_a_driver_of_another_machine_that_shows_no_life_is_forgotten_with_its_claims(tmp_path):
    for driver in ("far", "still"):
        elsewhere(tmp_path, driver)
        assert Claims(tmp_path, driver).take(driver, Claims(tmp_path, driver).watch())
    with Beating(tmp_path), Heartbeat(tmp_path, "s", lease_s=2.0) as beat:
        deadline = time.monotonic() + 60
        while (tmp_path / "claims" / "still.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {file.stem for file in (tmp_path / "drivers").glob("*.json")} == {"far", beat.driver}
        assert [file.stem for file in (tmp_path / "claims").glob("*.json")] == ["far"]
