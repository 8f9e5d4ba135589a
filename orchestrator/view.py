"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, all written from artifacts.

Logging is idempotent: a run is found by its tags, its points carry the time stored in the artifact, and MLflow keeps
equal points (key, step, time, value) once. So a retry re-opens a run, and whatever failed can be logged again.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from orchestrator.artifacts import Store
from orchestrator.curves import CURVES, curve_rows
from orchestrator.declaration import Declaration, TrialRecord
from orchestrator.redaction import redacted, take_credentials
from orchestrator.results import TrialResult, all_scores, trial_result
from orchestrator.spec import CATEGORIES
from trainers.objects import Location

EXPERIMENT = "rmsweep"
# The most telling first: a run of very many sets gets as many of them as fit.
EVALUATION_METRICS = ("accuracy", "accuracy_length_controlled", "accuracy_leak_free", "loss", "abs_margin")
MOST_KEYS = 59
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# What a trial's key does not hold may differ between commands that share its run.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
_BATCH = 900
_PAGE = 200
# A sweep outlives its server, and what fails is tried again later: MLflow's own patience is many minutes.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def _set_up_mlflow(uri: str) -> str:
    """MLflow's settings, the user's own kept; the URI to give to it, whose password goes the way MLflow offers."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # MLflow prints and logs the addresses that it is given.
    return take_credentials(uri)


class View:
    """A sweep's runs on one tracking server or database. Methods raise what MLflow raises."""

    def __init__(self, uri: str, store: Store, declaration: Declaration) -> None:
        plain = _set_up_mlflow(uri)
        from mlflow import MlflowClient

        self._store = store
        self._declaration = declaration
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(plain)
        self.parent = self._open_parent()

    def log_trial(self, trial: TrialRecord, *, status: str = "RUNNING") -> bool:
        """Everything that the store holds of a trial; FINISHED once it is complete, which is returned."""
        result = trial_result(trial, self._store)
        run = self._open_trial(trial, result.started)
        self._log_parameters(run, trial)
        id = run.info.run_id
        self._log_datasets(id, trial)
        self._log_metrics(id, [*_curves(trial, self._store), *_final_metrics(result)])
        if result.evaluations:
            self._log_files(id, result)
        if result.complete:
            self._client.set_terminated(id, "FINISHED", end_time=_milliseconds(result.finished))
        elif status != "RUNNING":
            self._client.set_terminated(id, status)
        return result.complete

    def settle(self) -> None:
        """Log anew the trials that have two runs, a parent that was a second one, or a run re-opened after its end.

        That is what requests leave whose answer was lost: MLflow's client and the writer ask again, and a slow
        server may carry them out later.
        """
        self.parent = self._open_parent()
        runs: dict[str, list[Any]] = {}
        for run in self._search({"rmsweep.sweep": self._declaration.sweep, "rmsweep.role": "trial"}):
            runs.setdefault(run.data.tags.get("rmsweep.key", ""), []).append(run)
        for trial in self._declaration.trials:
            found = runs.get(trial.key, [])
            if found and not self._settled(trial, found):
                failed = any(run.info.status == "FAILED" for run in found)
                self.log_trial(trial, status="FAILED" if failed else "RUNNING")

    def log_report(self, folder: Path, status: str) -> None:
        """The report's files on the parent run, which ends with `status`."""
        self._client.log_artifacts(self.parent, str(folder), "report")
        self._client.set_terminated(self.parent, status)

    def _experiment_id(self, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        location = _artifacts_beside(uri, self._store.root)
        try:
            return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:
            # Made by another command, or by the first of two tries whose answer was lost.
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)

    def _open_parent(self) -> str:
        name = self._declaration.sweep
        return str(self._run(name, {"rmsweep.sweep": name, "rmsweep.role": "sweep"}, {}).info.run_id)

    def _open_trial(self, trial: TrialRecord, started: float | None) -> Any:
        """The trial's run below the parent; `started` is a Unix time."""
        identity = {"rmsweep.sweep": self._declaration.sweep, "rmsweep.key": trial.key}
        more = {"mlflow.parentRunId": self.parent, "rmsweep.role": "trial"}
        run = self._run(trial.name, identity, more, started)
        if run.data.tags.get("mlflow.parentRunId") != self.parent:
            self._client.set_tag(run.info.run_id, "mlflow.parentRunId", self.parent)
        return run

    def _run(
        self, name: str, identity: dict[str, str], more: dict[str, str], started: float | None = None
    ) -> Any:
        """The one run of this identity, created or re-opened; the oldest, where a lost answer left several."""
        found = self._search(identity)
        if not found:
            tags = {
                **identity,
                **more,
                "mlflow.user": "rmsweep",
                "mlflow.source.name": self._declaration.sweep,
            }
            start_time = None if started is None else _milliseconds(started)
            return self._client.create_run(self._experiment, run_name=name, tags=tags, start_time=start_time)
        kept, *others = found
        self._client.update_run(kept.info.run_id, status="RUNNING")
        for run in others:
            self._client.delete_run(run.info.run_id)
        return kept

    def _search(self, tags: dict[str, str]) -> list[Any]:
        """The runs with these tags, oldest first."""
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found, token = [], None
        while token != "":
            page = self._client.search_runs([self._experiment], wanted, max_results=_PAGE, page_token=token)
            found += page
            token = page.token or ""
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _settled(self, trial: TrialRecord, runs: Sequence[Any]) -> bool:
        complete = self._store.complete("train", trial.key) and all(
            self._store.complete("evaluate", item.key) for item in trial.evaluations
        )
        kept, *others = runs
        below = kept.data.tags.get("mlflow.parentRunId") == self.parent
        return below and not others and (kept.info.status == "FINISHED" or not complete)

    def _log_parameters(self, run: Any, trial: TrialRecord) -> None:
        """Parameters cannot change; what is not in the trial's key can, and is a tag."""
        from mlflow.entities import Param, RunTag

        parameters = [
            Param(name, redacted(str(value)))
            for name, value in trial.parameters.items()
            if name not in OUTSIDE_KEY and name not in run.data.params
        ]
        tags = [
            RunTag(f"rmsweep.{name}", redacted(str(trial.parameters[name])))
            for name in OUTSIDE_KEY & set(trial.parameters)
        ]
        self._client.log_batch(run.info.run_id, params=parameters, tags=tags)

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

    def _log_files(self, run: str, result: TrialResult) -> None:
        """config.json, what the trial is made of; scores.parquet, every pair of every set."""
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps(dataclasses.asdict(result.record), indent=1, ensure_ascii=False)
            (Path(folder) / "config.json").write_text(redacted(config), encoding="utf-8")
            parquet.write_table(all_scores(result, self._store), Path(folder) / "scores.parquet")
            self._client.log_artifacts(run, folder)


def _artifacts_beside(uri: str, storage: Location) -> str | None:
    """Where runs of an embedded database keep their files: in the storage folder, or beside the database; else None."""
    if not uri.startswith("sqlite:"):
        return None
    folder = storage if isinstance(storage, Path) else Path(uri.removeprefix("sqlite:///")).absolute().parent
    return (folder / "mlflow-artifacts").as_uri()


def _curves(trial: TrialRecord, store: Store) -> Iterator[tuple[str, float, float, int]]:
    for row in curve_rows(store, trial.key):
        for name in CURVES:
            yield f"train/{name}", row[name], row["time"], int(row["step"])


def _final_metrics(result: TrialResult) -> Iterator[tuple[str, float, float, int]]:
    for name in PERFORMANCE:
        if name in result.perf:
            yield f"perf/{name}", result.perf[name], result.trained_at, 0
    other = len(CURVES) + len(PERFORMANCE) + len(CATEGORIES)
    sets = {item.dataset for item in result.record.evaluations}
    each = max(1, (MOST_KEYS - other) // max(1, len(sets)))
    # Where only the last epoch is evaluated, its point has always been at step 0.
    curve = any(item.epoch != result.last_epoch for item in result.record.evaluations)
    for evaluation in result.evaluations:
        step = evaluation.epoch or 0 if curve else 0
        for name in EVALUATION_METRICS[:each]:
            if name in evaluation.metrics:
                yield f"eval/{evaluation.dataset}/{name}", evaluation.metrics[name], evaluation.finished, step
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield f"category/{category}/accuracy", accuracy, finished, 0


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
