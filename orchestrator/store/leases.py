"""Leases on stages, so that drivers on one store divide its work. They only save work; correctness does not need them.

<storage>/leases/<name> names the driver that works on a stage; <storage>/drivers/<driver> holds its process and a counter
that it raises every two seconds. A driver is dead when its counter has stood still for 20 seconds of the watcher's own
monotonic clock, or on the watcher's machine when its process is gone. Two that take a dead one's lease at once both commit.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from orchestrator.store.artifacts import text_of
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
    def held(self, name: str, done: Callable[[], bool], pause: Callable[[float], None]) -> Iterator[bool]:
        """Wait for the lease on `name` and yield True while holding it; yield False if another driver got it `done`."""
        while not (finished := done()) and not self.take(name):
            pause(POLL_S)
        try:
            yield not (finished or done())  # The last holder may have finished between our two checks.
        finally:
            self.release(name)

    def take(self, name: str) -> bool:
        """Take the lease on `name`; return False if another driver has it that lives, or took it over since we looked."""
        lease = self.root / "leases" / name
        if publish(lease, self.driver) or (holder := text_of(lease)) == self.driver:
            return True
        if self.alive(holder) or text_of(lease) != holder:
            return False
        lease.unlink(missing_ok=True)
        return publish(lease, self.driver)

    def release(self, name: str) -> None:
        """Give the lease back if this driver holds it."""
        if text_of(lease := self.root / "leases" / name) == self.driver:
            lease.unlink(missing_ok=True)

    def alive(self, driver: str, within_s: float | None = None) -> bool:
        """Return whether a driver of this machine runs, or another one's counter moved within `within_s`, else LEASE_S."""
        record = self.root / "drivers" / Path(driver).name
        try:
            process, _, counter = record.read_text().rpartition(" ")
            machine, pid, _ = process.split()
        except (OSError, ValueError) as error:
            return isinstance(error, Unreachable)  # A bucket that does not answer makes nobody dead.
        if (running := _process(pid)).startswith(machine):
            return running == process
        if _SEEN.get(record, ("", 0.0))[0] != counter:
            _SEEN[record] = counter, time.monotonic()
        return time.monotonic() - _SEEN[record][1] < (within_s or LEASE_S)

    def forget_dead(self) -> set[str]:
        """Remove the records of dead drivers, free all leases that no other driver holds, and return the other drivers."""
        records = {file.name: file for file in (self.root / "drivers").glob("[!.]*")}
        dead = {name: file for name, file in records.items() if not self.alive(name)}
        for file in dead.values():
            file.unlink(missing_ok=True)
        for lease in (self.root / "leases").glob("[!.]*"):
            if self.take(lease.name):
                self.release(lease.name)
        return records.keys() - dead - {self.driver}


def live_drivers(root: Location) -> set[str]:
    """Return the living drivers; one of another machine must raise its counter within two beats."""
    found = [file for file in (root / "drivers").glob("[!.]*") if Leases(root).alive(file.name)]
    if _SEEN.keys() & found:
        time.sleep(2.5 * BEAT_S)
    return {file.name for file in found if Leases(root).alive(file.name, 2 * BEAT_S)}


@contextlib.contextmanager
def heartbeat(root: Location) -> Iterator[Leases]:
    """Show others that this driver lives, and yield its leases; at the end, forget dead drivers."""
    leases = Leases(root, f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    record, process, done = root / "drivers" / leases.driver, _process(os.getpid()), threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            # A full disk must not end the driver; at worst another driver repeats its work.
            with contextlib.suppress(OSError, StorageError):
                replace(record, f"{process} {time.monotonic_ns()}")

    replace(record, f"{process} {time.monotonic_ns()}")
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        done.set()
        thread.join(timeout=10.0)  # A beat still being written would bring the record back.
        with contextlib.suppress(OSError, StorageError):
            record.unlink(missing_ok=True)
            leases.forget_dead()


def _process(pid: int | str) -> str:
    """Identify a process by machine or container, number, and start, which is empty once it has ended."""
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    state, *fields = text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["X"]
    return f"{boot.read_text().strip()}/{numbering.readlink()} {pid} {'' if state in 'ZX' else fields[18]}"
