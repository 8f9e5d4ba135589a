"""Stopping on request: the first SIGINT or SIGTERM asks; a second one, or the end of the grace period, interrupts.

A training that is asked to stop finishes its step, and writes a checkpoint if the grace period allows.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

GRACE_S = 30.0
INSIST_EVERY_S = 0.5
# Returns the seconds left to stop in; None while nobody has asked.
StopLeft = Callable[[], float | None]


def never() -> float | None:
    """Never ask to stop."""
    return None


class StopRequest:
    """A request to stop within a grace period. Use `deferred` around work that stops by itself when asked."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.asked = threading.Event()
        self._deadline = 0.0
        self._deferring = self._raised = False

    def left_s(self) -> float | None:
        """Return the seconds of grace left; None while nobody has asked to stop."""
        return max(0.0, self._deadline - time.monotonic()) if self.asked.is_set() else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in the block; outside `deferred` they raise KeyboardInterrupt at once."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, on_ask: Callable[[], None] | None = None) -> Iterator[None]:
        """Let the block continue when asked, for the grace period at most. `on_ask` runs in its own thread.

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
            # A real signal also interrupts a system call of the main thread. It repeats, since one that comes just before
            # the call is noticed only after it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            done.wait(INSIST_EVERY_S)
