"""The report as the terminal shows it: its table and conclusions, where the whole of it is, and how to see the runs."""

import os
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from orchestrator.cli.layout import fitting
from orchestrator.cli.session import Session
from orchestrator.report.common_pairs import left_out_lines, on_common_pairs
from orchestrator.report.epochs import epoch_rows, epoch_table
from orchestrator.report.page import HTML, said_conclusions
from orchestrator.report.summary import Written, terminal_table
from orchestrator.spec.redaction import shown_uri


def print_report(session: Session, written: Written) -> None:
    """The table, what follows from it, and where to see more."""
    session.console.print(fitting(terminal_table(written.rows), session.console))
    if by_epoch := epoch_rows(on_common_pairs(written.results)):
        session.console.print(epoch_table(by_epoch))
    print_left_out(session.console, written)
    say(session, said_conclusions(written.folder))
    session.console.print(f"report: {written.folder / HTML}", highlight=False, soft_wrap=True)
    session.console.print(f"MLflow: {_ui_command(session)}", highlight=False, soft_wrap=True)


def print_left_out(console: Console, written: Written) -> None:
    """Print how many pairs of which set were over the length limits."""
    for line in left_out_lines(written.results):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def say(session: Session, sentences: Sequence[str]) -> None:
    """Each sentence on a line of its own, as it is."""
    for sentence in sentences:
        session.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _ui_command(session: Session) -> str:
    options = session.options
    words = [os.path.relpath(sys.executable), sys.argv[0], "ui", "--storage", str(session.store.root)]
    words += ["--tracking-uri", shown_uri(options.tracking_uri)] if options.tracking_uri else []
    words += ["--name", options.name] if options.name else []
    return shlex.join(words)
