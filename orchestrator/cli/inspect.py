"""The commands that train nothing: status, report, ui, sync and gc."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchestrator.cli.analyses import show_analyses
from orchestrator.cli.options import Gc, Options, Report
from orchestrator.cli.session import HOLES, Session, dump_json, require_price, shell_words
from orchestrator.cli.terminal import fitting, late_bar, progress_cells, quiet, said_left
from orchestrator.report.by_axis import axes_of
from orchestrator.report.page import HTML, said_conclusions, write_full_report
from orchestrator.report.results import TrialState, trial_states, with_scores
from orchestrator.report.summary import Written, accuracy_table, ensemble_table
from orchestrator.report.tables import Table as ReportTable
from orchestrator.report.two_sweeps import other_sweep, write_comparison
from orchestrator.run.failures import is_final
from orchestrator.spec.redaction import shown_uri
from orchestrator.store.gc import damage, garbage, kept_artifacts, remove
from orchestrator.store.leases import live_drivers
from orchestrator.store.records import TrialNote, read_state
from orchestrator.tracking.database import EXPERIMENT, SHARED_VIEW, open_database, shared_view_tag
from orchestrator.tracking.mlflow import sync as rebuild_view
from orchestrator.tracking.view import weights_place
from trainers.errors import SpecError

WATCH_EVERY_S = 2.0
UI_STOPPING_S = 10.0
# Flags without a value.
_SWITCHES = [item.name for item in dataclasses.fields(Options) if item.default is False]


def status(session: Session, *, watch: bool = False, paths: bool = False) -> int:
    """Print the state of each trial, from its artifacts and the notes of the running command.

    With `watch`, print it again whenever it changes, until the sweep ends; with `paths`, print also where the weights are.
    """
    shown: list[dict[str, Any]] | None = None
    while True:
        declaration = session.declaration()
        results = trial_states(declaration.trials, session.store)
        holes = {result.record.key for result in results if not result.complete}
        state = read_state(session.sweep_name, session.store)
        running = state.driver in live_drivers(session.store.root)
        if paths:
            session.store.look(weights=[trial.key for trial in declaration.trials])
        rows = [
            _status_row(result, state.trials.get(result.record.key, TrialNote()), running)
            | ({"weights": weights_place(session.store, result.record.key)} if paths else {})
            for result in results
        ]
        if rows != shown:
            names = {trial.key: trial.name for trial in declaration.trials}
            notes = {key: note for key, note in state.trials.items() if key in names}
            said = f"running{said_left(notes, names)}" if running else "not running"
            _show_status(session, rows, said, clear=watch)
            shown = rows
        if running and watch:
            time.sleep(WATCH_EVERY_S)
            continue
        if running or session.options.json:
            return HOLES if holes else 0
        # The table has named every cause.
        return _say_ways_on(session, holes)


def _show_status(session: Session, rows: Sequence[dict[str, Any]], running: str, *, clear: bool) -> None:
    if session.options.json:
        dump_json(rows)
        return
    if clear and session.console.is_terminal:
        session.console.clear()
    title = f"{session.sweep_name} in {session.store.root}: {running}"
    table = Table(title=escape(title), title_justify="left")
    # A column without a value is left out.
    named = [name for name in (rows[0] if rows else ()) if name != "weights"]
    columns = [name for name in named if any(row[name] not in ("", 0) for row in rows)]
    for column in columns:
        table.add_column(column, style="red" if column == "cause" else None)
    for row in rows:
        table.add_row(*(escape(str(row[column])) for column in columns))
    session.console.print(fitting(table, session.console))
    # A table would break a path in the middle.
    session.say(*(f"weights of {row['trial']}: {row['weights']}" for row in rows if "weights" in row))


def _status_row(result: TrialState, note: TrialNote, running: bool) -> dict[str, Any]:
    state, cause = state_and_cause(result, note, running)
    stage, step, loss, rate = progress_cells(note) if state == "running" else ("",) * 4
    return {
        "trial": result.record.name,
        "state": state,
        "stage": f"{stage} {step}".strip(),
        "loss": loss,
        "pairs/s": rate,
        "trained": result.trained,
        "evaluations": f"{len(result.evaluations)}/{len(result.record.evaluations)}",
        "retries": len(note.retries),
        "cause": cause,
    }


def state_and_cause(result: TrialState, note: TrialNote, running: bool) -> tuple[str, str]:
    """Return a trial's state and the cause: why it is incomplete or, while it runs, why it was retried."""
    if result.complete:
        return "complete", ""
    runs = running and note.state == "running"
    before = "" if runs else note.message
    cause = before or "; ".join(result.faults) or "; ".join(note.retries[-1:])
    return ("running" if runs else "failed" if note.state == "failed" else "missing"), cause


def say_holes(session: Session, results: Sequence[TrialState], *, told: Collection[str] = ()) -> int:
    """Print each missing trial with its cause, and the commands that run it; return the exit code.

    The failures of the trials `told` were printed before.
    """
    state = read_state(session.sweep_name, session.store)
    holes = {result.record.key: result for result in results if not result.complete}
    for key, result in holes.items():
        note = state.trials.get(key, TrialNote())
        cause = note.message or "; ".join(result.faults) or "not run"
        if note.state == "failed" and key in told:
            cause = "it failed, see above"
        session.say(f"missing: {result.record.name}: {cause}", style="red")
    return _say_ways_on(session, holes)


def _say_ways_on(session: Session, holes: Collection[str]) -> int:
    """Print the commands that run the missing trials, given by key, and return the exit code."""
    if not holes:
        return 0
    state = read_state(session.sweep_name, session.store)
    causes = {key: note.cause for key, note in state.trials.items() if key in holes and note.cause}
    runs = any(not is_final(causes.get(key, "")) for key in holes)
    again = "to run what is missing, give the same command again; " if runs else ""
    session.say(f"{again}logs: {session.driver_log.parent}")
    if state.command and causes:
        # The command is replaced; the same word may also be a flag's value.
        words = [
            word
            for before, word in itertools.pairwise(state.command)
            if word not in ("run", "retry")
            or (before.startswith("--") and before[2:].replace("-", "_") not in _SWITCHES)
        ]
        retry = shlex.join([*shell_words(state.command[0]), "retry", *words])
        session.say(f"to run the failed trials again: {retry}")
    return HOLES


def report(session: Session, command: Report) -> int:
    """Write and print the report of the declared sweep, and the comparison with another sweep."""
    declaration, store = session.declaration(), session.store
    bar, by = functools.partial(late_bar, session.console), command.by
    if by and command.ensemble:
        raise SpecError("--by and --ensemble print another table each; give one of them.")
    other = None if command.compare is None else other_sweep(command.compare, store)
    axes = axes_of(declaration.trials)
    require_price(command.price)
    if by is not None and by not in axes:
        raise SpecError(f"--by {by}: the sweep does not vary it; it varies {', '.join(axes) or 'no axis'}.")
    written = write_full_report(
        declaration, store, bar, anew=True, baseline=command.baseline, price=command.price
    )
    beside = other and write_comparison(declaration, store, *other)
    asked = next((table for table in written.tables if table.name == f"by_{by}"), None)
    if command.ensemble:
        asked = ensemble_table(with_scores(written.results, store))
    if session.options.json:
        rows = asked.records() if asked else [] if by else written.tables[0].records()
        dump_json({"rows": rows, "comparison": beside.table.records()} if beside else rows)
        return 0
    if (by or command.ensemble) and not (asked and asked.rows):
        lacks = "two complete seeds above chance" if command.ensemble else "complete trials at two values"
        flag, asked = f"--by {by}" if by else "--ensemble", None
        session.warn(f"{flag}: no model and reward type has {lacks}; these are all accuracies")
    print_report(session, written, asked)
    show_analyses(session, declaration)
    if beside:
        if beside.table.rows:
            session.console.print(fitting(accuracy_table(beside.table).terminal(), session.console))
        session.say(*beside.conclusions, f"comparison: {beside.file}")
    return say_holes(session, written.results)


def print_report(session: Session, written: Written, asked: ReportTable | None = None) -> None:
    """Print the report's tables, or only the one that was `asked` for, its conclusions, and where to see more."""
    console = session.console
    accuracy = accuracy_table(written.tables[0])
    if asked:
        session.say(asked.note)
        # The column that says what an interval is over stands only in the file, which has room.
        accuracy = dataclasses.replace(asked, columns=asked.columns.removesuffix(" over"))
    console.print(fitting(accuracy.terminal(), console))
    session.warn(*written.left_out)
    session.say(*said_conclusions(written.folder))
    session.say(f"report: {written.folder / HTML}")
    if session.command:
        options = session.options
        words = [*shell_words(session.command[0]), "ui", "--storage", str(session.store.root)]
        words += ["--tracking-uri", shown_uri(options.tracking_uri)] if options.tracking_uri else []
        words += ["--name", options.name] if options.name else []
        session.say(f"MLflow: {shlex.join(words)}")


def ui(session: Session, port: int) -> int:
    """Run MLflow's server for this machine until it is stopped. Raises SpecError where the port is taken."""
    if session.tracking_uri.startswith("http"):
        session.say(f"the runs are on {shown_uri(session.tracking_uri)}")
        return 0
    _require_free(port)
    with contextlib.suppress(OSError):
        # The server explains better what is wrong with a database.
        open_database(session.tracking_uri)
    address = f"http://127.0.0.1:{port}"
    session.say(f"MLflow on {address} (stop with Ctrl-C)")
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # In the environment, which other users cannot list as they can a command line: the URI may hold a password.
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": session.tracking_uri,
    }
    # SIGTERM ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command, env=environment) as server:
        try:
            for view, page in _pages(address, server, session.sweep_name).items():
                session.say(f"its {view}: {page}")
            return server.wait()
        except BaseException:
            # Asked first: it ends its own workers, which a kill would leave.
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=UI_STOPPING_S)
            server.kill()
            raise


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        # As the server will: a socket that lingers from an earlier one does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise SpecError(f"--port {port} cannot be served ({error}); give another.") from error


def _pages(address: str, server: subprocess.Popen[bytes], sweep: str) -> dict[str, str]:
    """Wait for the server, and return the pages of a sweep's runs and charts, or none if it ends or lacks them."""
    asked = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    while server.poll() is None:
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                found = json.load(answer)["experiment"]
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.2)
            continue
        known = {tag["key"] for tag in found.get("tags", ())}
        pages = {}
        for view, mode in (("runs", "TABLE"), ("charts", "CHART")):
            # Without it MLflow opens pages for chat programs.
            query = {"workflowType": "machine_learning", "compareRunsMode": mode}
            if (tag := shared_view_tag(sweep, view)) in known:
                query["viewStateShareKey"] = tag.removeprefix(SHARED_VIEW)
            pages[view] = (
                f"{address}/#/experiments/{found['experiment_id']}/runs?{urllib.parse.urlencode(query)}"
            )
        return pages
    return {}


def sync(session: Session) -> int:
    declaration = session.declaration()
    say_damaged_logs(session, [trial.key for trial in declaration.trials])
    written = write_full_report(declaration, session.store, functools.partial(late_bar, session.console))
    with quiet(session.driver_log, session.console.width) as terminal, late_bar(terminal, "MLflow") as step:
        seconds = rebuild_view(session.tracking_uri, session.store, declaration, written, step)
    place = shown_uri(session.tracking_uri)
    session.say(f"{len(declaration.trials)} trials in {place}, written in {seconds:.0f} s")
    return 0


def say_damaged_logs(session: Session, keys: Sequence[str]) -> None:
    """Name the damaged logs of complete trainings, which are not trained again for them."""
    session.store.look(train=keys)
    for key in keys:
        error = damage(session.store, "train", key, "log.parquet")
        if error is not None:
            session.warn(f"damaged: {error}; MLflow does not show its curve; weights and scores are sound")


def gc(session: Session, command: Gc) -> int:
    """List what only dropped sweeps or none need; with --delete, remove it. Raises SpecError if a dropped sweep runs."""
    store, delete = session.store, command.delete
    kept = kept_artifacts(store, command.drop, drop_earlier=command.drop_earlier)
    drivers = live_drivers(store.root) if command.drop else ()
    if running := [name for name in command.drop if read_state(name, store).driver in drivers]:
        raise SpecError(f"--drop {' '.join(running)}: it runs now; stop it first.")
    items = garbage(store, kept)
    removed = set(remove(store, items)) if delete else set()
    if session.options.json:
        dump_json([dataclasses.asdict(item) | {"removed": item in removed} for item in items])
        return 0
    if not items:
        session.say(f"nothing to remove in {store.root}")
        return 0
    table = Table(title=escape(f"not needed in {store.root}"), title_justify="left")
    for column in ("what", "GB", "why"):
        table.add_column(column, justify="right" if column == "GB" else "left", overflow="fold")
    for item in items:
        table.add_row(item.path, gigabytes(item.bytes), item.why)
    session.console.print(fitting(table, session.console))
    size = gigabytes(sum(item.bytes for item in (removed if delete else items)))
    if delete:
        session.say(f"{len(removed)} of {len(items)} items removed, {size} GB freed")
    else:
        session.say(f"{len(items)} items, {size} GB; nothing is removed without --delete")
    return 0


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.4f}"
