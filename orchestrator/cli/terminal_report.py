"""The report as the terminal shows it: its tables and conclusions, where the whole of it is, and how to see the runs."""

import os
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from orchestrator.cli.layout import fitting
from orchestrator.cli.session import Session
from orchestrator.report.audit import audit_sweep
from orchestrator.report.compare_sweeps import Comparison, without_intervals
from orchestrator.report.page import HTML, said_conclusions
from orchestrator.report.results import left_out_lines
from orchestrator.report.summary import Written, accuracy_table, epoch_table
from orchestrator.report.tables import Table
from orchestrator.spec.redaction import shown_uri
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration

# Of a table of epochs, as many as a terminal has room for.
EPOCHS_SHOWN = 8


def print_report(session: Session, written: Written) -> None:
    """The tables, what follows from them, and where to see more."""
    _print_table(session.console, accuracy_table(written.analysis), labels=3, merged=2)
    if by_epoch := epoch_table(written.analysis.results, most=EPOCHS_SHOWN):
        session.console.print(by_epoch.terminal(labels=4))
    say(session.console, left_out_lines(written.results, written.analysis.results), style="yellow")
    say(session.console, said_conclusions(written.folder))
    say(session.console, [f"report: {written.folder / HTML}", f"MLflow: {_ui_command(session)}"])


def print_comparison(session: Session, found: Comparison) -> None:
    """Two sweeps side by side, and what follows."""
    _print_table(session.console, without_intervals(found.table), labels=4)
    say(session.console, [*found.conclusions, f"comparison: {found.file}"])


def say_audit(declaration: Declaration, store: Store, console: Console) -> None:
    """Name what is wrong with the data while nothing has been spent on it; the report has it all."""
    errors = [item.said for item in audit_sweep(declaration, store).findings if item.severity == "error"]
    say(console, errors, style="yellow")


def say(console: Console, sentences: Sequence[str], style: str | None = None) -> None:
    """Print each sentence on a line of its own, as it is."""
    for sentence in sentences:
        console.print(sentence, style=style, highlight=False, markup=False, soft_wrap=True)


def _print_table(console: Console, table: Table, labels: int, merged: int = 0) -> None:
    console.print(fitting(table.terminal(labels, merged), console))


def _ui_command(session: Session) -> str:
    options = session.options
    words = [os.path.relpath(sys.executable), sys.argv[0], "ui", "--storage", str(session.store.root)]
    words += ["--tracking-uri", shown_uri(options.tracking_uri)] if options.tracking_uri else []
    words += ["--name", options.name] if options.name else []
    return shlex.join(words)
