"""What commands print: lines, tables that fit the terminal, bars, and the live progress of trials.

While trials run, what libraries print goes into a log.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from rich import progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchestrator.run.events import Completed, Event, Failed, Notice, Retried, RowsLogged
from orchestrator.spec.redaction import RedactingFormatter, scrub
from orchestrator.store.records import TrialNote
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


def in_notebook() -> bool:
    """Whether what is printed goes to the output of a notebook's cell."""
    return type(sys.stdout).__module__ == "ipykernel.iostream"


@contextlib.contextmanager
def quiet(log: Path, width: int | None = None) -> Iterator[Console]:
    """Send what libraries print (file descriptors 1 and 2) to `log`, and yield the real terminal or notebook.

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
    with log.open("a", encoding="utf-8") as sink, contextlib.ExitStack() as opened:
        if in_notebook():
            terminal: IO[str] = sys.stdout
            opened.enter_context(contextlib.redirect_stdout(sink))
            opened.enter_context(contextlib.redirect_stderr(sink))
        else:
            kept = os.fdopen(os.dup(kept_out), "w", encoding=encoding, errors=errors)
            terminal = opened.enter_context(kept)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        handler = logging.StreamHandler(sink)
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield Console(file=terminal, width=width, force_jupyter=False)
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
    """Yield a function of (done, total) that draws a bar, on a terminal and once `after_s` have passed."""
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


class Progress:
    """Shows how far trials are, while it is open: a live table on a terminal, lines elsewhere.

    `names` are those of the trials by key, `notes` what is known of each, which somebody else keeps up to date; `complete`
    trials were done before.
    """

    def __init__(
        self, console: Console, names: Mapping[str, str], notes: Mapping[str, TrialNote], complete: int
    ) -> None:
        self._console = console
        self._names = names
        self._notes = {key: notes[key] for key in names}
        self._complete_before = complete
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
        """Print what a person has to see of an event: above the table, where there is one."""
        name = self._names.get(event.trial)
        match event:
            case _ if name is None:
                return
            case Notice():
                say(self._console, f"{name}: {event.text}")
            case Retried():
                say(self._console, f"{name}: {event.message}; {event.how}")
            case _ if self._console.is_terminal:
                return
            case Completed():
                counts = self.counts()
                say(self._console, f"{counts['complete']}/{sum(counts.values())} complete: {name}")
            case Failed():
                say(self._console, f"failed: {name}: {event.message}", style="red")
            case RowsLogged() if time.monotonic() - self._last_line > PLAIN_EVERY_S:
                self._last_line = time.monotonic()
                say(self._console, "  ".join([name, *progress_cells(self._notes[event.trial])]))

    def counts(self) -> dict[str, int]:
        """Count the trials in each state, those that were complete before included."""
        states = [note.state for note in self._notes.values()]
        counts = {state: states.count(state) for state in STATES}
        counts["complete"] += self._complete_before
        return counts

    def _table(self) -> RenderableType:
        title = "  ".join(f"{count} {state}" for state, count in self.counts().items())
        table = Table(title=title, title_justify="left")
        for column in ("trial", "stage", "step", "loss", "pairs/s", "left"):
            table.add_column(column, justify="left" if column in ("trial", "stage") else "right")
        active = [(key, note) for key, note in self._notes.items() if note.state in ("running", "failed")]
        active.sort(key=lambda item: item[1].state != "running")
        for key, note in active[:SHOWN]:
            cells = ("failed",) if note.state == "failed" else progress_cells(note)
            table.add_row(self._names[key], *cells, style="red" if note.state == "failed" else None)
        return fitting(table, self._console)


def progress_cells(note: TrialNote) -> tuple[str, str, str, str, str]:
    """Return stage, step, loss, pairs/s and time left of a trial that runs, for a table."""
    step = f"{note.step}/{note.total}" if note.total else ""
    loss = "" if note.loss is None else f"{note.loss:.4f}"
    rate = "" if note.pairs_per_s is None else f"{note.pairs_per_s:.1f}"
    return note.stage or "waiting", step, loss, rate, duration(note.left_s)


def duration(seconds: float | None) -> str:
    """Return seconds in at most six letters: 42 s, 12 min, 3.5 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
