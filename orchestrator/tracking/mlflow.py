"""The MLflow view of a sweep: one parent run per sweep, one child run per trial, written from artifacts and live rows.

A run is found by its tags. A step of a curve is logged once, with the time in its row; every other point carries a time
stored in the artifact, and MLflow keeps equal points once. So whatever failed, or whose answer was lost, can be logged
again. <storage>/sweeps/<sweep>/mlflow.json says what a whole view has shown of each trial: where a command finds
anything else in the store, it completes the view.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from orchestrator.report.results import (
    CURVE_POINTS,
    CURVES,
    TrialResult,
    TrialState,
    all_scores,
    curve_rows,
    thinned,
    trial_result,
    with_scores,
)
from orchestrator.report.summary import Written
from orchestrator.spec.redaction import redacted, shown_uri, take_credentials, without_credentials
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, Declaration, read_state
from trainers.errors import SpecError, StorageError, SweepError, TrackingError
from trainers.storage import DRAFT, Location, digest_file, replace

EXPERIMENT = "rmsweep"
DIGEST_TAG = "rmsweep.digest"
SHOWN = "mlflow.json"
CONFIG, SCORES = "config.json", "scores.parquet"
# Raised by hand when the same results would give another run, so that `sync` writes the runs that are there anew.
VERSION = 1
# The most telling first: a run of very many sets gets as many of them as fit.
EVALUATION_METRICS = ("accuracy", "accuracy_length_controlled", "accuracy_leak_free", "loss", "abs_margin")
MOST_KEYS = 59
PERFORMANCE = ("tokens_per_s", "pairs_per_s", "step_s", "peak_mem_gb")
# Parameters of a run cannot change; these are in no key, so they can, and are tags.
OUTSIDE_KEY = frozenset({"model_source", "model_revision", "max_eval_pairs"})
_ARTIFACTS = "mlflow-artifacts"
# Under MLflow's 1,000 in one request, with room for parameters and tags.
_BATCH = 850
# A sweep outlives its server, and what fails is tried again later: MLflow's own patience is many minutes.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


# The embedded database.


def default_uri(store: Store) -> str:
    """Return the URI of the database inside the storage folder. Raises SpecError where the storage is no folder."""
    if not isinstance(store.root, Path):
        raise SpecError(
            f"--storage {store.root} cannot hold MLflow's database: give a tracking server with --tracking-uri or "
            "MLFLOW_TRACKING_URI (http://…, or sqlite:///FILE on this machine)."
        )
    return f"sqlite:///{store.root / 'mlflow.db'}"


def _database(uri: str) -> Path | None:
    plain = uri.startswith("sqlite:///") and "?" not in uri
    return Path(uri.removeprefix("sqlite:///")).absolute() if plain else None


def _make_database(uri: str) -> None:
    """Make the database where there is none, whole or not at all: MLflow never takes up a migration that was cut short."""
    file = _database(uri)
    if file is None or file.exists() or not file.parent.is_dir():
        return
    from mlflow import MlflowClient

    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}.db")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        # Another driver may have made it meanwhile; and where there are no links, MLflow makes it in its place.
        with contextlib.suppress(OSError):
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _artifacts_beside(uri: str) -> str | None:
    """Return where the runs of an embedded database keep their files; None for a server."""
    if not uri.startswith("sqlite:"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / _ARTIFACTS).as_uri()


def follow_storage(uri: str) -> None:
    """Point the database at the files beside it where both were moved: MLflow keeps absolute paths. Raises OSError."""
    file, now = _database(uri), _artifacts_beside(uri)
    if file is None or not file.is_file():
        return
    places = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as database, database:
            for (before,) in database.execute(places, (EXPERIMENT,)).fetchall():
                if before == now or not before.endswith(f"/{_ARTIFACTS}"):
                    continue
                for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? "
                        f"OR substr({column}, 1, ?) = ?",
                        (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
                    )
    except sqlite3.Error as error:
        raise OSError(f"{file} cannot be told where its files are now ({error})") from error


# What the run of a trial holds.


class Point(NamedTuple):
    """One value of a metric; `time` is a Unix time in milliseconds."""

    name: str
    value: float
    time: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContent:
    """Everything of a run but its status and times. `inputs` are (data set, digest, context); `config` is config.json."""

    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    inputs: tuple[tuple[str, str, str], ...]
    points: tuple[Point, ...]
    config: str
    scored: tuple[tuple[str, int | None, float], ...]

    @property
    def digest(self) -> str:
        """A hash that changes with whatever the run shows."""
        return _hash([VERSION, *(getattr(self, name) for name in self.__slots__)])


def run_content(result: TrialResult, curve: Rows) -> RunContent:
    """Return what the run of a trial holds; `curve` are the rows of its training that are shown."""
    record = result.record
    known = {name: redacted(str(value)) for name, value in record.parameters.items()}
    sets = {(record.train_set, record.train_digest): "training"}
    sets |= {(item.dataset, item.dataset_digest): "evaluation" for item in record.evaluations}
    return RunContent(
        parameters={name: value for name, value in known.items() if name not in OUTSIDE_KEY},
        tags={f"rmsweep.{name}": value for name, value in known.items() if name in OUTSIDE_KEY},
        inputs=tuple((name, digest, context) for (name, digest), context in sets.items()),
        points=(*_curve_points(curve), *filter(_finite, _final_points(result))),
        config=redacted(json.dumps(asdict(record), indent=1, ensure_ascii=False)),
        scored=tuple((item.dataset, item.epoch, item.finished) for item in result.evaluations),
    )


def _curve_points(rows: Rows) -> list[Point]:
    points = (
        Point(f"train/{name}", row[name], _milliseconds(row["time"]), int(row["step"]))
        for row in rows
        for name in CURVES
    )
    return [*filter(_finite, points)]


def _final_points(result: TrialResult) -> Iterator[Point]:
    for name in PERFORMANCE:
        if name in result.perf:
            yield Point(f"perf/{name}", result.perf[name], _milliseconds(result.trained_at), 0)
    other = len(CURVES) + len(PERFORMANCE) + len(CATEGORIES)
    sets = {item.dataset for item in result.record.evaluations}
    each = max(1, (MOST_KEYS - other) // max(1, len(sets)))
    # A step is an epoch, where more than the last is evaluated.
    by_epoch = any(item.epoch != result.last_epoch for item in result.record.evaluations)
    for item in result.evaluations:
        # MLflow takes letters of every script, but no marks; the colons stand in no name of a set.
        part = re.sub(r"[^\w.-]", lambda mark: f":{ord(mark[0]):x}:", item.dataset)
        step = (item.epoch or 0) if by_epoch else 0
        for name in EVALUATION_METRICS[:each]:
            if name in item.metrics:
                yield Point(f"eval/{part}/{name}", item.metrics[name], _milliseconds(item.finished), step)
    for category, accuracy in result.category_accuracy().items():
        finished = max(item.finished for item in result.final if item.category == category)
        yield Point(f"category/{category}/accuracy", accuracy, _milliseconds(finished), 0)


def _finite(point: Point) -> bool:
    return math.isfinite(point.value)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The runs of a sweep on a server.


class View:
    """A sweep's runs on one tracking server or database. Methods raise what MLflow raises."""

    def __init__(self, uri: str, store: Store, declaration: Declaration) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow prints and logs the addresses that it is given.
        plain = take_credentials(uri)
        _make_database(plain)
        follow_storage(plain)
        from mlflow import MlflowClient

        self._store, self._sweep = store, declaration.sweep
        self._client = MlflowClient(tracking_uri=plain)
        self._experiment = self._experiment_id(plain)
        self._runs: dict[str, Any] = {}
        # What a run has: steps of curves as (name, step), other points whole.
        self._logged: dict[str, set[tuple[Any, ...]]] = {}
        self.open_parent()

    def open_parent(self) -> None:
        """Find the sweep's own run, or create it; it is running from now on."""
        identity = {"rmsweep.sweep": self._sweep, "rmsweep.role": "sweep"}
        parent = self._kept(self._search(identity)) or self._create(self._sweep, identity)
        self._reopen(parent)
        self.parent = str(parent.info.run_id)

    def trial_runs(self) -> dict[str, list[Any]]:
        """Return the sweep's runs by the key of their trial, oldest first."""
        runs: dict[str, list[Any]] = {}
        for run in self._search({"rmsweep.sweep": self._sweep, "rmsweep.role": "trial"}):
            runs.setdefault(run.data.tags.get("rmsweep.key", ""), []).append(run)
        return runs

    def log_trial(
        self, result: TrialResult, status: str, live: Rows = (), found: Sequence[Any] | None = None
    ) -> None:
        """Log everything known of a trial, and end its run if it is complete. `found` are its runs, if known already."""
        key = result.record.key
        if found is None:
            found = self._search({"rmsweep.sweep": self._sweep, "rmsweep.key": key})
        run = self._runs[key] = self._trial_run(result, found)
        content = run_content(result, curve_rows(self._store, key))
        now, wanted = run.info.status, "FINISHED" if result.complete else status
        if not self._holds(run, content):
            self._reopen(run)
            self._log_content(run, content, result)
            now = "RUNNING"
        self.log_rows(key, live)
        if now != wanted and wanted == "RUNNING":
            self._reopen(run)
        elif now != wanted:
            ended = _milliseconds(result.finished) if result.complete else None
            self._client.set_terminated(run.info.run_id, wanted, end_time=ended)

    def knows(self, key: str) -> bool:
        """Whether the trial was logged before."""
        return key in self._runs

    def log_rows(self, key: str, rows: Rows) -> None:
        """Log rows of the training of a trial that was logged before."""
        if rows:
            self._log_batch(self._runs[key], _curve_points(rows), {}, {})

    def log_report(self, folder: Path, status: str) -> None:
        """Log the report's files on the parent run, unless it has them, and end that run with `status`."""
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        digest = _hash([(file.relative_to(folder).as_posix(), digest_file(file)) for file in files])
        tags = self._client.get_run(self.parent).data.tags
        if tags.get(DIGEST_TAG) != digest or not self._has_files(self.parent, {"report"}):
            self._client.log_artifacts(self.parent, str(folder), "report")
            self._client.set_tag(self.parent, DIGEST_TAG, digest)
        self._client.set_terminated(self.parent, status)

    def settled(self, runs: Sequence[Any], status: str) -> bool:
        """Whether a trial has one run, below the parent, with this status; late requests may have made another."""
        return [(run.data.tags.get("mlflow.parentRunId"), run.info.status) for run in runs] == [
            (self.parent, status)
        ]

    def _experiment_id(self, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(EXPERIMENT, artifact_location=_artifacts_beside(uri))
                )
            except MlflowException:
                # Made by another command, or by the first of two tries whose answer was lost.
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _trial_run(self, result: TrialResult, found: Sequence[Any]) -> Any:
        trial = result.record
        run = self._kept(found)
        if run is None:
            tags = {"rmsweep.sweep": self._sweep, "rmsweep.key": trial.key, "rmsweep.role": "trial"}
            return self._create(trial.name, {**tags, "mlflow.parentRunId": self.parent}, result.started)
        if run.data.tags.get("mlflow.parentRunId") != self.parent:
            self._client.set_tag(run.info.run_id, "mlflow.parentRunId", self.parent)
        return run

    def _create(self, name: str, tags: dict[str, str], started: float | None = None) -> Any:
        more = {"mlflow.user": "rmsweep", "mlflow.source.name": self._sweep}
        start_time = None if started is None else _milliseconds(started)
        return self._client.create_run(
            self._experiment, run_name=name, tags={**tags, **more}, start_time=start_time
        )

    def _kept(self, found: Sequence[Any]) -> Any | None:
        """Return the oldest of the runs of one identity; the others, left by lost answers, are deleted."""
        for run in found[1:]:
            self._client.delete_run(run.info.run_id)
        return found[0] if found else None

    def _reopen(self, run: Any) -> None:
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _search(self, tags: dict[str, str]) -> list[Any]:
        """Return the runs with these tags, oldest first."""
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found, token = [], None
        while token != "":
            page = self._client.search_runs([self._experiment], wanted, max_results=200, page_token=token)
            found += page
            token = page.token or ""
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _holds(self, run: Any, content: RunContent) -> bool:
        """Whether the run is whole: its digest was logged last, and its files are there."""
        if run.data.tags.get(DIGEST_TAG) != content.digest:
            return False
        return not content.scored or self._has_files(run.info.run_id, {CONFIG, SCORES})

    def _has_files(self, run: str, wanted: set[str]) -> bool:
        return wanted <= {item.path for item in self._client.list_artifacts(run)}

    def _log_content(self, run: Any, content: RunContent, result: TrialResult) -> None:
        """Log all of it in as few requests as there can be; the digest comes last."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name, digest[:32], "local", json.dumps({"uri": f"artifacts/dataset/{digest}"})),
                [InputTag("mlflow.data.context", context)],
            )
            for name, digest, context in content.inputs
        ]
        self._client.log_inputs(run.info.run_id, inputs)
        if content.scored:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / CONFIG).write_text(content.config, encoding="utf-8")
                parquet.write_table(all_scores(result, self._store), Path(folder) / SCORES)
                self._client.log_artifacts(run.info.run_id, folder)
        parameters = {
            name: value for name, value in content.parameters.items() if name not in run.data.params
        }
        self._log_batch(run, content.points, parameters, {**content.tags, DIGEST_TAG: content.digest})

    def _log_batch(
        self, run: Any, points: Sequence[Point], parameters: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Log what the run lacks of the points, and the rest with the last of them."""
        from mlflow.entities import Metric, Param, RunTag

        id = run.info.run_id
        if id not in self._logged:
            # A step that a resumed training has done again, at another time, is in the curve already.
            shown = "train/loss" in run.data.metrics
            history = self._client.get_metric_history(id, "train/loss") if shown else ()
            self._logged[id] = {(f"train/{name}", point.step) for point in history for name in CURVES}
        new = {
            _identity(point): Metric(*point) for point in points if _identity(point) not in self._logged[id]
        }
        metrics = list(new.values())
        while len(metrics) > _BATCH:
            self._client.log_batch(id, metrics=metrics[:_BATCH])
            metrics = metrics[_BATCH:]
        if metrics or tags:
            self._client.log_batch(
                id,
                metrics=metrics,
                params=[Param(*item) for item in parameters.items()],
                tags=[RunTag(*item) for item in tags.items()],
            )
        self._logged[id] |= new.keys()


def _identity(point: Point) -> tuple[Any, ...]:
    return (point.name, point.step) if point.name.startswith("train/") else point


# What a whole view has shown.


def is_shown(uri: str, store: Store, sweep: str, results: Sequence[TrialState]) -> bool:
    """Whether the view at `uri` was whole, and nothing has come since."""
    shown = _read_shown(store.sweep_dir(sweep) / SHOWN).get(shown_uri(uri))
    return shown == _marks(results, _failed(sweep, store))


def _marks(results: Sequence[TrialState], failed: set[str]) -> dict[str, str]:
    """Return what there is to show of each trial, by key, as a hash."""
    return {item.record.key: _mark(item, item.record.key in failed) for item in results}


def _mark(result: TrialState, failed: bool) -> str:
    scored = [(item.dataset, item.epoch, item.finished) for item in result.evaluations]
    return _hash([VERSION, asdict(result.record), result.trained_at, scored, failed])[:16]


def _failed(sweep: str, store: Store) -> set[str]:
    return {key for key, note in read_state(sweep, store).trials.items() if note.state == "failed"}


def _read_shown(file: Location) -> dict[str, dict[str, str]]:
    """Return the marks by tracking URI; none where the file is damaged, as the view is completed then."""
    try:
        return {uri: {**marks} for uri, marks in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_shown(file: Location, uri: str, marks: dict[str, str] | None) -> None:
    """Set or forget what the view at `uri` has shown, beside what others have."""
    before = _read_shown(file)
    after = {name: shown for name, shown in before.items() if name != shown_uri(uri)}
    if marks is not None:
        after[shown_uri(uri)] = marks
    if after != before:
        try:
            replace(file, json.dumps(after))
        except (OSError, StorageError):
            logger.exception("%s cannot be written", file)


def _complete_view(
    view: View,
    store: Store,
    declaration: Declaration,
    written: Written,
    marks: Mapping[str, str],
    status: str,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Log each trial whose mark or run is not what it should be, then the report: the new marks."""
    view.open_parent()
    runs, failed = view.trial_runs(), _failed(declaration.sweep, store)
    now = _marks(written.results, failed)
    for done, result in enumerate(written.results, 1):
        key = result.record.key
        of_trial = "FAILED" if key in failed else "RUNNING"
        found = runs.get(key, [])
        if marks.get(key) != now[key] or not view.settled(found, "FINISHED" if result.complete else of_trial):
            view.log_trial(with_scores([result], store)[0], of_trial, found=found)
        step(done, len(written.results))
    view.log_report(written.folder, status)
    return now


# Who writes.


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
    status = "FINISHED" if all(result.complete for result in written.results) else "RUNNING"
    from mlflow.exceptions import MlflowException

    try:
        view = View(uri, store, declaration)
        marks = _complete_view(view, store, declaration, written, {}, status, step)
    except (MlflowException, OSError) as error:
        first = without_credentials(_cause(error), uri)
        raise TrackingError(
            f"MLflow at {shown_uri(uri)} cannot be written to ({first.rstrip('.')}); check --tracking-uri."
        ) from error
    _write_shown(store.sweep_dir(declaration.sweep) / SHOWN, uri, marks)
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True, eq=False)
class _Word:
    """The status to log a trial with. A new one is another object, also where it says the same."""

    status: str


class Tracker:
    """The one writer of a running sweep: a thread that logs what is new every `every_s`. Calls return at once.

    What fails is kept, warned of once, and tried again after `again_s` and by `close`.
    """

    def __init__(
        self, uri: str, store: Store, declaration: Declaration, *, every_s: float = 3.0, again_s: float = 60.0
    ) -> None:
        self._uri, self._store, self._declaration = uri, store, declaration
        self._every_s, self._again_s = every_s, again_s
        self._trials = {trial.key: trial for trial in declaration.trials}
        self._file = store.sweep_dir(declaration.sweep) / SHOWN
        self._marks = _read_shown(self._file).get(shown_uri(uri), {})
        # By trial: the last word on it, and the shown rows of its training, by step, that are to be logged.
        self._words: dict[str, _Word] = {}
        self._rows: dict[str, dict[int, Mapping[str, Any]]] = {}
        self._report: tuple[Written, bool] | None = None
        self._view: View | None = None
        self._trouble: str | None = None
        self._told = self._closing = self._abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    def shows(self, key: str) -> bool:
        """Whether the trial is one of the sweep's, which have a run each."""
        return key in self._trials

    def started(self, key: str) -> None:
        """Note that a trial has begun."""
        self._note(key, "RUNNING")

    def rows(self, key: str, rows: Rows) -> None:
        """Note steps of a trial's training; what else it tells is in no curve."""
        steps = [dict(row) for row in rows if {"step", "time", "total", *CURVES} <= row.keys()]
        with self._changed:
            for row in thinned(steps, int(steps[-1]["total"]) if steps else 0, CURVE_POINTS):
                # A resumed training does some of its steps again.
                self._rows.setdefault(key, {}).setdefault(int(row["step"]), row)
            self._changed.notify()

    def ended(self, key: str, *, failed: bool) -> None:
        """Note that a trial has ended, well or not."""
        self._note(key, "FAILED" if failed else "RUNNING")

    def close(
        self, written: Written | None = None, *, complete: bool = False, timeout_s: float = 120.0
    ) -> str | None:
        """Try once more, for at most `timeout_s`; with a report, make the view whole. Why it lacks something, if it does."""
        with self._changed:
            self._closing = True
            self._report = None if written is None else (written, complete)
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandoned = True
            return f"{shown_uri(self._uri)} did not take everything within {timeout_s:.0f} s"
        return self._trouble if self._words or self._rows or self._report else None

    def _note(self, key: str, status: str) -> None:
        if not self._told:
            # Until the end the view is not whole, whatever ends this process.
            self._told = True
            _write_shown(self._file, self._uri, None)
        with self._changed:
            self._words[key] = _Word(status)
            self._changed.notify()

    def _write(self) -> None:
        pause = self._every_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._words or self._rows or self._closing)
                self._changed.wait_for(lambda: self._closing, pause)
                last = self._closing
            pause = self._every_s if self._try_all() else self._again_s
            if last:
                return

    def _try_all(self) -> bool:
        """Try once to log all that is new, the report last; whether everything went well."""
        well = True
        with self._changed:
            keys: list[str | None] = [*dict.fromkeys((*self._words, *self._rows))]
        for key in [*keys, None]:
            if self._abandoned or (key is None and self._report is None):
                return well
            try:
                self._view = view = self._view or View(self._uri, self._store, self._declaration)
            except Exception as error:
                self._failed(error)
                return False
            try:
                if key is None:
                    self._finish(view)
                else:
                    self._tell(view, key)
            except Exception as error:
                self._failed(error)
                well = False
        return well

    def _tell(self, view: View, key: str) -> None:
        with self._changed:
            word, rows = self._words.get(key), dict(self._rows.get(key, {}))
        if word is None and view.knows(key):
            view.log_rows(key, list(rows.values()))
        else:
            result, status = trial_result(self._trials[key], self._store), word.status if word else "RUNNING"
            view.log_trial(result, status, live=list(rows.values()))
            self._marks[key] = _mark(result, status == "FAILED")
        with self._changed:
            # What was noted meanwhile is still to be logged.
            if self._words.get(key) is word:
                self._words.pop(key, None)
            left = {step: row for step, row in self._rows.pop(key, {}).items() if step not in rows}
            if left:
                self._rows[key] = left

    def _finish(self, view: View) -> None:
        assert self._report is not None
        written, complete = self._report
        status = "FINISHED" if complete else "FAILED"
        marks = _complete_view(view, self._store, self._declaration, written, self._marks, status)
        _write_shown(self._file, self._uri, marks)
        self._report = None

    def _failed(self, error: Exception) -> None:
        self._view = None
        if self._trouble is None:
            details = without_credentials("".join(traceback.format_exception(error)), self._uri)
            logger.error("MLflow at %s, to be tried again: %s", shown_uri(self._uri), details)
        self._trouble = without_credentials(f"{self._uri}: {_cause(error)}", self._uri)


def _cause(error: Exception) -> str:
    """Return one line, in the system's own words where there are any, which MLflow wraps in three layers of others."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    from_system = [item for item in chain if isinstance(item, OSError)]
    told = error if isinstance(error, SweepError) or not from_system else from_system[-1]
    return f"{type(told).__name__}: {(str(told).splitlines() or [''])[0]}"
