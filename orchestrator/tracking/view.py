"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, all written from artifacts.

Logging is idempotent: a run is found by its tags, its points carry the time stored in the artifact, and MLflow keeps
equal points (key, step, time, value) once. So a retry re-opens a run, and whatever failed can be logged again. What
comes last is a tag with the digest of all that a run holds: a run that has it already is left as it is.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from orchestrator.report.curves import curve_rows
from orchestrator.report.results import TrialResult, all_scores, trial_result
from orchestrator.spec.redaction import take_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, TrialRecord
from orchestrator.tracking.embedded import EXPERIMENT, artifacts_beside, follow_storage, make_database
from orchestrator.tracking.run_content import DIGEST_TAG, Point, RunContent, milliseconds, run_content
from trainers.disk import digest_file

CONFIG, SCORES = "config.json", "scores.parquet"
# Under MLflow's 1,000 in one request, with room for parameters and tags.
_BATCH = 850
_PAGE = 200
# A sweep outlives its server, and what fails is tried again later: MLflow's own patience is many minutes.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # What somebody's sweep logs is nobody else's to count.
    "MLFLOW_DISABLE_TELEMETRY": "true",
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
        make_database(plain)
        follow_storage(plain)
        from mlflow import MlflowClient

        self._store = store
        self._declaration = declaration
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(plain)
        # By run: MLflow takes a point that it has already, but slowly.
        self._logged: dict[str, set[Point]] = {}
        self.parent = self._open_parent()

    def log_trial(
        self, result: TrialResult, *, status: str = "RUNNING", found: Sequence[Any] | None = None
    ) -> bool:
        """Everything that the store holds of a trial; FINISHED once it is complete, which is returned.

        `found` are its runs, oldest first, where they were listed already. A run that is whole is not touched.
        """
        content = run_content(result, curve_rows(self._store, result.record.key))
        run = self._open_trial(result, found)
        now, wanted = run.info.status, "FINISHED" if result.complete else status
        if not self._holds(run, content):
            self._reopen(run)
            self._log_content(run, content, result)
            now = "RUNNING"
        if now == wanted:
            return result.complete
        if wanted == "RUNNING":
            self._reopen(run)
        else:
            ended = milliseconds(result.finished) if result.complete else None
            self._client.set_terminated(run.info.run_id, wanted, end_time=ended)
        return result.complete

    def trial_runs(self) -> dict[str, list[Any]]:
        """The sweep's runs by the key of their trial, oldest first."""
        runs: dict[str, list[Any]] = {}
        for run in self._search({"rmsweep.sweep": self._declaration.sweep, "rmsweep.role": "trial"}):
            runs.setdefault(run.data.tags.get("rmsweep.key", ""), []).append(run)
        return runs

    def settle(self) -> None:
        """Log anew the trials that have two runs, a parent that was a second one, or a run re-opened after its end.

        That is what requests leave whose answer was lost: MLflow's client and the writer ask again, and a slow
        server may carry them out later.
        """
        self.parent = self._open_parent()
        runs = self.trial_runs()
        for trial in self._declaration.trials:
            found = runs.get(trial.key, [])
            if found and not self._settled(trial, found):
                failed = any(run.info.status == "FAILED" for run in found)
                result = trial_result(trial, self._store)
                self.log_trial(result, status="FAILED" if failed else "RUNNING", found=found)

    def log_report(self, folder: Path, status: str) -> None:
        """The report's files on the parent run, which ends with `status`; where it has them already, only that."""
        digest = _digest_of(folder)
        tags = self._client.get_run(self.parent).data.tags
        if tags.get(DIGEST_TAG) != digest or not self._has_files(self.parent, {"report"}):
            self._client.log_artifacts(self.parent, str(folder), "report")
            self._client.set_tag(self.parent, DIGEST_TAG, digest)
        self._client.set_terminated(self.parent, status)

    def _experiment_id(self, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        location = artifacts_beside(uri)
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
        identity = {"rmsweep.sweep": name, "rmsweep.role": "sweep"}
        parent = self._kept(self._search(identity)) or self._create(name, identity)
        self._reopen(parent)
        return str(parent.info.run_id)

    def _open_trial(self, result: TrialResult, found: Sequence[Any] | None) -> Any:
        """The trial's run below the parent."""
        trial = result.record
        identity = {"rmsweep.sweep": self._declaration.sweep, "rmsweep.key": trial.key}
        run = self._kept(self._search(identity) if found is None else found)
        if run is None:
            more = {"mlflow.parentRunId": self.parent, "rmsweep.role": "trial"}
            return self._create(trial.name, {**identity, **more}, result.started)
        if run.data.tags.get("mlflow.parentRunId") != self.parent:
            self._client.set_tag(run.info.run_id, "mlflow.parentRunId", self.parent)
        return run

    def _create(self, name: str, tags: dict[str, str], started: float | None = None) -> Any:
        """A new run, of a Unix time."""
        more = {"mlflow.user": "rmsweep", "mlflow.source.name": self._declaration.sweep}
        start_time = None if started is None else milliseconds(started)
        return self._client.create_run(
            self._experiment, run_name=name, tags={**tags, **more}, start_time=start_time
        )

    def _kept(self, found: Sequence[Any]) -> Any | None:
        """The oldest of the runs of one identity: a lost answer may have left several, the others go."""
        for run in found[1:]:
            self._client.delete_run(run.info.run_id)
        return found[0] if found else None

    def _reopen(self, run: Any) -> None:
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

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
        kept, *others = runs
        below = kept.data.tags.get("mlflow.parentRunId") == self.parent
        return below and not others and (kept.info.status == "FINISHED" or not trial.whole(self._store))

    def _holds(self, run: Any, content: RunContent) -> bool:
        """Whether the run is whole: its digest was logged last, and its files are there."""
        if run.data.tags.get(DIGEST_TAG) != content.digest:
            return False
        return not content.scored or self._has_files(run.info.run_id, {CONFIG, SCORES})

    def _has_files(self, run: str, wanted: set[str]) -> bool:
        return wanted <= {item.path for item in self._client.list_artifacts(run)}

    def _log_content(self, run: Any, content: RunContent, result: TrialResult) -> None:
        """In as few requests as there can be; the digest comes last."""
        from mlflow.entities import Metric, Param, RunTag

        id = run.info.run_id
        self._log_datasets(id, content)
        if content.scored:
            self._log_files(id, content, result)
        logged = self._logged.setdefault(id, set())
        points = [Metric(*point) for point in content.points if point not in logged]
        while len(points) > _BATCH:
            self._client.log_batch(id, metrics=points[:_BATCH])
            points = points[_BATCH:]
        parameters = [
            Param(name, value) for name, value in content.parameters.items() if name not in run.data.params
        ]
        tags = [RunTag(name, value) for name, value in {**content.tags, DIGEST_TAG: content.digest}.items()]
        self._client.log_batch(id, metrics=points, params=parameters, tags=tags)
        logged.update(content.points)

    def _log_datasets(self, run: str, content: RunContent) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name, digest[:32], "local", json.dumps({"uri": f"artifacts/dataset/{digest}"})),
                [InputTag("mlflow.data.context", context)],
            )
            for name, digest, context in content.inputs
        ]
        self._client.log_inputs(run, inputs)

    def _log_files(self, run: str, content: RunContent, result: TrialResult) -> None:
        """config.json, what the trial is made of; scores.parquet, every pair of every set."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(content.config, encoding="utf-8")
            parquet.write_table(all_scores(result, self._store), Path(folder) / SCORES)
            self._client.log_artifacts(run, folder)


def _digest_of(folder: Path) -> str:
    """Changes with any file below it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    parts = [(file.relative_to(folder).as_posix(), digest_file(file)) for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
