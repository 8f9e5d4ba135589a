"""The command line of every file in sweeps/: flags → sweep → run, plan, status, report, ui, sync, retry or gc.

Exit codes: 0 every trial complete · 1 a defect, with the log's path · 2 wrong usage or input, said before anything
starts · 3 the sweep ended with holes · 130 interrupted.
"""

import dataclasses
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import tyro
from rich.console import Console

from orchestrator.cli.help import is_asked_for, short_help
from orchestrator.cli.options import Command, Gc, Options, Plan, Report, Retry, Run, Status, Sync, Ui
from orchestrator.cli.session import DEFECT, INTERRUPTED, PIPE_WIDTH, USAGE, Session, open_session
from orchestrator.spec import catalog
from orchestrator.spec.catalog import Profiles
from orchestrator.spec.redaction import RedactingFormatter, redacted
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import FollowUp
from orchestrator.spec.trials import Sweep
from trainers.command import parse, write_any_text
from trainers.errors import SweepError


def main(
    name: str,
    build: Callable[[Selection], Sweep],
    folder: Path,
    arguments: Sequence[str] | None = None,
    *,
    profiles: Profiles | None = None,
    follow_up: FollowUp | None = None,
) -> None:
    """Parse, run, and exit with the contract's code. `folder` is that of the experiment's file.

    `profiles` are the experiment's own `paper` and `laptop`, where they are not the grid's; `follow_up` is what it
    computes of the sweep's results.
    """
    write_any_text()
    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = f"python sweeps/{name}.py"
    if is_asked_for(words):
        print(short_help(Options, get_args(Command), prog, min(Console().width, PIPE_WIDTH)))
        sys.exit(0)
    options = parse(
        Options,
        ["--help" if word == "--help-verbose" else word for word in words],
        prog=prog,
        config=(
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
    )
    sys.exit(execute(options, name, build, folder, profiles or catalog.PROFILES, follow_up))


def execute(
    options: Options,
    name: str,
    build: Callable[[Selection], Sweep],
    folder: Path,
    profiles: Profiles = catalog.PROFILES,
    follow_up: FollowUp | None = None,
) -> int:
    """Run the command; the exit code."""

    def run() -> int:
        session = open_session(options, name, folder)
        return _dispatch(dataclasses.replace(session, profiles=profiles, follow_up=follow_up), build)

    return guarded(run)


def guarded(run: Callable[[], int]) -> int:
    """Return what `run` returns, or the exit code for the error that it raises, which is printed on stderr."""
    errors = Console(stderr=True)
    if logging.lastResort is not None:
        # Libraries that warn where nobody has set up logging.
        logging.lastResort.setFormatter(RedactingFormatter())
    try:
        return run()
    except SweepError as error:
        errors.print(
            f"error: {redacted(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return USAGE
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on where this one stopped")
        return INTERRUPTED
    except Exception:
        log = Path.cwd() / "rmsweep-error.log"
        log.write_text(redacted(traceback.format_exc()), encoding="utf-8")
        errors.print(
            f"rmsweep met a defect; please report it with {log}", style="red", markup=False, highlight=False
        )
        return DEFECT


def _dispatch(session: Session, build: Callable[[Selection], Sweep]) -> int:
    from orchestrator.cli import inspect
    from orchestrator.cli import run as commands

    match session.options.command:
        case Run():
            return commands.run(session, build)
        case Plan():
            return commands.plan_only(session, build)
        case Status(watch=watch):
            return inspect.status(session, watch=watch)
        case Report(compare=compare):
            return commands.report(session, compare)
        case Ui(port=port):
            return inspect.ui(session, port)
        case Sync():
            return inspect.sync(session)
        case Retry():
            return commands.retry(session, build)
        case Gc(keep=keep, delete=delete):
            return inspect.gc(session, keep, delete=delete)
