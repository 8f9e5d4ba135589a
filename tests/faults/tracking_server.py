"""A real MLflow server for tests, and everything that a person can see on one."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.tracking.database import EXPERIMENT

START_S = 400.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def migrated_database(folder: Path) -> Path:
    """A database without runs: migrating takes MLflow seconds, copying nothing."""
    from mlflow import MlflowClient

    file = folder / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@contextlib.contextmanager
def tracking_server(folder: Path, database: Path | None = None) -> Iterator[str]:
    """The URI of a server on <folder>/mlflow.db, a copy of `database` or new; ended with everything it started."""
    if database is not None:
        shutil.copy(database, folder / "mlflow.db")
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        uri.rsplit(":", 1)[1],
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(uri):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def runs_of(uri: str, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], f"tags.`rmsweep.sweep` = '{name}'")
    return sorted(found, key=lambda run: (run.data.tags["rmsweep.role"], run.info.run_name))


def history(uri: str, run: Any) -> dict[str, list[tuple[int, int, float]]]:
    """Every point of every metric of a run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return {
        name: sorted(
            (point.step, point.timestamp, point.value)
            for point in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }


def files(uri: str, run: Any, path: str | None = None) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found: list[str] = []
    for item in client.list_artifacts(run.info.run_id, path):
        found += files(uri, run, item.path) if item.is_dir else [item.path]
    return sorted(found)


def snapshot(uri: str, name: str) -> list[dict[str, Any]]:
    """Everything that a person can see of a sweep, without the ids and times of its runs."""
    runs = runs_of(uri, name)
    names = {run.info.run_id: run.info.run_name for run in runs}
    return [
        {
            "name": run.info.run_name,
            "status": run.info.status,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "tags": {tag: value for tag, value in run.data.tags.items() if tag.startswith("rmsweep.")},
            "params": run.data.params,
            "history": history(uri, run),
            "inputs": sorted(
                (item.dataset.name, item.dataset.digest, item.tags[0].value)
                for item in run.inputs.dataset_inputs
            ),
            "files": files(uri, run),
        }
        for run in runs
    ]


def without_sweep(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parent, *children = runs
    parent = {**parent, "name": "", "tags": {}}
    return [parent, *({**child, "parent": "", "tags": child["tags"]["rmsweep.key"]} for child in children)]
