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
from typing import Any

from orchestrator.report.results import CURVE_POINTS, CURVES, thinned, trial_states
from orchestrator.report.summary import Written
from orchestrator.spec.redaction import shown_uri, without_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.leases import live_drivers
from orchestrator.store.records import Declaration, read_state
from orchestrator.tracking.view import VERSION, Rows, View, as_hash
from trainers.errors import StorageError, TrackingError
from trainers.storage import digest_file, files_below, replace

SHOWN = "mlflow.sha256"

logger = logging.getLogger(__name__)


def is_shown(uri: str, store: Store, sweep: str) -> bool:
    """Whether the view at `uri` was completed, and shows the report that is there now."""
    try:
        return (store.sweep_dir(sweep) / SHOWN).read_text() == view_mark(uri, store, sweep)
    except (OSError, ValueError):
        return False


def forget_shown(store: Store, sweep: str) -> None:
    """Have the next command compare the view with the artifacts."""
    with contextlib.suppress(OSError, StorageError):
        (store.sweep_dir(sweep) / SHOWN).unlink(missing_ok=True)


def view_mark(uri: str, store: Store, sweep: str) -> str:
    """Return a hash of where the view is and of every file of the report, which changes with any result or failure."""
    folder = store.local_sweep_dir(sweep) / "report"
    files = [(name, digest_file(folder / name)) for name in files_below(folder)]
    return as_hash([VERSION, shown_uri(uri), files])


def _log_sweep(
    uri: str,
    store: Store,
    declaration: Declaration,
    written: Written,
    status: str,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Log what the view lacks of any trial, and the report. `step` is called with (done, total) trials."""
    mark, results = "", written.results
    # Of the report as it is now: another command may write the next one meanwhile, and then this view is owed again.
    with contextlib.suppress(OSError):
        mark = view_mark(uri, store, declaration.sweep)
    started = min((item.started for item in results if item.started), default=None)
    # The end of the last stage, so that a later sync does not change the sweep's duration.
    ended = max((item.finished for item in results if item.finished), default=None)
    view = View(uri, store, declaration, started)
    failed = failed_trials(declaration.sweep, store)
    for done, result in enumerate(results, 1):
        view.log_trial(result, failed=result.record.key in failed)
        step(done, len(results))
    view.log_report(written.folder, status, ended)
    # If the disk is full, the next command compares again.
    with contextlib.suppress(OSError, StorageError):
        replace(store.sweep_dir(declaration.sweep) / SHOWN, mark)


def failed_trials(sweep: str, store: Store) -> set[str]:
    return {key for key, note in read_state(sweep, store).trials.items() if note.state == "failed"}


def sync(
    uri: str,
    store: Store,
    declaration: Declaration,
    written: Written,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Rebuild the view from the artifacts, as the report has read them; return the seconds taken. Raises TrackingError."""
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


class Tracker:
    """The only writer of a running sweep: a thread that logs what is new every `every_s`. `note` returns at once.

    A server that fails is warned of once, and tried again after `again_s` and by `close`.
    """

    def __init__(
        self, uri: str, store: Store, declaration: Declaration, *, every_s: float = 3.0, again_s: float = 60.0
    ) -> None:
        self._uri, self._store, self._declaration = uri, store, declaration
        self._trials = {trial.key: trial for trial in declaration.trials}
        # Trials whose runs have to change, each with steps of its training, if it is these that are new.
        self._news: list[tuple[str, Rows]] = []
        self._report: tuple[Written, str] | None = None
        self._view: View | None = None
        self._trouble: str | None = None
        # Until the end the view is incomplete, however this process ends.
        forget_shown(store, declaration.sweep)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._write, args=(every_s, again_s), name="mlflow-writer", daemon=True
        )
        self._thread.start()

    def note(self, key: str, rows: Rows = ()) -> None:
        """Have the run of a trial get these steps of its training, or without rows whatever the trial has become."""
        steps = [dict(row) for row in rows if {"step", "time", "total", *CURVES} <= row.keys()]
        shown = thinned(steps, int(steps[-1]["total"]), CURVE_POINTS) if steps else []
        # A trial of another sweep has no run; other rows are in no curve.
        if key in self._trials and (shown or not rows):
            self._news.append((key, shown))

    def close(
        self, written: Written | None = None, *, complete: bool = False, timeout_s: float = 120.0
    ) -> str | None:
        """Try once more, for at most `timeout_s`; with a report, complete the view. Return why the view is incomplete, if it is."""
        self._report = None if written is None else (written, "FINISHED" if complete else "FAILED")
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return f"{shown_uri(self._uri)} did not take everything within {timeout_s:.0f} s"
        return self._trouble

    def _write(self, every_s: float, again_s: float) -> None:
        while not self._closing.wait(again_s if self._trouble else every_s):
            self._try()
        self._try()

    def _try(self) -> None:
        # Others only append, and what is not logged stays.
        news = self._news[:]
        try:
            refused = self._tell(news)
            if self._report is not None:
                # Of every trial what its run lacks, so that what was refused does not matter any more.
                _log_sweep(self._uri, self._store, self._declaration, *self._report)
            elif refused is not None:
                raise refused
        except Exception as error:
            self._view = None
            if self._trouble is None:
                details = without_credentials("".join(traceback.format_exception(error)), self._uri)
                logger.error("MLflow at %s, to be tried again: %s", shown_uri(self._uri), details)
            self._trouble = without_credentials(f"{self._uri}: {_cause(error)}", self._uri)
        else:
            self._trouble = None
            del self._news[: len(news)]

    def _tell(self, news: Sequence[tuple[str, Rows]]) -> Exception | None:
        """Log the news of each trial; return the first error of a server that answers. Raises where none answers."""
        rows_of = defaultdict[str, list[Mapping[str, Any]]](list)
        for key, rows in news:
            rows_of[key] += rows
        changed = {key for key, rows in news if not rows}
        failed = failed_trials(self._declaration.sweep, self._store) if news else set[str]()
        first: Exception | None = None
        for key, rows in rows_of.items():
            if self._view is None:
                self._view = View(self._uri, self._store, self._declaration)
                self._view.set_status("", "RUNNING")
            try:
                if key in changed or not self._view.log_rows(key, rows):
                    (state,) = trial_states([self._trials[key]], self._store)
                    self._view.log_trial(state, rows, failed=key in failed)
            except Exception as error:
                # A new view reads what is there.
                first, self._view = first or error, None
        return first


def _cause(error: BaseException) -> str:
    """Return one line: the innermost error, which MLflow wraps in three layers."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
