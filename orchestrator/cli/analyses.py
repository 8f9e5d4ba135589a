"""Experiments that train no grid, and what is computed of a grid that is trained (follow_up.py): parameters, and models and pairs where they need some → one artifact of kind `analyse`.

    python sweeps/theory.py                 compute what is missing, and print its summary
    python sweeps/theory.py plan | report | ui | sync | gc

The artifact's key is made of everything that can change it, so that nothing is computed twice. It holds results.json,
tables as parquet, figures as PNG and SVG, and summary.md; the report of <storage>/sweeps/<name>/ is a copy, which MLflow
shows as well. Analyses run in this process, without Ray.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from orchestrator.cli.follow_up import SUMMARY, compute_missing
from orchestrator.cli.main import guarded
from orchestrator.cli.options import Gc, Plan, Report, Run, Sync, Ui
from orchestrator.cli.options import Options as SweepOptions
from orchestrator.cli.session import HOLES, Session, dump_json, open_session
from orchestrator.cli.terminal import quiet
from orchestrator.report.comparison import Analysis
from orchestrator.report.results import scored
from orchestrator.report.summary import Written
from orchestrator.spec.declaration import adopt, adopted
from orchestrator.spec.stages import AnalyseStage, Compute, PrepareStage
from orchestrator.store.records import Declaration
from trainers.command import parse

Command = Run | Plan | Report | Ui | Sync | Gc


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What every analysis takes; an experiment adds its own flags."""

    command: Command = field(default_factory=Run)
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The report's name (default: the file's)."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where artifacts are kept (default: $RMSWEEP_STORAGE or ./rmsweep-store)."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """MLflow (default: $MLFLOW_TRACKING_URI or <storage>/mlflow.db)."""
    json: bool = False
    """Machine-readable output of plan, report and gc."""


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(AnalysisOptions):
    """What every analysis of a sweep's scores takes."""

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full_grid"
    """The sweep in the same storage whose scores are read."""


Options = TypeVar("Options", bound=AnalysisOptions)
Declare = Callable[[Options, Session], Sequence[AnalyseStage]]


def main(
    options_type: type[Options],
    name: str,
    declare: Declare[Options],
    compute: Compute,
    folder: Path,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse, run, and exit with the contract's code. `folder` is that of the experiment's file."""
    options = parse(
        options_type,
        sys.argv[1:] if arguments is None else arguments,
        prog=f"python sweeps/{name}.py",
        config=(
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
    )
    sys.exit(guarded(lambda: _dispatch(options, name, declare, compute, folder)))


def _dispatch(options: Options, name: str, declare: Declare[Options], compute: Compute, folder: Path) -> int:
    from orchestrator.cli import inspect

    shared = SweepOptions(
        command=options.command,
        name=options.name,
        storage=options.storage,
        tracking_uri=options.tracking_uri,
        json=options.json,
        backend="inline",
    )
    session = open_session(shared, name, folder)
    match options.command:
        case Ui(port=port):
            return inspect.ui(session, port)
        case Gc(keep=keep, delete=delete):
            return inspect.gc(session, keep, delete=delete)
    stages = declare(options, session)
    if isinstance(options.command, Plan):
        return _plan(session, stages)
    declaration = _declaration(session, stages)
    match options.command:
        case Report():
            adopted(declaration, session.store)
            return _report(session, stages)
        case Sync():
            adopted(declaration, session.store)
            _show_in_mlflow(session, stages)
            return 0
    adopt(declaration, session.store)
    return _run(session, stages, compute)


def _run(session: Session, stages: Sequence[AnalyseStage], compute: Compute) -> int:
    missing = [stage for stage in stages if not session.store.complete(stage.kind, stage.key)]
    said = f"{len(stages)} analyses, {len(stages) - len(missing)} complete"
    session.console.print(said, highlight=False)
    if missing:
        compute_missing(session, missing, compute)
    code = _report(session, stages)
    if missing:
        _show_in_mlflow(session, stages)
    return code


def _plan(session: Session, stages: Sequence[AnalyseStage]) -> int:
    rows = []
    for stage in stages:
        wanted = [*((need.kind, need.key) for need in stage.needs), (stage.kind, stage.key)]
        missing = [kind for kind, key in wanted if not session.store.complete(kind, key)]
        if session.store.complete(stage.kind, stage.key):
            missing = []
        rows.append({"analysis": stage.label, "key": stage.key, "missing": missing})
    if session.options.json:
        dump_json(rows)
        return 0
    for row in rows:
        missing_text = ", ".join(row["missing"]) or "nothing"
        session.console.print(f"{row['analysis']}  {row['key']}  missing: {missing_text}", highlight=False)
    return 0


def _report(session: Session, stages: Sequence[AnalyseStage]) -> int:
    """Copy what is there into the report's folder, and print the summaries."""
    store = session.store
    folder = store.local_sweep_dir(session.sweep_name) / "report"
    complete = [stage for stage in stages if store.complete(stage.kind, stage.key)]
    shutil.rmtree(folder, ignore_errors=True)
    results = []
    for stage in complete:
        found = store.read(stage.kind, stage.key)
        target = folder / _part(stage, stages)
        shutil.copytree(found, target, dirs_exist_ok=True)
        results.append({"analysis": stage.label, "key": stage.key, **_json(found / "results.json")})
        if not session.options.json:
            session.console.print(
                (found / SUMMARY).read_text(), markup=False, highlight=False, soft_wrap=True
            )
            session.console.print(f"artifact: analyse/{stage.key}", highlight=False, soft_wrap=True)
    if complete:
        store.share(folder)
    if session.options.json:
        dump_json(results)
    else:
        session.console.print(f"report: {folder}", highlight=False, soft_wrap=True)
    holes = len(complete) < len(stages) or any(result.get("holes") for result in results)
    return HOLES if holes else 0


def _part(stage: AnalyseStage, stages: Sequence[AnalyseStage]) -> str:
    """One analysis is the report; of several each has a folder, by its model or by what tells it from its like."""
    if len(stages) == 1:
        return ""
    if stage.base is None:
        names = [item.analysis for item in stages]
        return stage.analysis if names.count(stage.analysis) == 1 else stage.key
    name = stage.base.name
    alike = [item for item in stages if item.base and item.base.name == name]
    return name if len(alike) < 2 else f"{name}-{stage.analysis}"


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _declaration(session: Session, stages: Sequence[AnalyseStage]) -> Declaration:
    """No trials; the artifacts that gc must not take."""
    named = set()
    for stage in stages:
        waiting: list[Any] = [stage]
        while waiting:
            item = waiting.pop()
            named.add(f"{item.kind}/{item.key}")
            if isinstance(item, PrepareStage):
                named.add(f"dataset/{item.split.digest}")
            waiting += item.needs
    return Declaration(sweep=session.sweep_name, trials=(), artifacts=tuple(sorted(named)))


def _show_in_mlflow(session: Session, stages: Sequence[AnalyseStage]) -> None:
    """The report on one run of the sweep's name."""
    from orchestrator.tracking.mlflow import Tracker

    folder = session.store.local_sweep_dir(session.sweep_name) / "report"
    with quiet(session.driver_log, session.console.width):
        tracker = Tracker(session.tracking_uri, session.store, _declaration(session, stages))
        complete = all(session.store.complete(stage.kind, stage.key) for stage in stages)
        trouble = tracker.close(Written(folder=folder, results=[], analysis=Analysis([])), complete=complete)
    if trouble:
        session.console.print(
            f"warning: the MLflow view is incomplete ({trouble}); `sync` completes it",
            style="yellow",
            markup=False,
        )


def declare_scored(
    options: ScoredOptions, session: Session, *, analysis: str, version: int
) -> Sequence[AnalyseStage]:
    """One analysis of the sweep's complete trials. Raises SpecError where there is none."""
    parameters = scored(session.store, options.sweep)
    return [AnalyseStage(analysis=analysis, version=version, parameters=parameters)]
