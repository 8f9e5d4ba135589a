"""How tight a grid is packed: the paper's 72 trials on four nodes of eight logical GPUs, trainings asleep.

python -m benchmarks.makespan

Tune, the coordinator, the gate, placement, leases, the store and the state file are the real ones. Each gang is one
task that holds its GPUs and sleeps; what it sleeps is planned from model size, scaled to --lower-bound-s.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tyro

from benchmarks.load import dataset_folder, model_folder, print_table, run_s, session_of, storage_of
from benchmarks.load_stages import NoView, standing_in_on_ray
from orchestrator.cli import run
from orchestrator.cli.options import Options
from orchestrator.cli.session import Session, select
from orchestrator.plan.hardware import Node
from orchestrator.plan.placement import place
from orchestrator.plan.schedule import Job, Request, lower_bound_s, predicted_s, ranked
from orchestrator.spec.catalog import ARCHITECTURES, LAPTOP, PAPER_MODELS
from orchestrator.spec.selection import Selection
from orchestrator.spec.trials import Sweep, TrialSpec
from orchestrator.store.records import read_state
from orchestrator.tracking import mlflow
from sweeps.full_grid import full_grid

NAME = "makespan"
GPU_GB = 80.0
KIND = {"accelerator_type:H100": 1}
SHAPES = {model.name: ARCHITECTURES[model.source] for model in PAPER_MODELS}
# Processes before they are wanted, one for each CPU that a node says it has, would take those that the machine has.
RAY_CONFIG = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


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
    storage: Path | None = None
    """Where the artifacts are kept (default: a temporary folder that is removed at the end)."""

    @property
    def capacity(self) -> list[Node]:
        """The logical cluster, for placement and the bound."""
        names = (f"n{number}" for number in range(self.nodes))
        return [Node(id=name, cpus=self.gpus + 2, gpus=self.gpus, gpu_gb=GPU_GB) for name in names]


def make_session(asked: Makespan, folder: Path) -> Session:
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
    return session_of(options, folder)


def sized_grid(chosen: Selection) -> Sweep:
    """The full grid, each model of the size and precision that its name has in the catalog."""
    known = {model.name: model for model in PAPER_MODELS}

    def sized(trial: TrialSpec) -> TrialSpec:
        like = known[trial.model.name]
        model = dataclasses.replace(trial.model, parameters=like.parameters, precision=like.precision)
        return dataclasses.replace(trial, model=model)

    sweep = full_grid(chosen)
    return dataclasses.replace(sweep, trials=tuple(map(sized, sweep.trials)))


def planned_jobs(trials: Sequence[TrialSpec], nodes: Sequence[Node]) -> list[Job]:
    """The trainings as the placement has them, unscaled."""
    from benchmarks.makespan_stages import planned_s

    jobs = []
    for trial in trials:
        shapes = SHAPES[trial.model.name]
        placement = place(trial, nodes, architecture=shapes)
        seconds = planned_s(shapes, trial, trial.model.precision, placement)
        jobs.append(Job(request=Request.of("train", trial.name, placement, seconds), takes_s=seconds))
    return jobs


@contextlib.contextmanager
def logical_cluster(asked: Makespan) -> Iterator[None]:
    """A Ray of several nodes on this machine, at RAY_ADDRESS; its GPUs are numbers."""
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": asked.gpus + 2, "num_gpus": asked.gpus, "resources": dict(KIND)}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**size, "include_dashboard": False, "_system_config": RAY_CONFIG},
    )
    try:
        for _ in range(asked.nodes - 1):
            cluster.add_node(**size)
        with mock.patch.dict(os.environ, RAY_ADDRESS=cluster.address):
            yield
    finally:
        cluster.shutdown()


def main(asked: Makespan) -> None:
    """Run the grid, and print the table."""
    from benchmarks.makespan_stages import sleeping

    with (
        storage_of(asked.storage) as folder,
        mock.patch.object(mlflow, "Tracker", NoView),
        # The folders that stand for the models hold a few numbers each.
        mock.patch.object(run, "architectures", lambda models, **_: {m: SHAPES[m.name] for m in models}),
    ):
        session = make_session(asked, Path(folder))
        trials = sized_grid(select(session.options, LAPTOP, NAME)).trials
        jobs = planned_jobs(trials, asked.capacity)
        scale = asked.lower_bound_s / lower_bound_s(jobs, asked.capacity)
        with logical_cluster(asked), standing_in_on_ray(sleeping(scale, SHAPES)):
            _print(asked, session, jobs, scale, run_s(session, sized_grid))


def _print(asked: Makespan, session: Session, jobs: Sequence[Job], scale: float, took_s: float) -> None:
    notes = read_state(NAME, session.store).trials.values()
    played_s = scale * predicted_s(ranked([job.request for job in jobs], asked.capacity), asked.capacity)
    seconds, widths = [job.takes_s * scale for job in jobs], [job.request.width for job in jobs]
    rows = (
        ("trials complete", f"{sum(note.state == 'complete' for note in notes)} of {len(jobs)}"),
        ("attempts again", f"{sum(len(note.retries) for note in notes)}"),
        ("trainings by GPUs", ", ".join(f"{widths.count(w)} × {w}" for w in sorted(set(widths)))),
        ("shortest and longest training, s", f"{min(seconds):.0f}, {max(seconds):.0f}"),
        ("lower bound, s", f"{asked.lower_bound_s:.0f}"),
        ("makespan of the trainings, simulated, s", f"{played_s:.0f}"),
        ("makespan, the whole command, s", f"{took_s:.0f}"),
        ("makespan / lower bound", f"{took_s / asked.lower_bound_s:.3f}"),
    )
    print_table(f"{len(jobs)} trials on {asked.nodes} × {asked.gpus} logical GPUs", rows)


if __name__ == "__main__":
    main(tyro.cli(Makespan))
