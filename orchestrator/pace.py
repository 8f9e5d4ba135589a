"""How far a stage is and how fast it goes, from the rows that it reports."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class Pace:
    """One stage of a trial. Rates are pairs per second; a training's is that of its last step."""

    stage: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    rate: float | None = None
    left_s: float | None = None
    _began: float = 0.0
    _dataset: str = ""

    def begin(self, stage: str) -> None:
        """A stage has begun, of which nothing is known yet."""
        self.stage, self.done, self.total = stage, 0, 0
        self.loss = self.rate = self.left_s = None
        self._began, self._dataset = time.monotonic(), ""

    def take(self, stage: str, row: Mapping[str, Any]) -> None:
        """The last row: {step, total, loss, pairs, step_s} of a training, {done, total} of pairs elsewhere."""
        done = row.get("step", row.get("done"))
        if done is None or "total" not in row:
            return
        if stage != self.stage or row.get("dataset", "") != self._dataset:
            self.begin(stage)
            self._dataset = row.get("dataset", "")
        self.done, self.total, self.loss = int(done), int(row["total"]), row.get("loss")
        taken_s = max(time.monotonic() - self._began, 1e-3)
        if "step" in row:
            self.rate = row["pairs"] / row["step_s"] if row.get("step_s") and "pairs" in row else None
        else:
            self.rate = self.done / taken_s
        self.left_s = taken_s / self.done * (self.total - self.done) if self.done else None

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
