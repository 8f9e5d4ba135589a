"""Stages that compute nothing and commit real artifacts at once, and how they stand in the place of the product's."""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from orchestrator.run.compute import TrainCall
from orchestrator.run.events import TakeRow
from orchestrator.run.workers import set_ray_environment
from orchestrator.spec.stages import EvaluateStage, SharedStage, TrainStage
from orchestrator.store.artifacts import WEIGHTS, Store
from trainers.evaluate.scores import write_scores
from trainers.pairs.tokens import TokenPair

REPOSITORY = str(Path(__file__).resolve().parents[1])
PAIRS = 8
CHATTY_ROWS = 60


def shared_at_once(stage: SharedStage, store: Store, report: TakeRow) -> None:
    """An artifact that holds its key."""
    with store.write(stage.kind, stage.key) as attempt:
        (attempt.directory / "key.txt").write_text(stage.key)
        attempt.info.update(pid=os.getpid())


def train_at_once(
    stage: TrainStage,
    call: TrainCall,
    store: Store,
    report: TakeRow,
    *,
    steps: int = 3,
    every_s: float = 0.0,
) -> None:
    """Report some steps, and leave a log and a manifest as a training does."""
    log = [_row(step, steps) for step in range(1, steps + 1)]
    with store.write(stage.kind, stage.key, model=stage.base.key, data=stage.prepared.key) as attempt:
        began = time.monotonic()
        for number, row in enumerate(log, 1):
            report(row)
            time.sleep(max(0.0, began + number * every_s - time.monotonic()))
        parquet.write_table(pa.Table.from_pylist(log), attempt.directory / "log.parquet")
        perf = {"tokens_per_s": 1.0, "pairs_per_s": 1.0, "step_s": 1.0, "peak_mem_gb": 0.1}
        attempt.info.update(pairs=100, train_accuracy=1.0, perf=perf, pid=os.getpid(), **call.provenance)
        with store.write(WEIGHTS, stage.key):
            pass


def evaluate_at_once(stages: Sequence[EvaluateStage], store: Store, report: TakeRow) -> None:
    """Scores of a few pairs for each set, drawn from its key."""
    pairs = [TokenPair(index=i, prompt=[1], chosen=[2], rejected=[3]) for i in range(PAIRS)]
    for stage in stages:
        seed = int.from_bytes(hashlib.sha256(stage.key.encode()).digest()[:8], "big")
        chosen, rejected = np.random.default_rng(seed).normal(size=(2, PAIRS))
        name = stage.prepared.split.name
        with store.write(stage.kind, stage.key, train=stage.train.key, data=stage.prepared.key) as attempt:
            found = write_scores(attempt.directory / "scores.parquet", name, pairs, chosen, rejected)
            attempt.info.update(metrics=found, dataset=name, pid=os.getpid())


def _row(step: int, total: int) -> dict[str, Any]:
    measured = {"loss": 1.0 / step, "accuracy": 1.0, "margin": 0.1 * step, "grad_norm": 1.0, "lr": 1e-6}
    return {"step": step, "total": total, "epoch": 0, **measured, "time": time.time()}


class NoView:
    """What stands in the place of MLflow's writer: a view that shows nothing."""

    def __init__(self, *_: object) -> None: ...

    def note(self, *_: object) -> None: ...

    def close(self, *_: object, **__: object) -> None: ...


# What stands in the place of functions of the product, by where these are looked up.
Stages = Mapping[str, Callable[..., Any]]
AT_ONCE: Stages = {
    "orchestrator.run.compute.run_shared": shared_at_once,
    "orchestrator.run.compute.run_train": train_at_once,
    "orchestrator.run.compute.run_evaluations": evaluate_at_once,
}
# Twenty rows a second for three seconds.
CHATTY: Stages = {
    **AT_ONCE,
    "orchestrator.run.compute.run_train": functools.partial(train_at_once, steps=CHATTY_ROWS, every_s=0.05),
}


@contextlib.contextmanager
def standing_in(stages: Stages) -> Iterator[None]:
    """Put them in the place of the product's functions in this process."""
    with contextlib.ExitStack() as stack:
        for name, function in stages.items():
            stack.enter_context(mock.patch(name, function))
        yield


@contextlib.contextmanager
def standing_in_on_ray(stages: Stages) -> Iterator[None]:
    """The same in every process of a Ray that is joined or started meanwhile."""
    set_ray_environment()
    from orchestrator.run.ray.cluster import ray_options

    def set_up() -> None:
        for name, function in stages.items():
            mock.patch(name, function).start()

    def options() -> dict[str, Any]:
        given = ray_options()
        runtime = given["runtime_env"]
        # A worker reads the hook, which names modules of this repository, before it knows the driver's path.
        path = os.pathsep.join(filter(None, (REPOSITORY, os.environ.get("PYTHONPATH"))))
        variables = {**runtime["env_vars"], "PYTHONPATH": path}
        hooked = {**runtime, "env_vars": variables, "worker_process_setup_hook": set_up}
        return {**given, "runtime_env": hooked}

    with standing_in({**stages, "orchestrator.run.ray.cluster.ray_options": options}):
        yield
