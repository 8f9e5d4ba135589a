"""What each command does, between the parsed flags and the exit code."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from rich.table import Table

from orchestrator import cli
from orchestrator import plan as planning
from orchestrator.artifacts import replace
from orchestrator.cli import Session
from orchestrator.declaration import declare, read_declaration, write_declaration
from orchestrator.progress import quiet
from orchestrator.redaction import redacted
from orchestrator.report import Written, terminal_table, write_report
from orchestrator.resolve import ResolvedSweep, missing_trials, resolve
from orchestrator.results import TrialResult, sweep_results
from orchestrator.running import Phases, run_missing
from orchestrator.selection import Selection
from orchestrator.spec import Sweep
from orchestrator.stages import TrialPlan
from orchestrator.workers import cluster_address, set_ray_environment
from trainers.errors import PlanError, SweepError

Build = Callable[[Selection], Sweep]


def run(session: Session, build: Build) -> int:
    """Run what is missing, then report."""
    phases = Phases()
    store, console = session.store, session.console
    sweep, capacity = _sweep_and_capacity(session, build)
    planning.require_fit([trial.model for trial in sweep.trials], capacity)
    resolved = _resolve(session, sweep, fetch=True)
    placements = {item.key: planning.place(item.spec, capacity, sweep.placements) for item in resolved.plans}
    declaration = declare(resolved)
    write_declaration(declaration, store)
    todo = missing_trials(resolved.plans, store)
    console.print(_headline(resolved.plans, todo, session), highlight=False)
    phases.end("plan")
    failed: dict[str, str] = {}
    try:
        if todo:
            failed, written = run_missing(session, declaration, todo, placements, phases)
        else:
            written = write_report(declaration, store)
        _print_report(session, written)
    except SweepError as error:
        # The user's own mistakes were refused above; what fails from here on is not one.
        console.print(f"error: {redacted(str(error))}", style="red", markup=False, soft_wrap=True)
        return cli.DEFECT
    phases.end("report")
    if todo:
        replace(store.sweep_dir(session.sweep_name) / "phases.json", json.dumps(phases.seconds, indent=1))
    return _say_holes(session, written.results, failed)


def plan_only(session: Session, build: Build) -> int:
    """Print the trials with their placement and what is missing of each."""
    sweep, capacity = _sweep_and_capacity(session, build)
    resolved = _resolve(session, sweep, fetch=False)
    missing = {item.key: [stage.kind for stage in item.missing(session.store)] for item in resolved.plans}
    rows = []
    for item in resolved.plans:
        placement = planning.place(item.spec, capacity, sweep.placements)
        rows.append(
            {
                "trial": item.spec.name,
                "world_size": placement.world_size,
                "zero_stage": placement.zero_stage,
                "micro_batch": placement.micro_batch,
                "accumulation": placement.accumulation,
                "missing": missing[item.key],
            }
        )
    if session.options.json:
        cli.dump_json(rows)
        return 0
    not_fetched = {item.train.base.name for item in resolved.plans if not item.train.base.fetched}
    for item in resolved.plans:
        prepared = [item.train.prepared, *(stage.prepared for stage in item.evaluations)]
        not_fetched |= {stage.split.name for stage in prepared if not stage.split.fetched}
    table = Table(title=f"{sweep.name}: {len(rows)} trials", title_justify="left")
    for column in ("trial", "processes", "ZeRO", "micro-batch × accumulation", "missing"):
        table.add_column(column)
    for row in rows:
        kinds: list[str] = row["missing"]  # type: ignore[assignment]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "nothing"
        batch = f"{row['micro_batch']} × {row['accumulation']}"
        table.add_row(str(row["trial"]), str(row["world_size"]), str(row["zero_stage"]), batch, counted)
    session.console.print(table)
    if not_fetched:
        session.console.print(f"not fetched: {', '.join(sorted(not_fetched))}", highlight=False)
    try:
        planning.require_fit([trial.model for trial in sweep.trials], capacity)
    except PlanError as error:
        session.console.print(f"does not fit: {error}", style="yellow", markup=False)
    return 0


def status(session: Session) -> int:
    """Print which trials are complete."""
    results = sweep_results(read_declaration(session.sweep_name, session.store), session.store)
    rows = [
        {
            "trial": result.record.name,
            "state": "complete" if result.complete else "missing",
            "trained": result.trained,
            "evaluations": f"{len(result.evaluations)}/{len(result.record.evaluations)}",
        }
        for result in results
    ]
    if session.options.json:
        cli.dump_json(rows)
    else:
        table = Table(title=f"{session.sweep_name} in {session.store.root}", title_justify="left")
        for column in ("trial", "state", "trained", "evaluations"):
            table.add_column(column)
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        session.console.print(table)
    return 0 if all(result.complete for result in results) else cli.HOLES


def report(session: Session) -> int:
    """Write and print the report of what the last command declared."""
    declaration = read_declaration(session.sweep_name, session.store)
    written = write_report(declaration, session.store)
    if session.options.json:
        cli.dump_json([{**dataclasses.asdict(row), "difference": row.difference} for row in written.rows])
        return 0
    _print_report(session, written)
    return _say_holes(session, written.results, {})


def ui(session: Session, port: int) -> int:
    """Run MLflow's server in the foreground, on loopback."""
    if session.tracking_uri.startswith("http"):
        session.console.print(f"the runs are on {redacted(session.tracking_uri)}")
        return 0
    session.console.print(f"MLflow on http://127.0.0.1:{port} (stop with Ctrl-C)")
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # In the environment, which other users cannot list as they can a command line: the URI may hold a password.
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": session.tracking_uri,
    }
    return subprocess.run(command, env=environment, check=False).returncode


def sync(session: Session) -> int:
    """Rebuild the MLflow view."""
    from orchestrator import tracking

    declaration = read_declaration(session.sweep_name, session.store)
    folder = write_report(declaration, session.store).folder
    with quiet(session.driver_log):
        seconds = tracking.sync(session.tracking_uri, session.store, declaration, folder)
    session.console.print(
        f"{len(declaration.trials)} trials in {redacted(session.tracking_uri)} after {seconds:.0f} s"
    )
    return 0


def _capacity(session: Session) -> tuple[planning.Node, ...]:
    """The running cluster where there is one, which is joined, else this machine."""
    if session.options.backend == "ray" and cluster_address() is not None:
        set_ray_environment()
        from orchestrator import cluster

        with quiet(session.driver_log):
            if cluster.join_ray():
                nodes = cluster.capacity()
                if isinstance(session.options.command, cli.Run):
                    cluster.require_shared_storage(session.store, nodes)
                return nodes
    return planning.local_capacity()


def _sweep_and_capacity(session: Session, build: Build) -> tuple[Sweep, tuple[planning.Node, ...]]:
    """The sweep, and what it would run on; where words can be judged without a cluster, they are judged first."""
    if session.options.profile != "auto":
        return _sweep(session, build, ()), _capacity(session)
    capacity = _capacity(session)
    return _sweep(session, build, capacity), capacity


def _sweep(session: Session, build: Build, capacity: Sequence[planning.Node]) -> Sweep:
    profile, why = cli.profile_for(session.options, capacity)
    if why and not session.options.json and not (session.options.models and session.options.train_sets):
        session.console.print(why, highlight=False)
    return build(cli.select(session.options, profile, session.sweep_name))


def _resolve(session: Session, sweep: Sweep, *, fetch: bool) -> ResolvedSweep:
    return resolve(
        sweep,
        session.store,
        fetch=fetch,
        allow_overlap=session.options.allow_overlap,
        lock=session.folder / "revisions.lock.json",
    )


def _headline(plans: Sequence[TrialPlan], todo: Sequence[TrialPlan], session: Session) -> str:
    if not todo:
        return f"all {len(plans)} trials are complete in {session.store.root}; nothing to run"
    stages = {(stage.kind, stage.key) for item in todo for stage in item.missing(session.store)}
    kinds = [kind for kind, _ in sorted(stages)]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(plans)} trials, {len(plans) - len(todo)} complete; to run: {counted}"


def _print_report(session: Session, written: Written) -> None:
    session.console.print(terminal_table(written.rows))
    session.console.print(f"report: {written.folder / 'summary.md'}", highlight=False, soft_wrap=True)
    session.console.print(f"MLflow: {_ui_command(session)}", highlight=False, soft_wrap=True)


def _ui_command(session: Session) -> str:
    options = session.options
    words = [os.path.relpath(sys.executable), sys.argv[0], "ui", "--storage", str(session.store.root)]
    words += ["--tracking-uri", redacted(session.tracking_uri)] if options.tracking_uri else []
    words += ["--name", options.name] if options.name else []
    return shlex.join(words)


def _say_holes(session: Session, results: Sequence[TrialResult], failed: dict[str, str]) -> int:
    holes = [result.record for result in results if not result.complete]
    for record in holes:
        cause = failed.get(record.key, "not run")
        session.console.print(f"missing: {record.name}: {cause}", style="red", markup=False, soft_wrap=True)
    if holes:
        logs = session.driver_log.parent
        session.console.print(
            f"the same command runs them again; logs: {logs}", soft_wrap=True, highlight=False
        )
    return cli.HOLES if holes else 0
