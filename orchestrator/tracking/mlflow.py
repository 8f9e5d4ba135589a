"""Writing the MLflow view while a sweep runs: one writer, a thread of the driver; a server that fails stops nothing.

What the view has not taken yet, the report above all, is kept in <storage>/sweeps/<sweep>/tracking_pending.json, tried
again, and taken up by the sweep's next command.
"""

import contextlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.report.results import trial_result
from orchestrator.report.summary import Written
from orchestrator.spec.redaction import shown_uri, without_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, read_state
from orchestrator.tracking.view import View
from trainers.disk import Location, replace
from trainers.errors import SpecError, StorageError, SweepError, TrackingError

PENDING = "tracking_pending.json"

logger = logging.getLogger(__name__)


def default_uri(store: Store) -> str:
    """The embedded database inside the storage folder. Raises SpecError where the storage is no folder."""
    if not isinstance(store.root, Path):
        raise SpecError(
            f"--storage {store.root} cannot hold MLflow's database: give a tracking server with --tracking-uri or "
            "MLFLOW_TRACKING_URI (http://…, or sqlite:///FILE on this machine)."
        )
    return f"sqlite:///{store.root / 'mlflow.db'}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Word:
    """The last word on a trial, or on the report in `folder`: the status to log it with."""

    status: str
    folder: Path | None = None


class Tracker:
    """The one writer of a running sweep. Calls return at once; what failed is tried again, and said by `close`.

    After a failure the next try waits `pause_s`, then twice that, at most `longest_pause_s`.
    """

    def __init__(
        self,
        uri: str,
        store: Store,
        declaration: Declaration,
        *,
        pause_s: float = 1.0,
        longest_pause_s: float = 60.0,
    ) -> None:
        self._uri, self._store, self._declaration = uri, store, declaration
        self._pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._trials = {trial.key: trial for trial in declaration.trials}
        self._file = store.sweep_dir(declaration.sweep) / PENDING
        self._saved = _read(self._file)
        earlier = self._saved.get(shown_uri(uri), {}).get("trials", {})
        # Trial key → last word; the report's is under None. A new word is another object, also where it says the same.
        self._pending: dict[str | None, _Word] = {
            key: _Word(status=status) for key, status in earlier.items() if key in self._trials
        }
        self._report: _Word | None = None
        # From the first word on the sweep's own run is open, until the report ends it.
        self._owed = True
        self._view: View | None = None
        self._trouble: str | None = None
        self._closing = self._abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    def shows(self, key: str) -> bool:
        """Whether the trial is one of the sweep's, which have a run each."""
        return key in self._trials

    def started(self, key: str) -> None:
        """A trial has begun."""
        self._note(key, _Word(status="RUNNING"))

    def checkpointed(self, key: str) -> None:
        """A trial's training has a new complete checkpoint, whose log is shown."""
        self._note(key, _Word(status="RUNNING"))

    def ended(self, key: str, *, failed: bool) -> None:
        """A trial has ended, well or not."""
        self._note(key, _Word(status="FAILED" if failed else "RUNNING"))

    def report(self, folder: Path, *, complete: bool) -> None:
        """The sweep's report is written."""
        self._report = _Word(status="FINISHED" if complete else "FAILED", folder=folder)
        self._note(None, self._report)

    def close(self, timeout_s: float = 120.0) -> str | None:
        """Try once more what is pending, for at most `timeout_s`; why the view lacks something, if it does."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandoned = True
            return f"{shown_uri(self._uri)} did not take everything within {timeout_s:.0f} s"
        return self._trouble if self._pending else None

    def _note(self, key: str | None, word: _Word) -> None:
        with self._changed:
            self._pending[key] = word
            self._save()
            self._changed.notify()

    def _write(self) -> None:
        pause = self._pause_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                last = self._closing
            well = self._try_all()
            if last:
                return
            if well:
                pause = self._pause_s
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)
            pause = min(2 * pause, self._longest_pause_s)

    def _try_all(self) -> bool:
        """One try of everything that is pending; whether all of it went well."""
        tried: set[str | None] = set()
        well = True
        while (item := self._next(tried)) is not None:
            key, word = item
            tried.add(key)
            try:
                view = self._view or self._open()
            except Exception as error:
                self._failed(error)
                return False
            try:
                self._tell(view, key, word)
                self._done(key, word)
            except Exception as error:
                self._failed(error)
                well = False
        return well

    def _next(self, tried: set[str | None]) -> tuple[str | None, _Word] | None:
        """A word that was not tried yet; the report's comes last."""
        with self._changed:
            left = [item for item in self._pending.items() if item[0] not in tried]
        if not left or self._abandoned:
            return None
        return min(left, key=lambda item: item[0] is None)

    def _open(self) -> View:
        with self._changed:
            if self._report is not None:
                # Opening a view re-opens the sweep's run, which the report ends.
                self._pending[None] = self._report
                self._save()
        self._view = View(self._uri, self._store, self._declaration)
        return self._view

    def _tell(self, view: View, key: str | None, word: _Word) -> None:
        if key is not None:
            view.log_trial(trial_result(self._trials[key], self._store), status=word.status)
        elif word.folder is not None:
            view.settle()
            view.log_report(word.folder, word.status)

    def _done(self, key: str | None, word: _Word) -> None:
        with self._changed:
            # What was said meanwhile is still to be logged.
            if self._pending.get(key) is word:
                del self._pending[key]
                self._owed = self._owed and key is not None
                self._save()

    def _failed(self, error: Exception) -> None:
        self._view = None
        trouble = without_credentials(f"{self._uri}: {_cause(error)}", self._uri)
        if trouble != self._trouble:
            details = without_credentials("".join(traceback.format_exception(error)), self._uri)
            logger.error("MLflow at %s, to be tried again: %s", shown_uri(self._uri), details)
        self._trouble = trouble

    def _save(self) -> None:
        """Store what is pending, beside what is pending for other URIs."""
        words = {key: word.status for key, word in self._pending.items()}
        report = words.pop(None, None)
        entries = {uri: entry for uri, entry in self._saved.items() if uri != shown_uri(self._uri)}
        if self._pending or self._owed:
            entries[shown_uri(self._uri)] = {"trials": words, "report": report}
        if entries == self._saved:
            return
        try:
            _store(self._file, entries)
            self._saved = entries
        except (OSError, StorageError):
            logger.exception("%s cannot be written", self._file)


def is_pending(uri: str, store: Store, sweep: str) -> bool:
    """Whether an earlier command left something that the view at `uri` lacks."""
    return shown_uri(uri) in _read(store.sweep_dir(sweep) / PENDING)


def sync(
    uri: str,
    store: Store,
    declaration: Declaration,
    written: Written,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Rebuild the view from the artifacts, as the report has read them; seconds taken. Raises TrackingError.

    `step` is told (done, total) trials.
    """
    started = time.perf_counter()
    file = store.sweep_dir(declaration.sweep) / PENDING
    pending = _read(file)
    statuses = {
        key: "FAILED"
        for key, note in read_state(declaration.sweep, store).trials.items()
        if note.state == "failed"
    } | pending.get(shown_uri(uri), {}).get("trials", {})
    with _tracking_errors(uri):
        view = View(uri, store, declaration)
        runs = view.trial_runs()
        for done, result in enumerate(written.results, 1):
            key = result.record.key
            view.log_trial(result, status=statuses.get(key, "RUNNING"), found=runs.get(key, ()))
            step(done, len(written.results))
        view.settle()
        complete = all(result.complete for result in written.results)
        view.log_report(written.folder, "FINISHED" if complete else "RUNNING")
    if pending.pop(shown_uri(uri), None) is not None:
        _store(file, pending)
    return time.perf_counter() - started


def _read(file: Location) -> dict[str, dict[str, Any]]:
    """What is pending, by tracking URI; nothing where the file is missing or damaged, as `sync` rebuilds the view."""
    try:
        return {
            uri: {"trials": {**entry["trials"]}, "report": entry["report"]}
            for uri, entry in json.loads(file.read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.exception("%s is unreadable", file)
        return {}


def _store(file: Location, entries: dict[str, dict[str, Any]]) -> None:
    if entries:
        replace(file, json.dumps(entries))
    else:
        file.unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    """One line; in the system's own words where there are any, which MLflow wraps in three layers of others."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    from_system = [item for item in chain if isinstance(item, OSError)]
    told = error if isinstance(error, SweepError) or not from_system else from_system[-1]
    return f"{type(told).__name__}: {(str(told).splitlines() or [''])[0]}"


@contextlib.contextmanager
def _tracking_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        first = without_credentials(_cause(error), uri)
        raise TrackingError(
            f"MLflow at {shown_uri(uri)} cannot be written to ({first.rstrip('.')}); check --tracking-uri."
        ) from error
