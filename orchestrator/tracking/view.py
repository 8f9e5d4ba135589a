"""A sweep's runs on an MLflow server or database: their content, and how it is logged.

A run is found by its tags; a mark among them is a hash of its content, and a run with the right mark is left alone. A step of a
curve is logged once; every other point carries a time stored in the artifact, and MLflow stores equal points once. So
a request that failed, or whose answer was lost, can be repeated.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from orchestrator.report.page import said_conclusions
from orchestrator.report.results import (
    CURVES,
    SCORES,
    TrialResult,
    TrialState,
    all_scores,
    curve_rows,
    with_scores,
)
from orchestrator.report.tables import what_differs
from orchestrator.spec.redaction import redacted, take_credentials
from orchestrator.store.artifacts import WEIGHTS, Store
from orchestrator.store.records import CATEGORIES, TrialRecord
from orchestrator.tracking.database import (
    EXPERIMENT,
    artifacts_beside,
    follow_storage,
    make_database,
    shared_view_tag,
)
from trainers.storage import digest_file

MARK_TAG = "rmsweep.digest"
_KEY_TAG = "rmsweep.key"
_PARENT_TAG = "mlflow.parentRunId"
_DESCRIPTION_TAG = "mlflow.note.content"
# A run of this type makes MLflow's page show the parent with its runs expanded below it.
_SHOWN_BELOW = {"mlflow.runType": "evaluation"}
# The kind of page for training rather than for chat programs; MLflow 3.17 decides by the address that `ui` prints.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
# The schema of every data set's rows, for MLflow's pages.
_COLUMNS = [{"name": name, "type": "string", "required": True} for name in ("prompt", "chosen", "rejected")]
_SCHEMA = json.dumps({"mlflow_colspec": _COLUMNS})
_CHART: dict[str, Any] = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
# Raised by hand when the same results would give another run, so that `sync` writes existing runs again.
VERSION = 3
# The most important first: a run of very many sets gets as many of them as fit.
EVALUATION_METRICS = ("accuracy", "accuracy_length_controlled", "accuracy_leak_free", "loss", "abs_margin")
MOST_KEYS = 59
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# A run's parameters cannot change. These can, because they are in no key, so they are tags.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
# Under MLflow's 1,000 in one request, with room for parameters and tags.
_BATCH = 850
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


class MetricPoint(NamedTuple):
    """One value of a metric; `time` is a Unix time in milliseconds."""

    name: str
    value: float
    time: int
    step: int


def final_points(result: TrialResult) -> list[MetricPoint]:
    """Return the finite metrics of a trial besides its curves, at most MOST_KEYS together with those."""
    return [point for point in _points(result) if math.isfinite(point.value)]


def _points(result: TrialResult) -> Iterator[MetricPoint]:
    for name in PERFORMANCE:
        if name in result.perf:
            yield MetricPoint(f"perf/{name}", result.perf[name], _milliseconds(result.trained_at), 0)
    other = len(CURVES) + len(PERFORMANCE) + len(CATEGORIES)
    sets = {item.dataset for item in result.record.evaluations}
    each = max(1, (MOST_KEYS - other) // max(1, len(sets)))
    # A step is an epoch if several epochs are evaluated.
    by_epoch = any(item.epoch != result.last_epoch for item in result.record.evaluations)
    for item in result.evaluations:
        step = (item.epoch or 0) if by_epoch else 0
        # A suite's numbers come in order of importance: score, sections, subsets.
        suite = [name for name in item.metrics if name.startswith("suite/")]
        for name in (["accuracy", *suite] if suite else EVALUATION_METRICS)[:each]:
            if name in item.metrics:
                key = f"eval/{_part(item.dataset)}/{name.replace(' ', '_')}"
                yield MetricPoint(key, item.metrics[name], _milliseconds(item.finished), step)
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield MetricPoint(_category_metric(category), accuracy, _milliseconds(finished), 0)


def _part(name: str) -> str:
    """Escape a name as part of a metric's name: MLflow accepts letters of every script but few signs."""
    return re.sub(r"[^\w.-]", lambda mark: f":{ord(mark[0]):x}:", name)


def _category_metric(category: str) -> str:
    return f"category/{category.replace(' ', '-')}/accuracy"


def _summary_points(trials: Path, time: int) -> list[MetricPoint]:
    """Return the metrics of a whole sweep: numbers of trials, and the mean accuracies of each reward type over learned trials."""
    if not trials.is_file():
        return []
    rows = parquet.read_table(trials).to_pandas()
    states = rows.groupby("key").state.first()
    values = {"trials/declared": len(states), "trials/complete": sum(states == "complete")}
    last = rows[rows.learned & rows.evaluated & (rows.epoch.isna() | (rows.epoch == rows.epochs))]
    for (reward, category), accuracy in last.groupby(["reward", "category"]).accuracy.mean().items():
        values[f"{_category_metric(category)}/{_part(reward)}"] = accuracy
    return [MetricPoint(name, float(value), time, 0) for name, value in values.items()]


def _curve_points(row: Mapping[str, Any]) -> Iterator[MetricPoint]:
    for name in CURVES:
        if math.isfinite(row[name]):
            yield MetricPoint(f"train/{name}", row[name], _milliseconds(row["time"]), int(row["step"]))


def _view_states(sweep: str) -> dict[str, str]:
    """Return by tag the settings of MLflow's page for a sweep, in the format of MLflow 3.17.

    The table of runs shows settings and accuracies; the charts show each reward type's mean by training set.
    """
    accuracies = [_category_metric(category) for category in CATEGORIES]
    columns = [f"params.`{name}`" for name in ("model", "reward", "train_set", "seed")]
    columns += [f"metrics.`{name}`" for name in accuracies]
    wanted = f'tags.`rmsweep.sweep` = "{sweep}"'
    charts = {
        "searchFilter": f'{wanted} and tags.`rmsweep.role` = "trial"',
        # The page adds a chart of every other metric below these.
        "compareRunCharts": [
            {"type": "BAR", "uuid": name, "metricKey": name, "metricSectionId": "accuracy", **_CHART}
            for name in accuracies
        ],
        "compareRunSections": [
            {"uuid": "accuracy", "name": "Accuracy by category", "display": True, "isReordered": True}
        ],
        "isAccordionReordered": True,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": name} for name in ("reward", "train_set")],
        },
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,
    }
    runs = {"searchFilter": wanted, "selectedColumns": columns}
    return {
        shared_view_tag(sweep, view): json.dumps(state)
        for view, state in (("runs", runs), ("charts", charts))
    }


def run_names(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """Return the names of the trials' runs by key; the parts that differ come first, because columns are narrow."""
    parted = what_differs({trial.key: trial.name for trial in trials})
    return {key: " · ".join(filter(None, parts)) for key, parts in parted.items()}


def weights_place(store: Store, key: str) -> str:
    """Return where a training's models are; `not kept` if it is not trained yet or its models were evicted."""
    found = store.sound_manifest(WEIGHTS, key)
    return f"{store.root}/artifacts/{WEIGHTS}/{key}/{found['attempt']}" if found else "not kept"


def trial_mark(result: TrialState, status: str, name: str, weights: str) -> str:
    """Return a hash of everything that the run of a trial shows, except the curve of an unfinished training."""
    scored = [(item.dataset, item.epoch, item.finished) for item in result.evaluations]
    shown = [name, weights, asdict(result.record), result.trained_at, scored, result.complete or status]
    return as_hash([VERSION, *shown])


def report_mark(folder: Path) -> str:
    """Return a hash that changes with any file of a report."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return as_hash([(file.relative_to(folder).as_posix(), digest_file(file)) for file in files])


def as_hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


class View:
    """A sweep's runs on one tracking server or database. Methods raise what MLflow raises.

    `started`, a Unix time, is the start of a sweep that has no run yet; None means now. `names` are the names of runs by key,
    if they differ from their trials'.
    """

    def __init__(
        self,
        uri: str,
        store: Store,
        sweep: str,
        started: float | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow prints and logs addresses, so they must not hold a password.
        plain = take_credentials(uri)
        make_database(plain)
        follow_storage(plain)
        from mlflow import MlflowClient

        self._store, self._sweep, self._names = store, sweep, names or {}
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(plain)
        # By the key of their trial; the parent's is empty.
        self._runs: dict[str, Any] = {}
        # By the id of a run: the steps of its curve, the status that this view gave it, and its logged model.
        self._steps: dict[str, set[int]] = {}
        self._statuses: dict[str, str] = {}
        self._models: dict[str, str] = {}
        self._find_runs()
        if "" not in self._runs:
            self._create("", sweep, {"rmsweep.role": "sweep"}, started)
        self._parent: str = self._runs[""].info.run_id
        for key, run in self._runs.items():
            if key and run.data.tags.get(_PARENT_TAG) != self._parent:
                self._client.set_tag(run.info.run_id, _PARENT_TAG, self._parent)

    def _experiment_id(self, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        views = _view_states(self._sweep)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(EXPERIMENT, artifacts_beside(uri), {**_KIND, **views})
                )
            except MlflowException:
                # Another command has made it, or an earlier try whose answer was lost.
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
        for view, state in views.items():
            if found.tags.get(view) != state:
                self._client.set_experiment_tag(found.experiment_id, view, state)
        return str(found.experiment_id)

    def _find_runs(self, key: str | None = None) -> None:
        """Find the sweep's runs, or one trial's. If a lost answer led to two runs of a trial, keep the older one."""
        wanted = f"tags.`rmsweep.sweep` = '{self._sweep}'"
        wanted += "" if key is None else f" and tags.`{_KEY_TAG}` = '{key}'"
        found = self._client.search_runs([self._experiment], wanted, max_results=50_000)
        for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id)):
            if self._runs.setdefault(run.data.tags.get(_KEY_TAG, ""), run) is not run:
                self._client.delete_run(run.info.run_id)

    def _create(self, key: str, name: str, tags: Mapping[str, str], started: float | None) -> None:
        own = {"rmsweep.sweep": self._sweep, "mlflow.user": "rmsweep", "mlflow.source.name": self._sweep}
        at = None if started is None else _milliseconds(started)
        self._runs[key] = self._client.create_run(
            self._experiment, run_name=name, tags={**tags, **own}, start_time=at
        )

    def begin(self) -> None:
        self._set_status(self._runs[""], "RUNNING")

    def log_rows(self, key: str, rows: Rows) -> bool:
        """Log rows of a trial's training; False if the trial has no run yet."""
        if key in self._runs:
            run = self._runs[key]
            self._log_batch(run, self._curve(run, rows), {}, {})
        return key in self._runs

    def log_trial(self, result: TrialState, status: str, live: Rows = ()) -> None:
        """Log what the run of a trial lacks, and set its `status`, or end it if the trial is complete."""
        trial = result.record
        name, weights = self._names.get(trial.key, trial.name), weights_place(self._store, trial.key)
        mark = trial_mark(result, status, name, weights)
        if trial.key not in self._runs:
            # Another driver of the sweep may have created it.
            self._find_runs(trial.key)
        if trial.key not in self._runs:
            tags = {"rmsweep.role": "trial", _KEY_TAG: trial.key, _PARENT_TAG: self._parent, **_SHOWN_BELOW}
            self._create(trial.key, name, tags, result.started)
        run = self._runs[trial.key]
        whole = run.data.tags.get(MARK_TAG) == mark
        # The checkpoint of an unfinished training may hold more rows, from another driver.
        rows = live if whole and result.trained else [*curve_rows(self._store, trial.key), *live]
        points = self._curve(run, rows)
        if whole:
            self._log_batch(run, points, {}, {})
        else:
            self._set_status(run, "RUNNING")
            self._client.log_inputs(run.info.run_id, _inputs(trial))
            if result.evaluations:
                self._log_files(run, result)
            if run.info.run_name != name:
                self._client.update_run(run.info.run_id, name=name)
            known = {name: redacted(str(value)) for name, value in trial.parameters.items()}
            tags = {f"rmsweep.{name}": value for name, value in known.items() if name in OUTSIDE_KEY}
            tags["rmsweep.weights"] = weights
            parameters = {name: known[name] for name in known.keys() - OUTSIDE_KEY - run.data.params.keys()}
            model = self._model(run, name, known, weights) if result.trained else None
            # The mark comes last, because it says that the run is complete.
            (scored,) = with_scores([result], self._store)
            points += final_points(scored)
            self._log_batch(run, points, parameters, {**tags, MARK_TAG: mark}, model)
        if result.complete:
            self._set_status(run, "FINISHED", result.finished)
        else:
            self._set_status(run, status)

    def log_report(self, folder: Path, status: str, ended: float | None) -> None:
        """Log a report on the parent run, unless it is there, and end the run with `status` at the Unix time `ended`."""
        mark = report_mark(folder)
        parent = self._runs[""]
        if parent.data.tags.get(MARK_TAG) != mark:
            self._client.log_artifacts(self._parent, str(folder), "report")
            said = said_conclusions(folder)
            tags = {_DESCRIPTION_TAG: "\n\n".join(said)} if said else {}
            time = _milliseconds(ended) if ended else parent.info.start_time
            points = _summary_points(folder.parent / "trials.parquet", time)
            self._log_batch(parent, points, {}, {**tags, MARK_TAG: mark})
        self._set_status(parent, status, ended)

    def _set_status(self, run: Any, status: str, ended: float | None = None) -> None:
        """Set a run's status and end, unless it has them; without `ended`, a run that changes its status ends now."""
        end = None if ended is None or status == "RUNNING" else max(run.info.start_time, _milliseconds(ended))
        now = self._statuses.get(run.info.run_id, run.info.status)
        if now == status and end in (None, run.info.end_time):
            return
        if status == "RUNNING":
            self._client.update_run(run.info.run_id, status=status)
        else:
            self._client.set_terminated(run.info.run_id, status, end_time=end)
        self._statuses[run.info.run_id] = status

    def _log_files(self, run: Any, result: TrialState) -> None:
        config = redacted(json.dumps(asdict(result.record), indent=1, ensure_ascii=False))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
            parquet.write_table(all_scores(result, self._store), Path(folder) / SCORES)
            self._client.log_artifacts(run.info.run_id, folder)

    def _curve(self, run: Any, rows: Rows) -> list[MetricPoint]:
        """Return the points of rows whose steps the run lacks, each only once."""
        id, points = run.info.run_id, list[MetricPoint]()
        if rows and id not in self._steps:
            # A resumed training repeats steps at other times; these are in the curve already.
            shown = "train/loss" in run.data.metrics
            history = self._client.get_metric_history(id, "train/loss") if shown else ()
            self._steps[id] = {point.step for point in history}
        for row in rows:
            if (step := int(row["step"])) not in self._steps[id]:
                self._steps[id].add(step)
                points += _curve_points(row)
        return points

    def _model(self, run: Any, name: str, parameters: Mapping[str, str], weights: str) -> str:
        """Return the id of the logged model of a trial's run; its weights are not copied."""
        from mlflow.entities import LoggedModelOutput

        known, id = self._models, run.info.run_id
        if id not in known and run.outputs and run.outputs.model_outputs:
            known[id] = run.outputs.model_outputs[0].model_id
        if id in known:
            self._client.set_logged_model_tags(known[id], {"rmsweep.weights": weights})
            return known[id]
        model = self._client.create_logged_model(
            self._experiment,
            # Signs that a model's name may not hold.
            name=re.sub(r"[/:.%\"']", "-", name),
            source_run_id=id,
            tags={"rmsweep.sweep": self._sweep, "rmsweep.weights": weights},
            params=dict(parameters),
            model_type="reward model",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(id, [LoggedModelOutput(model.model_id, 0)])
        known[id] = model.model_id
        return known[id]

    def _log_batch(
        self,
        run: Any,
        points: Sequence[MetricPoint],
        parameters: Mapping[str, str],
        tags: Mapping[str, str],
        model: str | None = None,
    ) -> None:
        """Log everything in as few requests as possible, the tags with the last of the points.

        The metrics of evaluations belong to the `model`, too.
        """
        from mlflow.entities import Metric, Param, RunTag

        of_model = ("eval/", "category/")
        metrics = [
            Metric(*point, model_id=model if point.name.startswith(of_model) else None) for point in points
        ]
        while len(metrics) > _BATCH:
            self._client.log_batch(run.info.run_id, metrics=metrics[:_BATCH])
            metrics = metrics[_BATCH:]
        if metrics or tags:
            self._client.log_batch(
                run.info.run_id,
                metrics=metrics,
                params=[Param(*item) for item in parameters.items()],
                tags=[RunTag(*item) for item in tags.items()],
            )
        run.data.tags.update(tags)


def _inputs(trial: TrialRecord) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    sets = {(trial.train_set, trial.train_digest): "training"}
    sets |= {(item.dataset, item.dataset_digest): "evaluation" for item in trial.evaluations}
    return [
        DatasetInput(
            Dataset(name, digest[:32], "local", json.dumps({"uri": f"artifacts/dataset/{digest}"}), _SCHEMA),
            [InputTag("mlflow.data.context", context)],
        )
        for (name, digest), context in sets.items()
    ]
