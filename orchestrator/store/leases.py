"""Leases on stages, so that drivers on one store divide its work. They only save work; correctness does not need them.

    <storage>/leases/<name>           names the driver that works on a stage
    <storage>/drivers/<driver>.json   that driver's counter, which it raises every two seconds

A driver counts as dead when its counter has not moved for 20 seconds of the watcher's own monotonic clock, so clocks need
not agree; on the same machine the watcher checks the process itself. A watcher that finds the holder of a lease dead
removes the lease and takes it. Two that do so at once may both succeed: both commit, and the first manifest stays.
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
    """The leases of one driver, and the counters of other drivers that it has seen. Can be pickled."""

    def __init__(self, root: Location, driver: str, lease_s: float = LEASE_S) -> None:
        self._leases, self._drivers, self.driver = root / "leases", root / "drivers", driver
        self._seen: dict[str, tuple[int, float]] = {}
        self._given = root, driver, lease_s

    def __reduce__(self) -> tuple[type["Leases"], tuple[Location, str, float]]:
        # The times at which counters were seen are of this machine's clock.
        return Leases, self._given

    @contextlib.contextmanager
    def held(
        self, name: str, done: Callable[[], bool], pause: Callable[[float], None] = time.sleep
    ) -> Iterator[bool]:
        """Wait for the lease on `name` and yield True while holding it; yield False if another driver got it `done`."""
        while not done():
            if self.take(name):
                try:
                    # The last holder may have finished between our two checks.
                    yield not done()
                finally:
                    self.release(name)
                return
            pause(POLL_S)
        yield False

    def take(self, name: str) -> bool:
        """Take the lease on `name`; return False if another living driver has it. A driver's processes share its leases."""
        lease = self._leases / name
        if publish(lease, self.driver):
            return True
        holder = _holder(lease)
        if holder == self.driver or self.alive(holder):
            return holder == self.driver
        # Another driver may have taken it over since.
        if _holder(lease) == holder:
            lease.unlink(missing_ok=True)
        return publish(lease, self.driver)

    def release(self, name: str) -> None:
        """Give the lease back if this driver holds it."""
        if _holder(self._leases / name) == self.driver:
            (self._leases / name).unlink(missing_ok=True)

    def alive(self, driver: str) -> bool:
        """Return whether a driver lives, as far as this one has seen."""
        try:
            record = json.loads((self._drivers / f"{Path(driver).name}.json").read_text())
            counter, now = record["counter"], time.monotonic()
            if record["machine"] == _machine():
                return _started(record["pid"]) == record["started"]
        except Unreachable:
            # We take over nobody's work just because the bucket does not answer.
            return True
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if self._seen.get(driver, (None,))[0] != counter:
            self._seen[driver] = (counter, now)
        return now - self._seen[driver][1] < self._given[-1]

    def forget_dead_drivers(self) -> None:
        """Remove the records and the leases of dead drivers."""
        for file in self._drivers.glob("*.json"):
            if not self.alive(file.stem):
                file.unlink(missing_ok=True)
        for lease in self._leases.glob("[!.]*"):
            # Read just before it is removed: another driver may have taken it over meanwhile.
            if not self.alive(_holder(lease)):
                lease.unlink(missing_ok=True)

    def others(self) -> set[str]:
        """Return the other drivers that have a record, living or dead."""
        return {file.stem for file in self._drivers.glob("*.json")} - {self.driver}


def live_drivers(root: Location) -> set[str]:
    """Return the living drivers, after watching those of other machines for two beats."""
    leases = Leases(root, "", 2.5 * BEAT_S)
    alive = {driver for driver in leases.others() if leases.alive(driver)}
    if alive & leases._seen.keys():
        time.sleep(2.5 * BEAT_S)
    return {driver for driver in alive if leases.alive(driver)}


@contextlib.contextmanager
def heartbeat(root: Location, lease_s: float = LEASE_S) -> Iterator[Leases]:
    """Show others that this driver lives, and yield its leases; at the end, forget dead drivers."""
    leases = Leases(root, f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", lease_s)
    file, done = root / "drivers" / f"{leases.driver}.json", threading.Event()
    record = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "counter": 0}

    def beat() -> None:
        for counter in itertools.count(1):
            if done.wait(BEAT_S):
                return
            # A full disk must not end the driver; at worst another driver repeats its work.
            with contextlib.suppress(OSError, StorageError):
                replace(file, json.dumps({**record, "counter": counter}))

    replace(file, json.dumps(record))
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        with contextlib.suppress(OSError, StorageError):
            leases.forget_dead_drivers()
        done.set()
        # A beat still being written would bring the file back.
        thread.join(timeout=10.0)
        file.unlink(missing_ok=True)


def _holder(lease: Location) -> str:
    """Return the driver that a lease names; '' where the lease is missing or unreadable."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return lease.read_text()
    return ""


def _machine() -> str:
    """Identify the machine, or the container whose processes share one numbering."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())


def _started(pid: int) -> str | None:
    """Return when a process started; None where it is gone or a zombie."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
