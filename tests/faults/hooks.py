"""What a life is made to suffer: called in its process before the command, with `functools.partial` for arguments."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def all_of(*hooks: Callable[[], None]) -> None:
    """One hook after the other."""
    for hook in hooks:
        hook()


def impatient() -> None:
    """Wait hardly at all between two attempts."""
    from orchestrator.run.inline import InlineBackend

    InlineBackend.pause = lambda self, seconds: time.sleep(min(seconds, 0.05))


def trace(file: Path) -> None:
    """Append `stage key pid` for every stage that this process starts to compute."""
    from orchestrator.store.artifacts import Store

    write = Store.write

    def traced(self, stage, key, **inputs):
        if stage != "dataset":
            with file.open("a") as stream:
                stream.write(f"{stage} {key} {os.getpid()}\n")
        return write(self, stage, key, **inputs)

    Store.write = traced


def traced(file: Path) -> list[str]:
    """`stage/key` of everything computed, in the order in which it began."""
    return ["/".join(line.split()[:2]) for line in file.read_text().splitlines()] if file.is_file() else []


def at_step(number: int, act: Callable[[], None]) -> None:
    """Call `act` before the `number`-th optimiser step of this process."""
    import trainers.train.loop

    step, done = trainers.train.loop.optimiser_step, []

    def counted(*arguments):
        done.append(1)
        if len(done) == number:
            act()
        return step(*arguments)

    trainers.train.loop.optimiser_step = counted


def before_each(module: str, name: str, act: Callable[[], None]) -> None:
    """Call `act` before every call of a function."""
    import importlib

    target = importlib.import_module(module)
    original = getattr(target, name)

    def acting(*arguments, **named):
        act()
        return original(*arguments, **named)

    setattr(target, name, acting)


def signalled(number: int, again_after_s: float | None = None, wait_s: float = 0.0) -> None:
    """Send a signal to this process, and again after a while; `wait_s` is spent in work that notices nothing."""
    if again_after_s is not None:
        threading.Timer(again_after_s, os.kill, (os.getpid(), number)).start()
    os.kill(os.getpid(), number)
    time.sleep(wait_s)
