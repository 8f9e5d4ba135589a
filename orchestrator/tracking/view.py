"""A sweep's runs on an MLflow server or database: their content, and how it is logged.

A run is found by its tags; a mark among them is a hash of its content, and a run with the right tags is left alone. A step of a
curve is logged once; every other point carries a time stored in the artifact, and MLflow stores equal points once. So
a request that failed, or whose answer was lost, can be repeated.
"""

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from orchestrator.store.records import CATEGORIES, Declaration, TrialRecord
from orchestrator.tracking.database import EXPERIMENT, open_database, shared_view_tag

MARK_TAG = "rmsweep.digest"
# Raised by hand when the same results would give another run, so that `sync` writes existing runs again.
VERSION = 4
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
        # A suite's numbers come in order of importance: score, sections, subsets.
        suite = [name for name in item.metrics if name.startswith("suite/")]
        for name in (["accuracy", *suite] if suite else EVALUATION_METRICS)[:each]:
            if name in item.metrics:
                key = f"eval/{_part(item.dataset)}/{name.replace(' ', '_')}"
                yield key, item.metrics[name], item.finished, (item.epoch or 0) * by_epoch
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield _category_metric(category), accuracy, finished, 0


def _part(name: str) -> str:
    """Escape a name as part of a metric's name: MLflow accepts letters of every script but few signs."""
    return re.sub(r"[^\w.-]", lambda mark: f":{ord(mark[0]):x}:", name)


def _category_metric(category: str) -> str:
    return f"category/{category.replace(' ', '-')}/accuracy"


def _summary_points(trials: Path, time: float) -> Iterator[Point]:
    """Yield the metrics of a whole sweep: numbers of trials, and the mean accuracies of each reward type over learned trials."""
    if trials.is_file():
        rows = parquet.read_table(trials).to_pandas()
        states = rows.groupby("key").state.first()
        yield "trials/declared", len(states), time, 0
        yield "trials/complete", float(sum(states == "complete")), time, 0
        last = rows[rows.learned & rows.evaluated & (rows.epoch.isna() | (rows.epoch == rows.epochs))]
        for (reward, category), accuracy in last.groupby(["reward", "category"]).accuracy.mean().items():
            yield f"{_category_metric(category)}/{_part(reward)}", accuracy, time, 0


def _view_states(sweep: str) -> dict[str, str]:
    """Return by tag the settings of MLflow's page for a sweep, in the format of MLflow 3.17.

    The table of runs shows settings and accuracies; the charts show each reward type's mean by training set.
    """
    accuracies = [_category_metric(category) for category in CATEGORIES]
    columns = [f"params.`{name}`" for name in ("model", "reward", "train_set", "seed")]
    columns += [f"metrics.`{name}`" for name in accuracies]
    wanted = f'tags.`rmsweep.sweep` = "{sweep}"'
    like = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    charts = {
        "searchFilter": f'{wanted} and tags.`rmsweep.role` = "trial"',
        # The page adds a chart of every other metric below these.
        "compareRunCharts": [
            {"type": "BAR", "uuid": name, "metricKey": name, "metricSectionId": "accuracy", **like}
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
        shared_view_tag(sweep, "runs"): json.dumps(runs),
        shared_view_tag(sweep, "charts"): json.dumps(charts),
    }


def run_names(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """Return the names of the trials' runs by key; the parts that differ come first, because columns are narrow."""
    parted = what_differs({trial.key: trial.name for trial in trials})
    return {key: " · ".join(filter(None, parts)) for key, parts in parted.items()}


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

    def __init__(
        self, uri: str, store: Store, declaration: Declaration, started: float | None = None
    ) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow prints and logs addresses, so they must not hold a password.
        plain = take_credentials(uri)
        files = open_database(plain)
        from mlflow import MlflowClient

        self._store, self._sweep = store, declaration.sweep
        self._names = run_names(declaration.trials)
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(files)
        # By the key of their trial; the parent's is empty.
        self._runs: dict[str, Any] = {}
        # The steps of each trial's curve.
        self._steps: dict[str, set[int]] = {}
        self._find_runs()
        self._parent = self._run("", declaration.sweep, {"rmsweep.role": "sweep"}, started).info.run_id

    def _experiment_id(self, files: str | None) -> str:
        from mlflow.exceptions import MlflowException

        # The kind of page for training rather than for chat programs; MLflow 3.17 decides by the address that `ui` prints.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                self._client.create_experiment(EXPERIMENT, files, kind)
            except MlflowException:
                # Another command has made it, or an earlier try whose answer was lost.
                if self._client.get_experiment_by_name(EXPERIMENT) is None:
                    raise
            found = self._client.get_experiment_by_name(EXPERIMENT)
        for view, state in _view_states(self._sweep).items():
            if found.tags.get(view) != state:
                self._client.set_experiment_tag(found.experiment_id, view, state)
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
        if key not in self._steps:
            # A resumed training repeats steps at other times; these are in the curve already.
            self._steps[key] = {point.step for point in self._client.get_metric_history(id, "train/loss")}
        for row in rows:
            if (step := int(row["step"])) not in self._steps[key]:
                self._steps[key].add(step)
                points += [(f"train/{name}", row[name], row["time"], step) for name in CURVES]
        self._log_points(id, points)
        return True

    def log_trial(self, result: TrialState, live: Rows = (), *, failed: bool) -> None:
        """Log what the run of a trial lacks, steps of its training among it, and end it if the trial is complete or `failed`."""
        from mlflow.entities import Param, RunTag

        trial = result.record
        name, weights = self._names.get(trial.key, trial.name), weights_place(self._store, trial.key)
        # A run of this type makes MLflow's page show the parent with its runs expanded below it.
        made = {"rmsweep.role": "trial", "rmsweep.key": trial.key, "mlflow.runType": "evaluation"}
        run = self._run(trial.key, name, made, result.started)
        id, known = run.info.run_id, {at: redacted(str(value)) for at, value in trial.parameters.items()}
        scored = [(item.dataset, item.epoch, item.finished) for item in result.evaluations]
        tags = {
            "mlflow.runName": name,
            "mlflow.parentRunId": self._parent,
            "rmsweep.weights": weights,
            **{f"rmsweep.{name}": known[name] for name in known.keys() & OUTSIDE_KEY},
            # Of everything else that the run shows.
            MARK_TAG: as_hash([VERSION, asdict(trial), result.trained_at, scored]),
        }
        whole = tags.items() <= run.data.tags.items()
        # The checkpoint of an unfinished training may hold more rows, from another driver.
        if not result.trained or not whole:
            self.log_rows(trial.key, [*curve_rows(self._store, trial.key), *live])
        if not whole:
            self._client.log_inputs(id, _inputs(trial))
            if result.evaluations:
                self._log_files(id, result)
            (found,) = with_scores([result], self._store)
            model = self._model(run, name, known, weights) if result.trained else None
            self._log_points(id, self._as_latest(run, final_points(found)), model)
            new = known.keys() - OUTSIDE_KEY - run.data.params.keys()
            # The mark comes last, because it says that the run is complete.
            self._client.log_batch(
                id,
                params=[Param(at, known[at]) for at in new],
                tags=[RunTag(*item) for item in tags.items()],
            )
            self._runs[trial.key] = self._client.get_run(id)
        status = "FINISHED" if result.complete else "FAILED" if failed else "RUNNING"
        self.set_status(trial.key, status, result.finished if result.complete else None)

    def log_report(self, folder: Path, status: str, ended: float | None) -> None:
        """Log a report on the parent run, and end the run with `status` at the Unix time `ended`."""
        self._client.log_artifacts(self._parent, str(folder), "report")
        run = self._runs[""]
        points = _summary_points(folder.parent / "trials.parquet", ended or run.info.start_time / 1000)
        self._log_points(self._parent, self._as_latest(run, points))
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

    def _log_files(self, id: str, result: TrialState) -> None:
        config = redacted(json.dumps(asdict(result.record), indent=1, ensure_ascii=False))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
            parquet.write_table(all_scores(result, self._store), Path(folder) / SCORES)
            self._client.log_artifacts(id, folder)

    def _model(self, run: Any, name: str, parameters: dict[str, str], weights: str) -> str:
        """Return the id of the logged model of a trial's run; its weights are not copied."""
        from mlflow.entities import LoggedModelOutput

        tags = {"rmsweep.sweep": self._sweep, "rmsweep.weights": weights}
        if run.outputs and run.outputs.model_outputs:
            known: str = run.outputs.model_outputs[0].model_id
            self._client.set_logged_model_tags(known, tags)
            return known
        model = self._client.create_logged_model(
            self._experiment,
            # Signs that a model's name may not hold.
            name=re.sub(r"[/:.%\"']", "-", name),
            source_run_id=run.info.run_id,
            tags=tags,
            params=parameters,
            model_type="reward model",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def _as_latest(self, run: Any, points: Iterable[Point]) -> Iterator[Point]:
        """Yield the points that the run does not show yet, each later than those that it replaces.

        MLflow shows a metric's latest point, but results of another sweep may change a mean without being later.
        """
        history = functools.cache(functools.partial(self._client.get_metric_history, run.info.run_id))
        for name, value, time, step in points:
            shown = run.data.metrics.get(name)
            if shown == value and not step:
                continue
            if shown is not None:
                later = [
                    point.timestamp + (point.value != value) for point in history(name) if point.step == step
                ]
                time = max([1000 * time, *later]) / 1000
            yield name, value, time, step

    def _log_points(self, id: str, points: Iterable[Point], model: str | None = None) -> None:
        """Log the finite points; those of evaluations belong to the `model`, too."""
        from mlflow.entities import Metric

        of_model = ("eval/", "category/")
        metrics = [
            Metric(name, value, round(1000 * time), step, model if name.startswith(of_model) else None)
            for name, value, time, step in points
            if math.isfinite(value)
        ]
        for at in range(0, len(metrics), _BATCH):
            self._client.log_batch(id, metrics[at : at + _BATCH])


def _inputs(trial: TrialRecord) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    text = {"type": "string", "required": True}
    columns = [{"name": name, **text} for name in ("prompt", "chosen", "rejected")]
    schema = json.dumps({"mlflow_colspec": columns})
    sets = {(trial.train_set, trial.train_digest): "training"}
    sets |= {(item.dataset, item.dataset_digest): "evaluation" for item in trial.evaluations}
    return [
        DatasetInput(
            Dataset(name, digest[:32], "local", json.dumps({"uri": f"artifacts/dataset/{digest}"}), schema),
            [InputTag("mlflow.data.context", context)],
        )
        for (name, digest), context in sets.items()
    ]
