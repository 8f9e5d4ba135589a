"""What commands print: lines, tables that fit the terminal, bars, and the live progress of trials.

While trials run, what libraries print goes into a log.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchestrator.plan.durations import Pace
from orchestrator.run.events import (
    Completed,
    Event,
    Failed,
    Notice,
    Retried,
    RowsLogged,
    StageBegan,
    Started,
    Stopped,
)
from orchestrator.spec.redaction import RedactingFormatter, scrub
from trainers.command import READABLE, is_utf
from trainers.errors import StorageError

SHOWN = 12
STATES = ("waiting", "running", "complete", "failed", "stopped")
PLAIN_EVERY_S = 15.0
BAR_AFTER_S = 2.0
_UNBOUNDED = 10_000


class _Rate(progress.ProgressColumn):
    """A column with the number of items done per second."""

    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


_BAR = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    _Rate(),
    progress.TimeRemainingColumn(),
)


def say(console: Console, *lines: str, style: str | None = None) -> None:
    """Print each line as it is: nothing in it is markup, and only the terminal wraps it."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def fitting(table: Table, console: Console) -> RenderableType:
    """Return the table; where it would break words, its rows as paragraphs, each value after its column's name."""
    if console.measure(table, options=console.options.update(width=_UNBOUNDED)).minimum <= console.width:
        return table
    first, *others = ([_cell_text(cell) for cell in column.cells] for column in table.columns)
    names = [_cell_text(column.header) for column in table.columns[1:]]
    parts: list[RenderableType] = [Text(_cell_text(table.title), style="italic")] if table.title else []
    for head, *values in zip(first, *others, strict=True):
        parts.append(Text(head))
        said = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
        parts.append(Padding(Text(said), (0, 0, 0, 2)))
    return Group(*parts)


def _cell_text(cell: object) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)


@contextlib.contextmanager
def quiet(log: Path, width: int | None = None) -> Iterator[Console]:
    """Send file descriptors 1 and 2 (Ray's, DeepSpeed's and MLflow's chatter) to `log`; yields the real terminal.

    Raises StorageError where the log's folder cannot be made.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{log.parent} cannot be made ({error.strerror}); choose another --storage."
        ) from error
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_error = os.dup(1), os.dup(2)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    errors = "strict" if is_utf(encoding) else READABLE
    with (
        log.open("a", encoding="utf-8") as sink,
        os.fdopen(os.dup(kept_out), "w", encoding=encoding, errors=errors) as terminal,
    ):
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        handler = logging.StreamHandler(sink)
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield Console(file=terminal, width=width)
        finally:
            logging.getLogger().removeHandler(handler)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept_out, 1)
            os.dup2(kept_error, 2)
            os.close(kept_out)
            os.close(kept_error)
            scrub(log)


@contextlib.contextmanager
def late_bar(
    console: Console | None, label: str, after_s: float = BAR_AFTER_S
) -> Iterator[Callable[[int, int], None]]:
    """Yields what takes (done, total); on a terminal a bar is shown once that has gone on for `after_s`."""
    began = time.monotonic()
    bar: progress.Progress | None = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if console is None or not console.is_terminal or time.monotonic() - began < after_s:
                return
            bar = progress.Progress(*_BAR, console=console, transient=True)
            bar.add_task(label)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield step
    finally:
        if bar is not None:
            bar.stop()


@dataclass(slots=True)
class TrialState:
    """The state, pace and last message of a trial that runs."""

    name: str
    state: str = "waiting"
    pace: Pace = field(default_factory=Pace)
    message: str = ""


class Progress:
    """Follows events of trials; a context manager that draws while it is open."""

    def __init__(self, console: Console, names: Mapping[str, str], complete: int) -> None:
        self._console = console
        self._trials = {key: TrialState(name) for key, name in names.items()}
        self._complete_before = complete
        self._lock = threading.Lock()
        self._live = Live(
            console=console,
            get_renderable=self._table,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._last_line = 0.0

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def on_event(self, event: Event) -> None:
        """Take in one event of a trial."""
        if event.trial not in self._trials:
            return
        with self._lock:
            trial = self._trials[event.trial]
            match event:
                case Started():
                    trial.state = "running"
                case StageBegan():
                    trial.pace.begin(event.stage)
                case RowsLogged():
                    trial.pace.take(event.stage, event.rows[-1])
                case Completed():
                    trial.state = "complete"
                case Failed():
                    trial.state, trial.message = "failed", event.message
                case Stopped():
                    trial.state = "stopped"
        # What must not pass unseen stands above the table, where there is one.
        match event:
            case Notice():
                self._say(trial, event.text)
            case Retried():
                self._say(trial, f"{event.message}; {event.how}")
            case _ if not self._console.is_terminal:
                self._plain(event, trial)

    def counts(self) -> dict[str, int]:
        """Count the trials in each state, those that were complete before included."""
        states = [trial.state for trial in self._trials.values()]
        counts = {state: states.count(state) for state in STATES}
        counts["complete"] += self._complete_before
        return counts

    def _say(self, trial: TrialState, text: str) -> None:
        say(self._console, f"{trial.name}: {text}")

    def _plain(self, event: Event, trial: TrialState) -> None:
        if isinstance(event, Completed):
            counts = self.counts()
            say(self._console, f"{counts['complete']}/{sum(counts.values())} complete: {trial.name}")
        elif isinstance(event, Failed):
            say(self._console, f"failed: {trial.name}: {trial.message}", style="red")
        elif isinstance(event, RowsLogged) and time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            say(self._console, "  ".join([trial.name, *_cells(trial)]))

    def _table(self) -> RenderableType:
        with self._lock:
            counts = self.counts()
            title = "  ".join(f"{count} {state}" for state, count in counts.items())
            table = Table(title=title, title_justify="left")
            for column in ("trial", "stage", "step", "loss", "pairs/s", "left"):
                table.add_column(column, justify="left" if column in ("trial", "stage") else "right")
            active = [trial for trial in self._trials.values() if trial.state in ("running", "failed")]
            active.sort(key=lambda trial: trial.state != "running")
            for trial in active[:SHOWN]:
                table.add_row(trial.name, *_cells(trial), style="red" if trial.state == "failed" else None)
        return fitting(table, self._console)


def _cells(trial: TrialState) -> tuple[str, str, str, str, str]:
    return ("failed", "", "", "", "") if trial.state == "failed" else pace_cells(trial.pace)


def pace_cells(pace: Pace) -> tuple[str, str, str, str, str]:
    """Stage, step, loss, pairs/s and time left, for a table."""
    known = f"{pace.done}/{pace.total}" if pace.total else ""
    loss = "" if pace.loss is None else f"{pace.loss:.4f}"
    rate = "" if pace.rate is None else f"{pace.rate:.1f}"
    return pace.stage or "waiting", known, loss, rate, duration(pace.left_s)


def duration(seconds: float | None) -> str:
    """In words of at most six letters: 42 s, 12 min, 3.5 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
