"""Leases on stages, so that drivers that share a store share its work. They only save work: correctness needs none.

    <storage>/leases/<name>           the driver that works on a stage: the first that put its name there
    <storage>/drivers/<driver>.json   a counter for all leases of a driver, which it raises every two seconds

A driver is dead when a watcher has seen its counter stand still for 20 seconds of the watcher's own monotonic clock, so
that clocks need not agree; on the same machine one looks at the process itself. Whoever finds the holder of a lease dead
removes the lease and puts its own. Two that do so at once may both win: both commit, and the first manifest stays.
"""

import contextlib
import itertools
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from trainers.errors import StorageError, Unreachable
from trainers.storage import Location, publish, replace

BEAT_S = 2.0
LEASE_S = 20.0
POLL_S = 1.0


class Leases:
    """The leases of one driver, and what it has seen of other drivers' counters. Can be sent to another process."""

    def __init__(self, root: Location, driver: str, lease_s: float = LEASE_S) -> None:
        self._root, self.driver, self._lease_s = root, driver, lease_s
        self._seen: dict[str, tuple[int, float]] = {}

    def __reduce__(self) -> tuple[type["Leases"], tuple[Location, str, float]]:
        # When counters were seen is told by this machine's clock.
        return Leases, (self._root, self.driver, self._lease_s)

    @contextlib.contextmanager
    def held(
        self, name: str, done: Callable[[], bool], pause: Callable[[float], None] = time.sleep
    ) -> Iterator[bool]:
        """Wait for the lease on `name` and yield True while it is held; False where another driver got it `done`."""
        while not done():
            if self.take(name):
                try:
                    # The last holder may have finished between the two looks.
                    yield not done()
                finally:
                    self.release(name)
                return
            pause(POLL_S)
        yield False

    def take(self, name: str) -> bool:
        """Take the lease on `name`; False where another driver that lives has it. All processes of a driver share its leases."""
        lease = self._root / "leases" / name
        if publish(lease, self.driver):
            return True
        holder = _holder(lease)
        if holder == self.driver or self.alive(holder):
            return holder == self.driver
        # Another one may have taken it over since.
        if _holder(lease) == holder:
            lease.unlink(missing_ok=True)
        return publish(lease, self.driver)

    def release(self, name: str) -> None:
        """Give back what was taken."""
        lease = self._root / "leases" / name
        if _holder(lease) == self.driver:
            lease.unlink(missing_ok=True)

    def alive(self, driver: str) -> bool:
        """Return whether a driver lives, as far as this one can know by now."""
        try:
            record = json.loads(_file(self._root, driver).read_text())
            if record["machine"] == _machine():
                return _started(record["pid"]) == record["started"]
            counter, now = record["counter"], time.monotonic()
        except Unreachable:
            # Nobody's work is taken over because we cannot see.
            return True
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if driver not in self._seen or self._seen[driver][0] != counter:
            self._seen[driver] = (counter, now)
        return now - self._seen[driver][1] < self._lease_s

    def forget_dead_drivers(self) -> None:
        """Remove the records of dead drivers, and the leases of drivers that have no record."""
        for file in (self._root / "drivers").glob("*.json"):
            if not self.alive(file.stem):
                file.unlink(missing_ok=True)
        for lease in (self._root / "leases").glob("[!.]*"):
            if not _file(self._root, _holder(lease)).is_file():
                lease.unlink(missing_ok=True)

    def others(self) -> set[str]:
        """Return the other drivers that have said that they are here, dead ones among them."""
        return {file.stem for file in (self._root / "drivers").glob("*.json")} - {self.driver}


def live_drivers(root: Location) -> set[str]:
    """Return the drivers that live; those of other machines are watched for two beats."""
    leases = Leases(root, "", 2.5 * BEAT_S)
    alive = {driver for driver in leases.others() if leases.alive(driver)}
    if alive & leases._seen.keys():
        time.sleep(2.5 * BEAT_S)
    return {driver for driver in alive if leases.alive(driver)}


@contextlib.contextmanager
def heartbeat(root: Location, lease_s: float = LEASE_S) -> Iterator[Leases]:
    """Show others that this driver lives, and yield its leases; in the end, forget drivers that have shown no life."""
    leases = Leases(root, f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", lease_s)
    file, done = _file(root, leases.driver), threading.Event()
    process = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}

    def beat() -> None:
        for counter in itertools.count(1):
            if done.wait(BEAT_S):
                return
            # A full disk must not end the driver; at worst another one does the same work.
            with contextlib.suppress(OSError, StorageError):
                replace(file, json.dumps({**process, "counter": counter}))

    replace(file, json.dumps({**process, "counter": 0}))
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        with contextlib.suppress(OSError, StorageError):
            leases.forget_dead_drivers()
        done.set()
        # A beat that is still being written would put the file back.
        thread.join(timeout=10.0)
        file.unlink(missing_ok=True)


def _file(root: Location, driver: str) -> Location:
    return root / "drivers" / f"{Path(driver).name}.json"


def _holder(lease: Location) -> str:
    """Return the driver that a lease names; '' where there is no lease, or none that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return lease.read_text()
    return ""


def _machine() -> str:
    """Return the machine, or the part of it that numbers its processes together."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {uuid.getnode()} {os.getpid()}"


def _started(pid: int) -> str | None:
    """Return when a process started; None where there is none, or only its remains."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
