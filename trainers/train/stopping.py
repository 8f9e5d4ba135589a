"""Stopping on request: the first SIGINT or SIGTERM asks, a second or the end of the grace period insists.

A training that is asked to stop finishes its step and writes a checkpoint where that fits the grace period.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

GRACE_S = 30.0
INSIST_EVERY_S = 0.5
# None, or the seconds that are left to stop in.
StopLeft = Callable[[], float | None]


def never() -> float | None:
    """Never ask to stop."""
    return None


class StopRequest:
    """A request to stop, and the seconds left for it. Use `deferred` around work that stops by itself when asked."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.asked = threading.Event()
        self._deadline = 0.0
        self._deferring = self._raised = False

    def left_s(self) -> float | None:
        """Return None while nobody has asked to stop, else the seconds of grace that are left."""
        return max(0.0, self._deadline - time.monotonic()) if self.asked.is_set() else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM until the block ends; outside `deferred` they raise KeyboardInterrupt at once."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, on_ask: Callable[[], None] | None = None) -> Iterator[None]:
        """Let the block go on when asked, for the grace period at most. `on_ask` runs in a thread of its own.

        Raises KeyboardInterrupt at the end of a block that was asked to stop.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._insist, args=(done, on_ask), name="stop-request", daemon=True)
        thread.start()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            done.set()
        if self.asked.is_set():
            raise KeyboardInterrupt

    def ask(self) -> None:
        """Ask to stop."""
        if not self.asked.is_set():
            self._deadline = time.monotonic() + self.grace_s
            self.asked.set()

    def _on_signal(self, number: int, frame: object) -> None:
        again = self.asked.is_set()
        self.ask()
        if again or not self._deferring:
            self._raised = True
            raise KeyboardInterrupt

    def _insist(self, done: threading.Event, on_ask: Callable[[], None] | None) -> None:
        while not self.asked.wait(0.1):
            if done.is_set():
                return
        if on_ask is not None:
            on_ask()
        else:
            done.wait(self.left_s())
        while not (done.is_set() or self._raised):
            # A real signal, since it also ends a system call that the main thread sits in; one that comes just before
            # the call is noticed only after it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            done.wait(INSIST_EVERY_S)
