"""How far a stage is and how fast it goes, from the rows that it reports."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Pace:
    """One stage of a trial. Rates are pairs per second; a training's is that of its last step.

    Shared stages may run side by side: what is shown is the one that reported last.
    """

    stage: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    rate: float | None = None
    left_s: float | None = None
    # By stage and data set: when it was first heard of, and how much of it was done then.
    _first: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def begin(self, stage: str) -> None:
        """A stage has begun, of which nothing is known yet."""
        self.stage, self.done, self.total = stage, 0, 0
        self.loss = self.rate = self.left_s = None
        self._first = {known: first for known, first in self._first.items() if known[0] != stage}
        self._first[stage, ""] = time.monotonic(), 0

    def take(self, stage: str, row: Mapping[str, Any]) -> None:
        """The last row: {step, total, loss, pairs, step_s} of a training, {done, total} of pairs elsewhere."""
        done = row.get("step", row.get("done"))
        if done is None or "total" not in row:
            return
        self.stage, self.done, self.total, self.loss = stage, int(done), int(row["total"]), row.get("loss")
        now = time.monotonic()
        began, before = self._first.setdefault((stage, row.get("dataset", "")), (now, self.done))
        per_s = (self.done - before) / max(now - began, 1e-3) or None
        self.left_s = None if per_s is None else (self.total - self.done) / per_s
        self.rate = per_s
        if "step" in row:
            self.rate = row["pairs"] / row["step_s"] if row.get("step_s") and "pairs" in row else None

    def cells(self) -> tuple[str, str, str, str, str]:
        """For a table: stage, step, loss, pairs/s, time left."""
        known = f"{self.done}/{self.total}" if self.total else ""
        loss = "" if self.loss is None else f"{self.loss:.4f}"
        rate = "" if self.rate is None else f"{self.rate:.1f}"
        return self.stage or "waiting", known, loss, rate, duration(self.left_s)


def duration(seconds: float | None) -> str:
    """In words of at most six letters: 42 s, 12 min, 3.5 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
