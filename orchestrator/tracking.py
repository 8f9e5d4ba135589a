"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, all written from artifacts.

Logging is idempotent (points carry the time stored in the artifact), so a retry re-opens a run and `sync` rebuilds
the view. One writer: a thread of the driver behind a queue; a server that fails never stops the sweep.
"""

import contextlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from orchestrator.artifacts import Store
from orchestrator.declaration import Declaration, TrialRecord
from orchestrator.redaction import redacted
from orchestrator.results import TrialResult, trial_result
from trainers.errors import TrackingError

EXPERIMENT = "rmsweep"
CURVES = ("loss", "accuracy", "margin", "grad_norm", "lr")
CURVE_POINTS = 100
EVALUATION_METRICS = ("accuracy", "loss", "abs_margin")
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# What a trial's key does not hold may differ between commands that share its run.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
_BATCH = 900

logger = logging.getLogger(__name__)


def default_uri(store: Store) -> str:
    """The embedded database inside the storage folder."""
    return f"sqlite:///{store.root / 'mlflow.db'}"


class View:
    """A sweep's runs on one tracking server or database. Methods raise what MLflow raises."""

    def __init__(self, uri: str, store: Store, declaration: Declaration) -> None:
        # MLflow's own patience is many minutes; the view can be rebuilt, the sweep must not wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient

        self._store = store
        self._declaration = declaration
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = self._experiment_id(uri)
        self.parent = self._run(
            declaration.sweep, {"rmsweep.sweep": declaration.sweep, "rmsweep.role": "sweep"}, {}
        )

    def open_trial(self, trial: TrialRecord, started: float | None = None) -> str:
        """The trial's run, re-opened or created; `started` is a Unix time."""
        tags = {"rmsweep.sweep": self._declaration.sweep, "rmsweep.key": trial.key}
        return self._run(
            trial.name, tags, {"mlflow.parentRunId": self.parent, "rmsweep.role": "trial"}, started
        )

    def log_trial(self, trial: TrialRecord, *, status: str = "RUNNING") -> bool:
        """Everything that the store holds of a trial; FINISHED once it is complete, which is returned."""
        result = trial_result(trial, self._store)
        run = self.open_trial(trial, result.started)
        self._log_parameters(run, trial)
        self._log_datasets(run, trial)
        self._log_metrics(run, [*self._curves(trial), *_final_metrics(result)])
        if result.complete:
            self._client.set_terminated(run, "FINISHED", end_time=_milliseconds(result.finished))
        elif status != "RUNNING":
            self._client.set_terminated(run, status)
        return result.complete

    def log_report(self, folder: Path, status: str) -> None:
        """The report's files on the parent run, which ends with `status`."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                inside = file.parent.relative_to(folder)
                target = "report" if inside == Path() else f"report/{inside}"
                self._client.log_artifact(self.parent, str(file), target)
        self._client.set_terminated(self.parent, status)

    def _experiment_id(self, uri: str) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        local = uri.startswith("sqlite:")
        location = (self._store.root / "mlflow-artifacts").as_uri() if local else None
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))

    def _run(
        self, name: str, identity: dict[str, str], more: dict[str, str], started: float | None = None
    ) -> str:
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
        for run in self._client.search_runs([self._experiment], wanted, max_results=1):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        tags = {**identity, **more, "mlflow.user": "rmsweep", "mlflow.source.name": self._declaration.sweep}
        start_time = None if started is None else _milliseconds(started)
        created = self._client.create_run(self._experiment, run_name=name, tags=tags, start_time=start_time)
        return str(created.info.run_id)

    def _log_parameters(self, run: str, trial: TrialRecord) -> None:
        """Parameters cannot change; what is not in the trial's key can, and is a tag."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(run).data.params
        parameters = [
            Param(name, redacted(str(value)))
            for name, value in trial.parameters.items()
            if name not in OUTSIDE_KEY and name not in known
        ]
        tags = [
            RunTag(f"rmsweep.{name}", redacted(str(trial.parameters[name])))
            for name in OUTSIDE_KEY & set(trial.parameters)
        ]
        self._client.log_batch(run, params=parameters, tags=tags)

    def _log_datasets(self, run: str, trial: TrialRecord) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        wanted = {(trial.train_set, trial.train_digest): "training"}
        wanted |= {(item.dataset, item.dataset_digest): "evaluation" for item in trial.evaluations}
        inputs = [
            DatasetInput(
                Dataset(name, digest[:32], "local", json.dumps({"uri": f"artifacts/dataset/{digest}"})),
                [InputTag("mlflow.data.context", context)],
            )
            for (name, digest), context in wanted.items()
        ]
        self._client.log_inputs(run, inputs)

    def _log_metrics(self, run: str, metrics: Sequence[tuple[str, float, float, int]]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, _milliseconds(when), step)
            for name, value, when, step in metrics
            if math.isfinite(value)
        ]
        for start in range(0, len(points), _BATCH):
            self._client.log_batch(run, metrics=points[start : start + _BATCH])

    def _curves(self, trial: TrialRecord) -> Iterator[tuple[str, float, float, int]]:
        if not self._store.complete("train", trial.key):
            return
        rows = parquet.read_table(self._store.read("train", trial.key) / "log.parquet").to_pylist()
        for row in thinned(rows, CURVE_POINTS):
            for name in CURVES:
                yield f"train/{name}", row[name], row["time"], int(row["step"])


def _final_metrics(result: TrialResult) -> Iterator[tuple[str, float, float, int]]:
    for name in PERFORMANCE:
        if name in result.perf:
            yield f"perf/{name}", result.perf[name], result.trained_at, 0
    for evaluation in result.evaluations:
        for name in EVALUATION_METRICS:
            if name in evaluation.metrics:
                yield f"eval/{evaluation.dataset}/{name}", evaluation.metrics[name], evaluation.finished, 0
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.evaluations if item.category == category)
        yield f"category/{category}/accuracy", accuracy, finished, 0


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def thinned(rows: Sequence[dict[str, Any]], points: int) -> list[dict[str, Any]]:
    """At most `points` rows, evenly spread, the last one kept."""
    if len(rows) <= points:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)]


class Tracker:
    """The one writer of a running sweep. Calls return at once; what failed is said by `close`."""

    def __init__(self, uri: str, store: Store, declaration: Declaration) -> None:
        self._uri, self._store, self._declaration = uri, store, declaration
        self._trials = {trial.key: trial for trial in declaration.trials}
        self._queue: queue.SimpleQueue[Callable[[View], object] | None] = queue.SimpleQueue()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    def started(self, key: str) -> None:
        """A trial has begun."""
        self._queue.put(lambda view: view.log_trial(self._trials[key]))

    def ended(self, key: str, *, failed: bool) -> None:
        """A trial has ended, well or not."""
        status = "FAILED" if failed else "RUNNING"
        self._queue.put(lambda view: view.log_trial(self._trials[key], status=status))

    def report(self, folder: Path, *, complete: bool) -> None:
        """The sweep's report is written."""
        self._queue.put(lambda view: view.log_report(folder, "FINISHED" if complete else "FAILED"))

    def close(self, timeout_s: float = 120.0) -> str | None:
        """Wait for what is queued; what went wrong, if anything did."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._error is None:
            return f"{self._uri} did not take everything within {timeout_s:.0f} s"
        return self._error

    def _write(self) -> None:
        view: View | None = None
        unreachable = False
        while (task := self._queue.get()) is not None:
            # Opening fails after MLflow's own retries; once is enough, `sync` rebuilds the view.
            if unreachable:
                continue
            try:
                if view is None:
                    unreachable = True
                    view = View(self._uri, self._store, self._declaration)
                    unreachable = False
                task(view)
            except Exception as error:
                logger.exception("MLflow at %s", self._uri)
                self._error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def sync(uri: str, store: Store, declaration: Declaration, report_folder: Path) -> float:
    """Rebuild the view from the artifacts; seconds taken. Raises TrackingError."""
    started = time.perf_counter()
    with _tracking_errors(uri):
        view = View(uri, store, declaration)
        complete = [view.log_trial(trial) for trial in declaration.trials]
        view.log_report(report_folder, "FINISHED" if all(complete) else "RUNNING")
    return time.perf_counter() - started


@contextlib.contextmanager
def _tracking_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrackingError(
            f"MLflow at {uri} cannot be written to ({first.rstrip('.')}); check --tracking-uri."
        ) from error
