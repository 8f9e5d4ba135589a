"""How long `sync` takes to rebuild the MLflow view of a sweep, on a database and on a server.

python -m benchmarks.sync --trials 72

The artifacts are simulated, the view and the server are the real ones. Each is built twice: into an empty place, and
over what is there, which is to change nothing.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.simulated import ULTRAFEEDBACK, simulated_sweep
from orchestrator.report.results import trial_states
from orchestrator.report.summary import Shown, Written, write_report
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration
from orchestrator.tracking.database import default_uri
from orchestrator.tracking.mlflow import sync

MODELS = (
    "pythia-1b",
    "qwen2.5-1.5b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "gemma-2-2b",
    "llama-3.1-8b",
)
REWARDS = ("ex_rm", "im_rm")
TRAIN_SETS = ("ultrafeedback", "rewardmath")
AIMS_S = {"sqlite": 60, "server": 180}
START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """A simulated sweep in the shape of the paper's: six models, two reward types, two training sets."""

    trials: int = 72
    steps: int = 500
    """Steps of each training, of which the view shows 100."""
    pairs: int = 200
    """Pairs of each evaluation set."""
    sets: int = len(ULTRAFEEDBACK)
    """Evaluation sets."""


def paper_sweep(store: Store, rebuild: Rebuild, *, name: str = "full_grid") -> Declaration:
    """Commit the trials of a sweep like the paper's, with as many seeds as they come to."""
    per_seed = len(MODELS) * len(REWARDS) * len(TRAIN_SETS)
    declared = simulated_sweep(
        store,
        name=name,
        models=MODELS,
        train_sets=TRAIN_SETS,
        seeds=range(-(-rebuild.trials // per_seed)),
        sets=ULTRAFEEDBACK[: rebuild.sets],
        pairs=rebuild.pairs,
        steps=rebuild.steps,
    )
    return replace(declared, trials=declared.trials[: rebuild.trials])


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URI of an MLflow server on loopback with an empty database in `folder`; ended with all it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "server-artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        _wait_for(uri, server, log)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError(f"MLflow's server did not start: {log.read_text()[-2000:]}")


def rebuilt_s(uri: str, store: Store, declared: Declaration) -> float:
    """Seconds of reading every artifact, and writing the view."""
    started = time.perf_counter()
    folder = store.sweep_dir(declared.sweep) / "report"
    states = trial_states(declared.trials, store)
    sync(uri, store, declared, Written(folder=folder, results=states, shown=Shown()))
    return time.perf_counter() - started


def main(rebuild: Rebuild) -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = Store(folder / "store")
        declared = paper_sweep(store, rebuild)
        write_report(declared, store)
        table = Table(title=f"sync of {rebuild.trials} trials, seconds", title_justify="left")
        for column in ("where", "into an empty place", "once more", "aim"):
            table.add_column(column, justify="left" if column == "where" else "right")
        with served(folder) as server:
            for where, uri in (("sqlite", default_uri(store)), ("server", server)):
                took = [rebuilt_s(uri, store, declared) for _ in range(2)]
                table.add_row(where, *(f"{seconds:.1f}" for seconds in took), f"< {AIMS_S[where]}")
        Console().print(table)
        Console().print(f"load average of this machine: {os.getloadavg()[0]:.1f}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Rebuild))
