"""The command line of every file in sweeps/: flags → run, plan, status, report, ui, sync, retry or gc.

Exit codes: 0 every trial is complete · 1 a defect, whose log is named · 2 wrong usage or input, before anything starts ·
3 a trial is missing · 130 interrupted.
"""

import dataclasses
import logging
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tyro
from rich.console import Console

from orchestrator.cli.options import CommonOptions, Gc, Options, Plan, Report, Retry, Run, Status, Sync, Ui
from orchestrator.cli.session import DEFECT, INTERRUPTED, USAGE, Session, by_rmsweep, open_session, set_flags
from orchestrator.cli.terminal import say
from orchestrator.spec import catalog
from orchestrator.spec.catalog import Profiles
from orchestrator.spec.redaction import RedactingFormatter, redacted
from orchestrator.spec.selection import Selection
from orchestrator.spec.stages import FollowUp
from orchestrator.spec.trials import Sweep
from trainers.command import for_any_reader, parse, write_any_text
from trainers.errors import SpecError, SweepError

# The flags that commands which run no grid read, besides --json. The command at the foot of a report has --profile, too.
_READS: dict[type, tuple[str, ...]] = {
    Status: ("name", "storage"),
    Report: ("name", "storage", "tracking_uri", "profile"),
    Sync: ("name", "storage", "tracking_uri"),
    Ui: ("name", "storage", "tracking_uri"),
    Gc: ("storage",),
}


class Experiment(Protocol):
    """What a file in sweeps/ declares: a Grid, or Analyses (analyses.py)."""

    @property
    def options(self) -> type[Any]:
        """The flags, as a dataclass that inherits from CommonOptions."""

    def run(self, options: Any, session: Session) -> int:
        """Run the command that the flags name, and return its exit code."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An experiment of trainings and evaluations.

    `profiles` are its own `paper` and `laptop`, unless they are the paper's grid's; `follow_up` declares analyses of its
    trained models and scores.
    """

    build: Callable[[Selection], Sweep]
    profiles: Profiles = dataclasses.field(default_factory=lambda: catalog.PROFILES)
    follow_up: FollowUp | None = None
    options: type[Options] = Options

    def run(self, options: Options, session: Session) -> int:
        """Run the command and return its exit code."""
        from orchestrator.cli import inspect
        from orchestrator.cli import run as commands

        session = dataclasses.replace(session, profiles=self.profiles, follow_up=self.follow_up)
        match options.command:
            case Plan():
                commands.plan_only(session, self.build)
                return 0
            case Status(watch=watch, paths=paths):
                return inspect.status(session, watch=watch, paths=paths)
            case Report() as command:
                return inspect.report(session, command)
            case Sync():
                return inspect.sync(session)
            case Retry():
                return commands.run(session, self.build, again=True)
        return commands.run(session, self.build)


def main(
    experiment: Experiment, file: str | Path, doc: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line, run the command, and exit with the contract's code.

    `file` is the experiment's: its name is that of the sweep. `doc`, the file's docstring, opens the help.
    """
    write_any_text()
    called = f"python sweeps/{Path(file).name}"
    if by_rmsweep():
        called = f"rmsweep {Path(file).stem}"
        doc = doc and re.sub(r"python sweeps/(\w+)\.py", r"rmsweep \1", doc)
    config = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    with for_any_reader():
        options = parse(
            experiment.options,
            sys.argv[1:] if arguments is None else arguments,
            prog=called,
            description=doc and _opening(doc),
            config=config,
        )
        code = execute(experiment, options, Path(file))
    sys.exit(code)


def _opening(doc: str) -> str:
    """Return a docstring for the top of the help: prose wrapped to the terminal, tables and examples line by line.

    tyro joins lines unless they start with a space.
    """
    width = shutil.get_terminal_size().columns - 2
    paragraphs = [
        part if re.search("^(?: |python |rmsweep )", part, re.MULTILINE) else textwrap.fill(part, width)
        for part in doc.strip().split("\n\n")
    ]
    return textwrap.indent("\n\n".join(paragraphs), "  ")


def execute(experiment: Experiment, options: CommonOptions, file: Path) -> int:
    """Run the command, and return its exit code; an error is printed on stderr."""
    from orchestrator.cli import inspect

    errors = Console(stderr=True)
    if logging.lastResort is not None:
        # It prints warnings of libraries while logging is not set up.
        logging.lastResort.setFormatter(RedactingFormatter())
    try:
        _refuse_ignored(options)
        session = open_session(options, file.stem, file.parent)
        match options.command:
            case Ui(port=port):
                return inspect.ui(session, port)
            case Gc() as command:
                return inspect.gc(session, command)
            case _:
                return experiment.run(options, session)
    except SweepError as error:
        say(errors, f"error: {redacted(str(error))}", style="red")
        return USAGE
    except KeyboardInterrupt:
        ran = isinstance(options.command, Run | Retry)
        say(errors, f"interrupted{'; the same command goes on where this one stopped' if ran else ''}")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception:
        log = Path.cwd() / "rmsweep-error.log"
        log.write_text(redacted(traceback.format_exc()), encoding="utf-8")
        say(errors, f"this is a defect of rmsweep; please report it with {log}", style="red")
        return DEFECT


def _refuse_ignored(options: CommonOptions) -> None:
    """Refuse flags that the command does not read. Raises SpecError."""
    verb, read = type(options.command).__name__.lower(), _READS.get(type(options.command))
    if options.json and not isinstance(options.command, Plan | Status | Report | Gc):
        raise SpecError(f"--json: {verb} prints no JSON; plan, status, report and gc do.")
    if read is None or (isinstance(options.command, Report | Sync) and not isinstance(options, Options)):
        # The flags of an analysis name its artifact.
        return
    if ignored := set_flags(options, besides=("command", "json", *read)):
        whole = "all sweeps in the storage" if verb == "gc" else "the whole sweep as it was declared"
        raise SpecError(
            f"{', '.join(ignored)}: {verb} reads {whole}; leave out these flags, which it ignores."
        )
