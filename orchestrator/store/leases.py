"""Who works on what, so that two drivers on one storage share the work. Only saves work: correctness never needs it.

    <storage>/drivers/<driver>.json   a driver's counter, raised every two seconds while it lives
    <storage>/claims/<name>.json      the driver that works on a stage

A watcher takes a driver for dead when its counter has stood still for a lease by the watcher's own monotonic clock,
so that clocks need not agree; on the same machine it looks at the process itself.

In a bucket nothing can be claimed for certain: two that look at the same moment both put their claim, and the last one
stays. Each looks again after a while, so that only one of them goes on, unless one's request was very late.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainers.disk import publish, replace
from trainers.errors import StorageError, Unreachable
from trainers.objects import Location, ObjectPath, matching

BEAT_S = 2.0
LEASE_S = 20.0
POLL_S = 1.0
SETTLE = 3.0
_TURN = ".turn-"

logger = logging.getLogger(__name__)
Pause = Callable[[float], None]


class Heartbeat:
    """This driver, as others see it; a context manager that beats while it is open.

    Drivers of other machines that show no life for its first `lease_s` are forgotten: their machine may never come back.
    """

    def __init__(self, root: Location, sweep: str, lease_s: float = LEASE_S) -> None:
        self.driver = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._root, self._lease_s = root, lease_s
        self._file = _driver_file(root, self.driver)
        self._record = {"sweep": sweep, **_this_process()}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        # A beat that is still being written would put the file back.
        self._thread.join(timeout=max(BEAT_S, 10.0))
        self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        counter, began = 0, time.monotonic()
        strangers = _strangers(self._root)
        while not self._done.wait(BEAT_S):
            counter += 1
            # A full disk must not end the driver; at worst another one does the same work.
            with contextlib.suppress(OSError, StorageError):
                self._write(counter)
                if strangers and time.monotonic() - began > self._lease_s:
                    # In a bucket it takes a request for each claim, and the heart must not miss a beat.
                    arguments = (self._root, strangers)
                    threading.Thread(target=_forget_silent, args=arguments, daemon=True).start()
                    strangers = {}

    def _write(self, counter: int) -> None:
        replace(self._file, json.dumps({**self._record, "counter": counter}))


class Watch:
    """Tells the living drivers from the dead; keeps what it saw of each, and when by its own clock."""

    def __init__(self, root: Location, lease_s: float = LEASE_S) -> None:
        self._root, self._lease_s = root, lease_s
        self._seen: dict[str, tuple[int, float]] = {}

    def alive(self, driver: str) -> bool:
        """Whether the driver lives, as far as one can know by now."""
        try:
            record = _read(_driver_file(self._root, driver))
        except Unreachable:
            # Nobody's work is taken over because we cannot see.
            return True
        if record is None:
            return False
        known = _process_lives(record)
        if known is not None:
            return known
        counter, now = int(record.get("counter", 0)), time.monotonic()
        if self._seen.get(driver, (-1, 0.0))[0] != counter:
            self._seen[driver] = (counter, now)
        return now - self._seen[driver][1] < self._lease_s


def live_drivers(root: Location) -> dict[str, dict[str, Any]]:
    """Drivers that show life, with their records: those of other machines are watched for two beats."""
    records = {file.stem: _read(file) or {} for file in matching(root / "drivers", "*.json")}
    known = {driver: _process_lives(record) for driver, record in records.items()}
    if None in known.values():
        time.sleep(2.5 * BEAT_S)
    return {
        driver: record
        for driver, record in records.items()
        if (known[driver] if known[driver] is not None else _has_moved(root, driver, record))
    }


def forget_dead_drivers(root: Location) -> None:
    """Remove what dead drivers of this machine left, and claims of drivers that are gone."""
    for file in (root / "drivers").glob("*.json"):
        if _process_lives(_read(file) or {}) is False:
            file.unlink(missing_ok=True)
    _forget_claims(root)
    for draft in (root / "drivers").glob(".draft-*"):
        draft.unlink(missing_ok=True)


def _strangers(root: Location) -> dict[str, dict[str, Any]]:
    """Drivers of which one cannot look at the process, with their records."""
    with contextlib.suppress(OSError, StorageError):
        records = {file.stem: _read(file) or {} for file in matching(root / "drivers", "*.json")}
        return {driver: record for driver, record in records.items() if _process_lives(record) is None}
    return {}


def _forget_silent(root: Location, before: dict[str, dict[str, Any]]) -> None:
    """Remove what drivers left whose counter has not moved since; what cannot be removed waits for the next one."""
    with contextlib.suppress(OSError, StorageError):
        for driver, record in before.items():
            if not _has_moved(root, driver, record):
                _driver_file(root, driver).unlink(missing_ok=True)
        _forget_claims(root)


def _forget_claims(root: Location) -> None:
    """Remove the claims of drivers that are gone."""
    for claim in [*(root / "claims").glob("*.json"), *(root / "claims").glob(f"{_TURN}*")]:
        holder = str((_read(claim) or {}).get("driver", ""))
        if not _driver_file(root, holder).is_file():
            claim.unlink(missing_ok=True)


def is_alone(root: Location, driver: str) -> bool:
    """Whether no other driver has said that it is here."""
    return {file.stem for file in (root / "drivers").glob("*.json")} <= {driver}


class Claims:
    """Claims on stages in the name of a driver. Can be sent to another process."""

    def __init__(self, root: Location, driver: str, lease_s: float = LEASE_S) -> None:
        self._root, self._driver, self._lease_s = root, driver, lease_s

    @contextlib.contextmanager
    def held(self, name: str, done: Callable[[], bool], pause: Pause = time.sleep) -> Iterator[bool]:
        """Hold the claim on `name` for the block: yields True. False where another driver got it `done` meanwhile."""
        watch = self.watch()
        while not done():
            if self.take(name, watch):
                try:
                    # The last holder may have finished between the two looks.
                    yield not done()
                finally:
                    self.release(name)
                return
            pause(POLL_S)
        yield False

    def watch(self) -> Watch:
        """Who is to be asked again and again while one waits for a claim."""
        return Watch(self._root, self._lease_s)

    def take(self, name: str, watch: Watch) -> bool:
        """Claim `name` if it is free, our own, or a dead driver's."""
        for _ in range(2):
            holder = self._claim(name)
            if holder in (None, self._driver):
                return True
            if watch.alive(str(holder)):
                return False
            if self._take_from(name, str(holder), watch):
                return True
        return False

    def release(self, name: str) -> None:
        """Give back what was taken."""
        if (_read(self._file(name)) or {}).get("driver") == self._driver:
            self._file(name).unlink(missing_ok=True)

    def _claim(self, name: str) -> str | None:
        """Claim it; None, or who holds it."""
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # No driver outlives a power cut, so its claims need not either.
        ours = publish(file, json.dumps({"driver": self._driver}), durable=False)
        if ours and self._stays(file, time.monotonic() - began):
            return None
        return str((_read(file) or {}).get("driver", ""))

    def _stays(self, file: Location, took_s: float) -> bool:
        """Whether the claim is ours when whoever looked before it was put has put another one; that took us `took_s`."""
        if isinstance(file, ObjectPath):
            time.sleep(SETTLE * took_s)
            return (_read(file) or {}).get("driver") == self._driver
        return True

    def _take_from(self, name: str, holder: str, watch: Watch) -> bool:
        """Put our claim in the place of a dead driver's; False where somebody else did, or is about to."""
        file, turn = self._file(name), self._file(name).with_name(f"{_TURN}{name}")
        if not publish(turn, json.dumps({"driver": self._driver})):
            taker = str((_read(turn) or {}).get("driver", ""))
            if turn.is_file() and not watch.alive(taker):
                turn.unlink(missing_ok=True)
            return False
        try:
            # Only who has the turn puts a claim in the place of another.
            if (_read(file) or {}).get("driver", "") != holder:
                return False
            replace(file, json.dumps({"driver": self._driver}))
        finally:
            turn.unlink(missing_ok=True)
        logger.warning("%s was claimed by %s, which is dead", name, holder)
        return True

    def _file(self, name: str) -> Location:
        return self._root / "claims" / f"{name}.json"


def _driver_file(root: Location, driver: str) -> Location:
    return root / "drivers" / f"{Path(driver).name}.json"


def _read(file: Location) -> dict[str, Any] | None:
    try:
        loaded = json.loads(file.read_text())
    except Unreachable:
        raise
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else {}


def _has_moved(root: Location, driver: str, before: dict[str, Any]) -> bool:
    now = _read(_driver_file(root, driver))
    return now is not None and now.get("counter") != before.get("counter")


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "machine": _machine(), "process": _started(os.getpid())}


def _process_lives(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record lives; None where it is another machine's, or another container's."""
    if not record or record.get("machine") != _machine():
        return None
    return _started(int(record["pid"])) == record.get("process")


def _machine() -> str:
    """The running system and its process numbers: equal where a process number means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not boot.is_file():
        return f"unknown {uuid.getnode()} {os.getpid()}"
    return f"{boot.read_text().strip()} {namespace.readlink()}"


def _started(pid: int) -> str | None:
    """When a process started, in the system's ticks; None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
