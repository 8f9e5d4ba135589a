"""How tight a grid is packed: the paper's 72 trials on four nodes of eight logical GPUs, trainings asleep.

python -m benchmarks.makespan [--kill-node]

Tune, the coordinator, the gate, placement, leases, the store and the state file are the real ones. Each gang is one
actor that holds its GPUs and sleeps; what it sleeps is planned from model size, scaled to --lower-bound-s.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.load import benchmark_folder, dataset_folder, model_folder
from benchmarks.no_view import NoView
from orchestrator.cli import run
from orchestrator.cli.options import Options
from orchestrator.cli.session import Session, select
from orchestrator.plan.capacity import Node
from orchestrator.plan.estimate import Job, lower_bound_s
from orchestrator.plan.placement import place
from orchestrator.spec.catalog import ARCHITECTURES, PAPER_MODELS
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_state
from orchestrator.tracking import mlflow
from sweeps.full_grid import full_grid

NAME = "makespan"
GPU_GB = 80.0
KIND = {"accelerator_type:H100": 1}
SHAPES = {model.name: ARCHITECTURES[model.source] for model in PAPER_MODELS}
# A node is given up after ten silent seconds, where Ray by itself takes half a minute; processes before they are
# wanted, one for each CPU that a node says it has, would take those that the machine has.
RAY_CONFIG = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 10,
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Makespan:
    """The grid and the cluster."""

    trials: int = 72
    """The first N of the paper's grid."""
    nodes: int = 4
    gpus: int = 8
    """Logical GPUs of a node."""
    lower_bound_s: float = 1200.0
    """Seconds that no schedule of the trainings can beat."""
    kill_node: bool = False
    """Kill one node in the middle."""
    storage: Path | None = None
    """Where the artifacts are kept (default: a temporary folder that is removed at the end)."""


def make_session(asked: Makespan, folder: Path, stages: Any) -> Session:
    """The invocation over the paper's models in name and size; its files are in `folder`."""
    options = Options(
        profile="laptop",
        name=NAME,
        models=tuple(f"{name}={model_folder(folder / name, n)}" for n, name in enumerate(SHAPES)),
        train_sets=(dataset_folder(folder / "ultrafeedback", 0), dataset_folder(folder / "rewardmath", 1)),
        eval_sets=(
            dataset_folder(folder / "ultrafeedback_test", 2),
            dataset_folder(folder / "rewardmath_test", 3),
        ),
        seeds=(0, 1, 2),
        max_trials=asked.trials,
    )
    store = Store(folder / "store")
    return Session(
        options=options,
        sweep_name=NAME,
        store=store,
        tracking_uri=mlflow.default_uri(store),
        folder=folder,
        console=Console(file=io.StringIO(), width=120),
        stages=stages,
    )


def sized_grid(chosen: Selection) -> Sweep:
    """The full grid, each model of the size and precision that its name has in the catalog."""
    sweep = full_grid(chosen)
    return dataclasses.replace(sweep, trials=tuple(map(_sized, sweep.trials)))


def _sized(trial: TrialSpec) -> TrialSpec:
    (known,) = [model for model in PAPER_MODELS if model.name == trial.model.name]
    model = dataclasses.replace(trial.model, parameters=known.parameters, precision=known.precision)
    return dataclasses.replace(trial, model=model)


def planned_work(trials: Sequence[TrialSpec], nodes: Sequence[Node]) -> list[tuple[float, int]]:
    """(seconds, GPUs) of each training as the placement has it, unscaled."""
    from benchmarks.makespan_stages import planned_s

    placements = [(trial, place(trial, nodes, architecture=SHAPES[trial.model.name])) for trial in trials]
    return [
        (planned_s(SHAPES[trial.model.name], trial, trial.model.precision, placement), placement.world_size)
        for trial, placement in placements
    ]


def lower_bound(work: Sequence[tuple[float, int]], gpus: int) -> float:
    """Of any schedule: all work on all GPUs, and the longest training."""
    jobs = [Job(id=str(n), width=width, seconds=seconds) for n, (seconds, width) in enumerate(work)]
    return lower_bound_s(jobs, gpus)


@contextlib.contextmanager
def logical_cluster(asked: Makespan) -> Iterator[Any]:
    """A Ray of several nodes on this machine, at RAY_ADDRESS; its GPUs are numbers."""
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": asked.gpus + 2, "num_gpus": asked.gpus, "resources": dict(KIND)}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "_system_config": RAY_CONFIG})
    try:
        for _ in range(asked.nodes - 1):
            cluster.add_node(**size)
        with mock.patch.dict(os.environ, RAY_ADDRESS=cluster.address):
            yield cluster
    finally:
        cluster.shutdown()


def kill_in_the_middle(cluster: Any, storage: Path, after_s: float, killed: list[float]) -> None:
    """Wait for the first training, then for `after_s` seconds, and kill a node that is not the head."""
    while not list((storage / "checkpoints").glob("*/slept")):
        time.sleep(0.1)
    began = time.monotonic()
    time.sleep(after_s)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    killed.append(time.monotonic() - began)


def main(asked: Makespan) -> None:
    """Run the grid, and print the table."""
    from benchmarks.makespan_stages import sleeping

    nodes = [
        Node(id=f"n{i}", cpus=asked.gpus + 2, gpus=asked.gpus, gpu_gb=GPU_GB) for i in range(asked.nodes)
    ]
    seen: list[Sequence[TrialSpec]] = []

    def build(chosen: Selection) -> Sweep:
        sweep = sized_grid(chosen)
        seen.append(sweep.trials)
        return sweep

    with (
        benchmark_folder(asked.storage, "makespan") as folder,
        mock.patch.object(mlflow, "Tracker", NoView),
        # The folders that stand for the models hold a few numbers each.
        mock.patch.object(run, "architectures", lambda models, **_: {m: SHAPES[m.name] for m in models}),
    ):
        gpus = asked.nodes * asked.gpus
        work = planned_work(_trials(asked, folder), nodes)
        scale = asked.lower_bound_s / lower_bound(work, gpus)
        session = make_session(asked, folder, sleeping(scale, SHAPES))
        killed: list[float] = []
        with logical_cluster(asked) as cluster:
            if asked.kill_node:
                arguments = (cluster, session.store.root, asked.lower_bound_s / 2, killed)
                threading.Thread(target=kill_in_the_middle, args=arguments, daemon=True).start()
            code = run.run(session, build)
        if code:
            sys.exit(f"exit code {code}: {session.console.file.getvalue()}")  # type: ignore[attr-defined]
        if asked.kill_node and not killed:
            sys.exit("no node was killed")
        _print(asked, session, [(seconds * scale, width) for seconds, width in work], killed)


def _trials(asked: Makespan, folder: Path) -> Sequence[TrialSpec]:
    from orchestrator.spec import catalog

    session = make_session(asked, folder, None)
    return sized_grid(select(session.options, catalog.LAPTOP, NAME)).trials


def _print(
    asked: Makespan, session: Session, work: Sequence[tuple[float, int]], killed: Sequence[float]
) -> None:
    phases = json.loads((session.store.sweep_dir(NAME) / "phases.json").read_text())
    gpus = asked.nodes * asked.gpus
    bound_s = lower_bound(work, gpus)
    area = sum(seconds * width for seconds, width in work)
    if killed:
        # The same work on fewer GPUs from then on.
        bound_s = killed[0] + (area - killed[0] * gpus) / (gpus - asked.gpus)
    notes = read_state(NAME, session.store).trials.values()
    makespan_s = phases["trials"]
    widths = [width for _, width in work]
    table = Table(
        title=f"{len(work)} trials on {asked.nodes} × {asked.gpus} logical GPUs", title_justify="left"
    )
    table.add_column("what")
    table.add_column("measured", justify="right")
    rows = [
        ("trials complete", f"{sum(note.state == 'complete' for note in notes)} of {len(work)}"),
        ("trainings by GPUs", ", ".join(f"{widths.count(w)} × {w}" for w in sorted(set(widths)))),
        ("shortest and longest training, s", f"{min(work)[0]:.0f}, {max(work)[0]:.0f}"),
        *(("node killed after the first training began, s", f"{at:.0f}") for at in killed),
        ("attempts again", f"{sum(len(note.retries) for note in notes)}"),
        ("trainings re-planned", f"{sum(bool(note.replanned) for note in notes)}"),
        ("lower bound, s", f"{bound_s:.0f}"),
        ("makespan, Tune's start and end included, s", f"{makespan_s:.0f}"),
        ("makespan / lower bound", f"{makespan_s / bound_s:.3f}"),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Makespan))
