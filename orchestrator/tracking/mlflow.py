"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, written from artifacts and live rows.

While a sweep runs, one thread of its driver logs what is new. The end of the run, the next command and `sync` log whatever a
server did not accept: <storage>/sweeps/<sweep>/mlflow.sha256 is the mark of the last complete view.
"""

import contextlib
import logging
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from orchestrator.report.results import CURVE_POINTS, CURVES, TrialState, thinned, trial_states
from orchestrator.report.summary import Written
from orchestrator.spec.redaction import shown_uri, without_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import live_drivers
from orchestrator.store.records import Declaration, read_state
from orchestrator.tracking.view import Rows, View, as_hash, report_mark, run_names, trial_mark, weights_place
from trainers.errors import StorageError, SweepError, TrackingError
from trainers.storage import replace

SHOWN = "mlflow.sha256"

logger = logging.getLogger(__name__)

Step = Callable[[int, int], None]


def is_shown(uri: str, store: Store, sweep: str, results: Sequence[TrialState]) -> bool:
    """Whether the view at `uri` is complete and up to date."""
    try:
        return (store.sweep_dir(sweep) / SHOWN).read_text() == view_mark(uri, store, sweep, results)
    except (OSError, ValueError):
        return False


def view_mark(uri: str, store: Store, sweep: str, results: Sequence[TrialState]) -> str:
    """Return a hash of everything that the view shows of the trials and of the report."""
    statuses, names = _statuses(sweep, store), run_names([item.record for item in results])
    store.look(weights=list(names))
    marks = [
        trial_mark(item, statuses[key], names[key], weights_place(store, key))
        for item in results
        for key in (item.record.key,)
    ]
    return as_hash([shown_uri(uri), marks, report_mark(store.local_sweep_dir(sweep) / "report")])


def _statuses(sweep: str, store: Store) -> Mapping[str, str]:
    """Return by key the status of trials that are not complete."""
    notes = read_state(sweep, store).trials.items()
    return defaultdict(lambda: "RUNNING", {key: "FAILED" for key, note in notes if note.state == "failed"})


def _log_sweep(
    uri: str, store: Store, declaration: Declaration, written: Written, status: str, step: Step
) -> None:
    """Log what the view lacks of any trial, and the report. `step` is called with (done, total) trials."""
    sweep, results = declaration.sweep, written.results
    statuses = _statuses(sweep, store)
    started = min((item.started for item in results if item.started), default=None)
    # The end of the last stage, so that a later sync does not change the sweep's duration.
    ended = max((item.finished for item in results if item.finished), default=None)
    view = View(uri, store, sweep, started, run_names(declaration.trials))
    for done, result in enumerate(results, 1):
        view.log_trial(result, statuses[result.record.key])
        step(done, len(results))
    view.log_report(written.folder, status, ended)
    # If the disk is full, the next command compares again.
    with contextlib.suppress(OSError, StorageError):
        replace(store.sweep_dir(sweep) / SHOWN, view_mark(uri, store, sweep, results))


def sync(
    uri: str,
    store: Store,
    declaration: Declaration,
    written: Written,
    step: Step = lambda done, total: None,
) -> float:
    """Rebuild the view from the artifacts, as the report has read them; return the seconds taken. Raises TrackingError.

    `step` is called with (done, total) trials.
    """
    began = time.perf_counter()
    at_work = read_state(declaration.sweep, store).driver in live_drivers(store.root)
    status = "FINISHED" if written.complete else "RUNNING" if at_work else "FAILED"
    from mlflow.exceptions import MlflowException

    try:
        _log_sweep(uri, store, declaration, written, status, step)
    except (MlflowException, OSError) as error:
        first = without_credentials(_cause(error), uri)
        raise TrackingError(
            f"MLflow at {shown_uri(uri)} cannot be written to ({first.rstrip('.')}); check --tracking-uri."
        ) from error
    return time.perf_counter() - began


# News of a trial to log: its new status, or "", and rows of its training by step.
_News = tuple[str, Mapping[int, Mapping[str, Any]]]


class Tracker:
    """The only writer of a running sweep: a thread that logs what is new every `every_s`. Calls return at once.

    Failed requests are reported once and tried again after `again_s` and by `close`.
    """

    def __init__(
        self, uri: str, store: Store, declaration: Declaration, *, every_s: float = 3.0, again_s: float = 60.0
    ) -> None:
        self._uri, self._store, self._declaration = uri, store, declaration
        self._every_s, self._again_s = every_s, again_s
        self._trials = {trial.key: trial for trial in declaration.trials}
        self._news: dict[str, _News] = {}
        self._report: tuple[Written, bool] | None = None
        self._view: View | None = None
        self._trouble: str | None = None
        self._closing = self._abandoned = False
        # Until the end the view is incomplete, however this process ends.
        with contextlib.suppress(OSError, StorageError):
            (store.sweep_dir(declaration.sweep) / SHOWN).unlink(missing_ok=True)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    def shows(self, key: str) -> bool:
        """Whether the trial belongs to the sweep, so that it has a run."""
        return key in self._trials

    def started(self, key: str) -> None:
        self._note(key, "RUNNING")

    def rows(self, key: str, rows: Rows) -> None:
        """Note steps of a trial's training; other rows are in no curve."""
        steps = [dict(row) for row in rows if {"step", "time", "total", *CURVES} <= row.keys()]
        if shown := thinned(steps, int(steps[-1]["total"]), CURVE_POINTS) if steps else ():
            self._note(key, rows={int(row["step"]): row for row in shown})

    def ended(self, key: str, *, failed: bool) -> None:
        self._note(key, "FAILED" if failed else "RUNNING")

    def close(
        self, written: Written | None = None, *, complete: bool = False, timeout_s: float = 120.0
    ) -> str | None:
        """Try once more, for at most `timeout_s`; with a report, complete the view. Return why the view is incomplete, if it is."""
        with self._changed:
            self._closing = True
            self._report = None if written is None else (written, complete)
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandoned = True
            return f"{shown_uri(self._uri)} did not take everything within {timeout_s:.0f} s"
        return self._trouble if self._news or self._report else None

    def _note(self, key: str, status: str = "", rows: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        with self._changed:
            # Keep what is not logged yet: the last status, and the first row of a step that a resumed training repeats.
            old_status, old_rows = self._news.get(key, ("", {}))
            self._news[key] = (status or old_status, {**(rows or {}), **old_rows})
            self._changed.notify()

    def _write(self) -> None:
        pause = self._every_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._closing)
                self._changed.wait_for(lambda: self._closing, pause)
                last = self._closing
            pause = self._every_s if self._log_all() else self._again_s
            if last:
                return

    def _log_all(self) -> bool:
        """Try once to log all news, then the report; return whether everything succeeded."""
        with self._changed:
            news = [*self._news.items()]
        steps = [partial(self._tell, key, item) for key, item in news]
        if self._report is not None:
            steps.append(partial(self._finish, *self._report))
        well = True
        for step in steps:
            if self._abandoned:
                return False
            try:
                step()
            except Exception as error:
                opened, well = self._view is not None, False
                self._failed(error)
                # A server that cannot be reached is not asked again for every trial.
                if not opened:
                    break
        return well

    def _tell(self, key: str, news: _News) -> None:
        if self._view is None:
            view = View(
                self._uri, self._store, self._declaration.sweep, None, run_names(self._declaration.trials)
            )
            view.begin()
            self._view = view
        status, rows = news[0], list(news[1].values())
        if status or not self._view.log_rows(key, rows):
            self._view.log_trial(trial_states([self._trials[key]], self._store)[0], status or "RUNNING", rows)
        with self._changed:
            # Newer news stays to be logged.
            if self._news[key] is news:
                del self._news[key]

    def _finish(self, written: Written, complete: bool) -> None:
        # A new view reads what earlier requests have left.
        status = "FINISHED" if complete else "FAILED"
        _log_sweep(self._uri, self._store, self._declaration, written, status, lambda done, total: None)
        self._report = None

    def _failed(self, error: Exception) -> None:
        self._view = None
        if self._trouble is None:
            details = without_credentials("".join(traceback.format_exception(error)), self._uri)
            logger.error("MLflow at %s, to be tried again: %s", shown_uri(self._uri), details)
        self._trouble = without_credentials(f"{self._uri}: {_cause(error)}", self._uri)


def _cause(error: Exception) -> str:
    """Return one line: the operating system's error if there is one, which MLflow wraps in three layers, else this error."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    from_system = [item for item in chain if isinstance(item, OSError)]
    told = error if isinstance(error, SweepError) or not from_system else from_system[-1]
    return f"{type(told).__name__}: {(str(told).splitlines() or [''])[0]}"
