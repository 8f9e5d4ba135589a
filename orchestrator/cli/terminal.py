"""Prints lines, tables that fit the terminal, bars and the live progress of trials; libraries print into a log."""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich import progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.plan.durations import time_left_s
from orchestrator.run.events import Completed, Event, Failed, Notice, Retried, RowsLogged
from orchestrator.spec.redaction import RedactingFormatter, scrub
from orchestrator.store.records import TrialNote
from trainers.errors import StorageError

SHOWN = 12
STATES = ("waiting", "running", "complete", "failed", "stopped")
PLAIN_EVERY_S = 15.0
CELL_EVERY_S = 0.5
COLUMNS, WIDTHS = ("stage", "step", "loss", "pairs/s"), (9, 9, 6, 7)
BAR_AFTER_S = 2.0
_UNBOUNDED = 10_000


def say(console: Console, *lines: str, style: str | None = None) -> None:
    """Print each line as it is: without markup, wrapped only by the terminal."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def fits(table: Table, console: Console) -> bool:
    """Whether no word of the table would be broken."""
    return console.measure(table, options=console.options.update(width=_UNBOUNDED)).minimum <= console.width


def fitting(table: Table, console: Console) -> RenderableType:
    """Return the table; if it would break words, return its rows as paragraphs that name every value."""
    if fits(table, console):
        return table
    first, *others = ([_cell_text(cell) for cell in column.cells] for column in table.columns)
    names = [_cell_text(column.header) for column in table.columns[1:]]
    parts: list[RenderableType] = [Text(_cell_text(table.title), style="italic")] if table.title else []
    for head, *values in zip(first, *others, strict=True):
        parts.append(Text(head))
        said = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
        parts += [Padding(Text(said), (0, 0, 0, 2))] if said else []
    return Group(*parts)


def _cell_text(cell: object) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)


def _is_cell(file: IO[str]) -> bool:
    """Whether the file is the output of a notebook's cell, which calls itself a terminal."""
    return type(file).__module__ == "ipykernel.iostream"


def console_on(file: IO[str], width: int | None = None) -> Console:
    """Return a console that writes to `file`; in a notebook, it writes plain text."""
    return Console(
        file=file, width=width, force_jupyter=False, force_terminal=False if _is_cell(file) else None
    )


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
    with log.open("a", encoding="utf-8") as sink, contextlib.ExitStack() as opened:
        if _is_cell(sys.stdout):
            terminal: IO[str] = sys.stdout
            opened.enter_context(contextlib.redirect_stdout(sink))
            opened.enter_context(contextlib.redirect_stderr(sink))
        else:
            kept = os.fdopen(os.dup(kept_out), "w", encoding=encoding, errors="replace")
            terminal = opened.enter_context(kept)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        handler = logging.StreamHandler(sink)
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield console_on(terminal, width)
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
    console: Console, label: str, after_s: float = BAR_AFTER_S
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that draws a bar with rate and time left, on a terminal and after `after_s`."""
    began = time.monotonic()
    bar: progress.Progress | None = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if not console.is_terminal or time.monotonic() - began < after_s:
                return
            columns = (*progress.Progress.get_default_columns()[:2], progress.MofNCompleteColumn())
            rate = progress.TextColumn("{task.fields[rate]:.3g}/s")
            left = progress.TimeRemainingColumn()
            bar = progress.Progress(*columns, rate, left, console=console, transient=True)
            bar.add_task(label, rate=0.0)
            bar.start()
        rate_s = done / (time.monotonic() - began)
        bar.update(bar.task_ids[0], completed=done, total=total, rate=rate_s)

    try:
        yield step
    finally:
        if bar is not None:
            bar.stop()


class Progress:
    """Shows the progress of trials while it is open: a live table on a terminal and in a notebook, lines elsewhere.

    `names` are the trials by key; the caller keeps their `notes` up to date. `complete` trials were done before. `starting`
    is shown until one runs.
    """

    def __init__(
        self,
        console: Console,
        names: Mapping[str, str],
        notes: Mapping[str, TrialNote],
        complete: int,
        starting: str = "starting",
    ) -> None:
        # With it comes Arrow, which no other command waits for.
        from orchestrator.report.tables import what_differs

        self._console = console
        self._names = names
        self._short = {key: differs or same for key, (differs, same) in what_differs(names).items()}
        self._notes = {key: notes[key] for key in names}
        self._complete_before, self._starting, self._rows = complete, Spinner("dots", starting), 0
        self._shown_at = 0.0
        self._cell: Any = None
        self._live = Live(
            console=console,
            get_renderable=self._table,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        elif _is_cell(self._console.file):
            from IPython.display import display

            self._cell = display({"text/plain": f"{self._starting.text} …"}, raw=True, display_id=True)
        else:
            say(self._console, f"{self._starting.text} …")
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self._update_cell()

    def on_event(self, event: Event) -> None:
        """Print notices, retries and failures, above the table if there is one; without a table, also progress."""
        name = self._names.get(event.trial)
        due = time.monotonic() - self._shown_at > (CELL_EVERY_S if self._cell else PLAIN_EVERY_S)
        match event:
            case _ if name is None:
                return
            case Notice():
                say(self._console, f"{name}: {event.text}")
            case Retried():
                say(self._console, f"{name}: {event.message}; {event.how}")
            case Failed():
                say(self._console, f"failed: {name}: {event.message}", style="red")
            case _ if self._console.is_terminal:
                return
            case _ if self._cell:
                if due:
                    self._shown_at = time.monotonic()
                    self._update_cell()
            case Completed():
                counts = self.counts()
                say(self._console, f"{counts['complete']}/{sum(counts.values())} complete: {name}")
            case RowsLogged() if due:
                if not self._shown_at:
                    say(self._console, _aligned("trial", COLUMNS, self._short))
                self._shown_at = time.monotonic()
                cells = progress_cells(self._notes[event.trial])
                say(self._console, _aligned(self._short[event.trial], cells, self._short))

    def counts(self) -> dict[str, int]:
        """Count the trials in each state, earlier complete ones included; a trial without devices is waiting."""
        states = [
            "waiting" if note.state == "running" and not _runs(note) else note.state
            for note in self._notes.values()
        ]
        counts = {state: states.count(state) for state in STATES}
        counts["complete"] += self._complete_before
        return counts

    def _table(self) -> RenderableType:
        """Draw the trials that run, in a table of constant height and width."""
        active = [key for key, note in self._notes.items() if _runs(note)]
        self._rows = max(self._rows, min(len(active), SHOWN))
        counts = {state: count for state, count in self.counts().items() if count}
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        title = Text(said + said_left(self._notes, self._names))
        if not counts.keys() & {"waiting", "running"}:
            return Text(said)
        if not self._rows:
            return Group(title, self._starting)
        table = Table(box=None, pad_edge=False)
        widest = max(map(len, self._short.values()))
        table.add_column("trial", no_wrap=True, min_width=min(widest, max(20, self._console.width - 45)))
        for column, width in zip(COLUMNS, WIDTHS, strict=True):
            right = column != "stage"
            table.add_column(column, justify="right" if right else "left", min_width=width, no_wrap=True)
        for key in active[: self._rows]:
            table.add_row(escape(self._short[key]), *progress_cells(self._notes[key]))
        for _ in range(self._rows - len(active)):
            table.add_row("")
        more = f"and {len(active) - self._rows} more" if len(active) > self._rows else ""
        return Group(title, fitting(table, self._console), Text(more))

    def _update_cell(self) -> None:
        if self._cell:
            out = console_on(io.StringIO(), self._console.width)
            out.print(self._table())
            self._cell.update({"text/plain": out.file.getvalue()}, raw=True)  # type: ignore[attr-defined]


def _runs(note: TrialNote) -> bool:
    return note.state == "running" and note.stage not in ("", "waiting")


def _aligned(name: str, cells: Sequence[str], names: Mapping[str, str]) -> str:
    padded = [f"{cell:{side}{width}}" for cell, width, side in zip(cells, WIDTHS, "<>>>", strict=True)]
    return "  ".join([name.ljust(max(map(len, names.values()))), *padded]).rstrip()


def said_left(notes: Mapping[str, TrialNote], names: Mapping[str, str]) -> str:
    """Say how much training is left, once that is known: trials that differ only in their seed take equally long."""
    left_s = time_left_s(notes, {key: name.rpartition(" · ")[0] for key, name in names.items()})
    return "" if left_s is None else f", about {duration(left_s)} of training left"


def progress_cells(note: TrialNote) -> tuple[str, str, str, str]:
    """Return stage, step, loss and pairs/s of a running trial, for a table."""
    step = f"{note.step}/{note.total}" if note.total else ""
    loss = "" if note.loss is None else f"{note.loss:.4f}"
    rate = "" if note.pairs_per_s is None else f"{note.pairs_per_s:.1f}"
    return note.stage or "waiting", step, loss, rate


def duration(seconds: float) -> str:
    """Return seconds as 42 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
