"""Leases on stages, so that drivers on one store divide its work. They only save work; correctness does not need them.

    <storage>/leases/<name>      names the driver that works on a stage
    <storage>/drivers/<driver>   its process, and a counter that it raises every two seconds

A driver is dead when its counter has stood still for 20 seconds of the watcher's own monotonic clock, or on the watcher's
machine when its process is gone. Two that take a dead driver's lease at once both commit: the first manifest stays.
"""

import contextlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainers.errors import StorageError, Unreachable
from trainers.storage import Location, publish, replace

BEAT_S, POLL_S, LEASE_S = 2.0, 1.0, 20.0
# The counter of each driver of another machine, and when this process saw it move.
_SEEN: dict[Location, tuple[str, float]] = {}


class Leases(NamedTuple):
    """The leases of one driver, which its processes share."""

    root: Location
    driver: str = ""

    @contextlib.contextmanager
    def held(
        self, name: str, done: Callable[[], bool], pause: Callable[[float], None] = time.sleep
    ) -> Iterator[bool]:
        """Wait for the lease on `name` and yield True while holding it; yield False if another driver got it `done`."""
        while not done():
            if self.take(name):
                try:
                    yield not done()  # The last holder may have finished between our two checks.
                finally:
                    self.release(name)
                return
            pause(POLL_S)
        yield False

    def take(self, name: str) -> bool:
        """Take the lease on `name`; return False if another driver has it that lives, or took it over since we looked."""
        lease = self.root / "leases" / name
        if publish(lease, self.driver) or (holder := _text(lease)) == self.driver:
            return True
        if self.alive(holder) or _text(lease) != holder:
            return False
        lease.unlink(missing_ok=True)
        return publish(lease, self.driver)

    def release(self, name: str) -> None:
        """Give the lease back if this driver holds it."""
        if _text(lease := self.root / "leases" / name) == self.driver:
            lease.unlink(missing_ok=True)

    def alive(self, driver: str) -> bool:
        """Return whether a driver of this machine runs, or whether this process saw another one's counter move of late."""
        record = self.root / "drivers" / Path(driver).name
        try:
            machine, pid, started, counter = _text(record).split()
        except Unreachable:
            return True  # We take over nobody's work just because the bucket does not answer.
        except ValueError:
            return False
        if machine == _machine():
            return started == _started(pid)
        if _SEEN.get(record, ("", 0.0))[0] != counter:
            _SEEN[record] = counter, time.monotonic()
        return time.monotonic() - _SEEN[record][1] < LEASE_S

    def forget_dead(self) -> set[str]:
        """Remove the records and the leases of dead drivers, and return the other drivers."""
        records = {file.name: file for file in (self.root / "drivers").glob("[!.]*")}
        dead = {name: file for name, file in records.items() if not self.alive(name)}
        leases = (file for file in (self.root / "leases").glob("[!.]*") if not self.alive(_text(file)))
        # Each lease is read just before it is removed: another driver may have taken it over meanwhile.
        for file in itertools.chain(dead.values(), leases):
            file.unlink(missing_ok=True)
        return records.keys() - dead - {self.driver}


def live_drivers(root: Location) -> set[str]:
    """Return the living drivers; one of another machine must raise its counter within two beats."""
    found = {file: _text(file) for file in (root / "drivers").glob("[!.]*") if Leases(root).alive(file.name)}
    if watched := _SEEN.keys() & found.keys():
        time.sleep(2.5 * BEAT_S)
    return {file.name for file, said in found.items() if file not in watched or _text(file) not in (said, "")}


@contextlib.contextmanager
def heartbeat(root: Location) -> Iterator[Leases]:
    """Show others that this driver lives, and yield its leases; at the end, forget dead drivers."""
    leases = Leases(root, f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    record, process = root / "drivers" / leases.driver, f"{_machine()} {os.getpid()} {_started(os.getpid())}"
    done, counter = threading.Event(), itertools.count()

    def beat() -> None:
        while not done.wait(BEAT_S):
            # A full disk must not end the driver; at worst another driver repeats its work.
            with contextlib.suppress(OSError, StorageError):
                replace(record, f"{process} {next(counter)}")

    replace(record, f"{process} {next(counter)}")
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        with contextlib.suppress(OSError, StorageError):
            leases.forget_dead()
        done.set()
        thread.join(timeout=10.0)  # A beat still being written would bring the record back.
        record.unlink(missing_ok=True)


def _text(file: Location) -> str:
    """Return what a small file holds; '' where it cannot be read or is no text. Raises Unreachable."""
    try:
        return file.read_text()
    except Unreachable:
        raise
    except (OSError, ValueError):
        return ""


def _machine() -> str:
    """Identify the machine, or the container whose processes share one numbering."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int | str) -> str:
    """Return when a process started; '' where it has ended."""
    state, *fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["X"]
    return "" if state in "ZX" else fields[18]
