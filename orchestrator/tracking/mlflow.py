"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, written from artifacts and live rows.

While a sweep runs, one thread of its driver logs what is new. The end of the run, the next command and `sync` log whatever a
server did not accept: <storage>/sweeps/<sweep>/mlflow.sha256 is the mark of the last complete view.

A run is found by its tags; a mark among them is a hash of its content, and a run with the right tags is left alone. A step of a
curve is logged once; every other point carries a time stored in the artifact, and MLflow stores equal points once. So
a request that failed, or whose answer was lost, can be repeated.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.report.page import said_conclusions
from orchestrator.report.results import (
    CURVE_POINTS,
    CURVES,
    TrialResult,
    TrialState,
    curve_rows,
    thinned,
    trial_states,
    with_scores,
)
from orchestrator.report.summary import Written
from orchestrator.spec.redaction import redacted, shown_uri, take_credentials, without_credentials
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.leases import live_drivers
from orchestrator.store.records import CATEGORIES, Declaration, read_state
from orchestrator.tracking.database import EXPERIMENT, open_database
from trainers.errors import StorageError, TrackingError
from trainers.storage import digest_file, replace

SHOWN = "mlflow.sha256"
MARK_TAG = "rmsweep.digest"
# Raised by hand when the same results would give another run, so that `sync` writes existing runs again.
VERSION = 5
# The most important first: a run of very many sets gets as many of them as fit.
EVALUATION_METRICS = ("accuracy", "accuracy_length_controlled", "accuracy_leak_free", "loss", "abs_margin")
MOST_KEYS = 59
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# A run's parameters cannot change. These can, because they are in no key, so they are tags.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
# MLflow takes as many metrics in one request.
_BATCH = 1000
# Failed requests are tried again later, so MLflow's own retries of many minutes are cut short.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

Rows = Sequence[Mapping[str, Any]]
# A value of a metric: its name, the value, a Unix time, a step.
Point = tuple[str, float, float, int]

logger = logging.getLogger(__name__)


def final_points(result: TrialResult) -> Iterator[Point]:
    """Yield the metrics of a trial besides its curves, at most MOST_KEYS together with those."""
    for name in PERFORMANCE:
        if name in result.perf:
            yield f"perf/{name}", result.perf[name], result.trained_at, 0
    other = len(CURVES) + len(PERFORMANCE) + len(CATEGORIES)
    sets = {item.dataset for item in result.record.evaluations}
    each = max(1, (MOST_KEYS - other) // max(1, len(sets)))
    # A step is an epoch if several epochs are evaluated.
    by_epoch = any(item.epoch != result.last_epoch for item in result.record.evaluations)
    for item in result.evaluations:
        # MLflow accepts letters of every script in a metric's name, but few signs.
        part = re.sub(r"[^\w.-]", lambda mark: f":{ord(mark[0]):x}:", item.dataset)
        # A suite's numbers come in order of importance: score, sections, subsets.
        suite = [name for name in item.metrics if name.startswith("suite/")]
        for name in (["accuracy", *suite] if suite else EVALUATION_METRICS)[:each]:
            if name in item.metrics:
                key = f"eval/{part}/{name.replace(' ', '_')}"
                yield key, item.metrics[name], item.finished, (item.epoch or 0) * by_epoch
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield f"category/{category.replace(' ', '-')}/accuracy", accuracy, finished, 0


def weights_place(store: Store, key: str) -> str:
    """Return where a training's models are; `not kept` if it is not trained yet or its models were evicted."""
    found = store.sound_manifest(WEIGHTS, key)
    return f"{store.root}/artifacts/{WEIGHTS}/{key}/{found['attempt']}" if found else "not kept"


def as_hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class View:
    """A sweep's runs on one tracking server or database. Methods raise what MLflow raises.

    `started`, a Unix time, is the start of a sweep that has no run yet; None means now.
    """

    def __init__(self, uri: str, store: Store, sweep: str, started: float | None = None) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow prints and logs addresses, so they must not hold a password.
        plain = take_credentials(uri)
        files = open_database(plain)
        from mlflow import MlflowClient

        self._store, self._sweep = store, sweep
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(files)
        # By the key of their trial; the parent's is empty.
        self._runs: dict[str, Any] = {}
        # By the id of a run: the steps of its curve.
        self._steps: dict[str, set[int]] = {}
        self._find_runs()
        self._parent = self._run("", sweep, {"rmsweep.role": "sweep"}, started).info.run_id

    def _experiment_id(self, files: str | None) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(EXPERIMENT)) is None:
            try:
                return str(self._client.create_experiment(EXPERIMENT, files))
            except MlflowException:
                # Another command has made it, or an earlier try whose answer was lost.
                if (found := self._client.get_experiment_by_name(EXPERIMENT)) is None:
                    raise
        return str(found.experiment_id)

    def _find_runs(self, key: str | None = None) -> None:
        """Find the sweep's runs, or one trial's. If a lost answer led to two runs of a trial, keep the older one."""
        wanted = f"tags.`rmsweep.sweep` = '{self._sweep}'"
        wanted += f" and tags.`rmsweep.key` = '{key}'" if key else ""
        found = self._client.search_runs([self._experiment], wanted, max_results=50_000)
        for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id)):
            if self._runs.setdefault(run.data.tags.get("rmsweep.key", ""), run) is not run:
                self._client.delete_run(run.info.run_id)

    def _run(self, key: str, name: str, tags: Mapping[str, str], started: float | None) -> Any:
        """Return the run of a trial, or the sweep's; create it if neither this nor another driver has."""
        if key and key not in self._runs:
            self._find_runs(key)
        if key not in self._runs:
            own = {"rmsweep.sweep": self._sweep, "mlflow.user": "rmsweep", "mlflow.source.name": self._sweep}
            at = None if started is None else round(1000 * started)
            self._runs[key] = self._client.create_run(self._experiment, at, {**tags, **own}, name)
        return self._runs[key]

    def log_rows(self, key: str, rows: Rows) -> bool:
        """Log the steps of a curve that the run of a trial lacks; False if the trial has no run yet."""
        if key not in self._runs:
            return False
        id, points = self._runs[key].info.run_id, list[Point]()
        if id not in self._steps:
            # A resumed training repeats steps at other times; these are in the curve already.
            self._steps[id] = {point.step for point in self._client.get_metric_history(id, "train/loss")}
        for row in rows:
            if (step := int(row["step"])) not in self._steps[id]:
                self._steps[id].add(step)
                points += [(f"train/{name}", row[name], row["time"], step) for name in CURVES]
        self._log_points(id, points)
        return True

    def log_trial(self, result: TrialState, live: Rows = (), *, failed: bool) -> None:
        """Log what the run of a trial lacks, steps of its training among it, and end it if the trial is complete or `failed`."""
        from mlflow.entities import Param, RunTag

        trial = result.record
        # A run of this type makes MLflow's page show the parent with its runs expanded below it.
        made = {"rmsweep.role": "trial", "rmsweep.key": trial.key, "mlflow.runType": "evaluation"}
        run = self._run(trial.key, trial.name, made, result.started)
        known = {at: redacted(str(value)) for at, value in trial.parameters.items()}
        scored = [(item.dataset, item.epoch, item.finished) for item in result.evaluations]
        tags = {
            "mlflow.parentRunId": self._parent,
            "rmsweep.weights": weights_place(self._store, trial.key),
            **{f"rmsweep.{name}": known[name] for name in known.keys() & OUTSIDE_KEY},
            # Of everything else that the run shows.
            MARK_TAG: as_hash([VERSION, asdict(trial), result.trained_at, scored]),
        }
        whole = tags.items() <= run.data.tags.items()
        # The checkpoint of an unfinished training may hold more rows, from another driver.
        if not result.trained or not whole:
            self.log_rows(trial.key, [*curve_rows(self._store, trial.key), *live])
        if not whole:
            (found,) = with_scores([result], self._store)
            self._log_points(run.info.run_id, final_points(found))
            new = known.keys() - OUTSIDE_KEY - run.data.params.keys()
            # The mark comes last, because it says that the run is complete.
            self._client.log_batch(
                run.info.run_id,
                params=[Param(at, known[at]) for at in new],
                tags=[RunTag(*item) for item in tags.items()],
            )
            self._runs[trial.key] = self._client.get_run(run.info.run_id)
        status = "FINISHED" if result.complete else "FAILED" if failed else "RUNNING"
        self.set_status(trial.key, status, result.finished if result.complete else None)

    def log_report(self, folder: Path, status: str, ended: float | None) -> None:
        """Log a report on the parent run, and end the run with `status` at the Unix time `ended`."""
        self._client.log_artifacts(self._parent, str(folder), "report")
        if said := said_conclusions(folder):
            self._client.set_tag(self._parent, "mlflow.note.content", "\n\n".join(said))
        self.set_status("", status, ended)

    def set_status(self, key: str, status: str, ended: float | None = None) -> None:
        """Set a run's status and end, unless it has them; without `ended`, a run that changes its status ends now."""
        run = self._runs[key]
        end = None if ended is None or status == "RUNNING" else max(run.info.start_time, round(1000 * ended))
        if run.info.status == status and end in (None, run.info.end_time):
            return
        if status == "RUNNING":
            self._client.update_run(run.info.run_id, status)
        else:
            self._client.set_terminated(run.info.run_id, status, end)
        self._runs[key] = self._client.get_run(run.info.run_id)

    def _log_points(self, id: str, points: Iterable[Point]) -> None:
        """Log the finite points."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * time), step)
            for name, value, time, step in points
            if math.isfinite(value)
        ]
        for at in range(0, len(metrics), _BATCH):
            self._client.log_batch(id, metrics[at : at + _BATCH])


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
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    shown = [(file.relative_to(folder).as_posix(), digest_file(file)) for file in files]
    return as_hash([VERSION, shown_uri(uri), shown])


def _failed(sweep: str, store: Store) -> set[str]:
    return {key for key, note in read_state(sweep, store).trials.items() if note.state == "failed"}


def _log_sweep(uri: str, store: Store, declaration: Declaration, written: Written, status: str) -> None:
    """Log what the view lacks of any trial, and the report."""
    results, sweep = written.results, declaration.sweep
    started = min((item.started for item in results if item.started), default=None)
    # The end of the last stage, so that a later sync does not change the sweep's duration.
    ended = max((item.finished for item in results if item.finished), default=None)
    view, failed = View(uri, store, sweep, started), _failed(sweep, store)
    for result in results:
        view.log_trial(result, failed=result.record.key in failed)
    view.log_report(written.folder, status, ended)
    # If the disk is full, the next command compares again.
    with contextlib.suppress(OSError, StorageError):
        replace(store.sweep_dir(sweep) / SHOWN, view_mark(uri, store, sweep))


def sync(uri: str, store: Store, declaration: Declaration, written: Written) -> float:
    """Rebuild the view from the artifacts, as the report has read them; return the seconds taken. Raises TrackingError."""
    began = time.perf_counter()
    at_work = read_state(declaration.sweep, store).driver in live_drivers(store.root)
    tracker = Tracker(uri, store, declaration)
    status = "RUNNING" if at_work else "FAILED"
    if trouble := tracker.close(written, complete=written.complete, incomplete=status, timeout_s=None):
        raise TrackingError(f"MLflow cannot be written to ({trouble}); check --tracking-uri.")
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
        self,
        written: Written | None = None,
        *,
        complete: bool = False,
        incomplete: str = "FAILED",
        timeout_s: float | None = 120.0,
    ) -> str | None:
        """Try once more, for at most `timeout_s`; with a report, complete the view. Return why the view is incomplete, if it is.

        The sweep's run ends as FINISHED if the sweep is `complete`, else it gets the status `incomplete`.
        """
        if written is not None:
            self._report = written, "FINISHED" if complete else incomplete
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return f"{shown_uri(self._uri)} did not take everything in time"
        return self._trouble

    def _write(self, every_s: float, again_s: float) -> None:
        while not self._closing.wait(again_s if self._trouble else every_s):
            self._try()
        self._try()

    def _try(self) -> None:
        # Others only append, and what is not logged stays.
        news = self._news[:]
        try:
            if self._report is not None:
                _log_sweep(self._uri, self._store, self._declaration, *self._report)
            elif news:
                self._tell(news)
        except Exception as error:
            self._view = None
            if self._trouble is None:
                details = without_credentials("".join(traceback.format_exception(error)), self._uri)
                logger.error("MLflow at %s, to be tried again: %s", shown_uri(self._uri), details)
            self._trouble = without_credentials(f"{self._uri}: {_cause(error)}", self._uri)
        else:
            self._trouble = None
            del self._news[: len(news)]

    def _tell(self, news: Sequence[tuple[str, Rows]]) -> None:
        sweep = self._declaration.sweep
        if self._view is None:
            view = View(self._uri, self._store, sweep)
            view.set_status("", "RUNNING")
            self._view = view
        rows_of = defaultdict[str, list[Mapping[str, Any]]](list)
        for key, rows in news:
            rows_of[key] += rows
        changed, failed = {key for key, rows in news if not rows}, _failed(sweep, self._store)
        for key, rows in rows_of.items():
            if key in changed or not self._view.log_rows(key, rows):
                (state,) = trial_states([self._trials[key]], self._store)
                self._view.log_trial(state, rows, failed=key in failed)


def _cause(error: BaseException) -> str:
    """Return one line: the innermost error, which MLflow wraps in three layers."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
