"""Trainings in a gang, many in one process, and forked from one that has paid for the imports.

Real launchers are used by tests/trainers/test_commands.py.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.machine import free_port
from tests.faults.lives import forked, output
from tests.trainers import trainings
from trainers.data import worlds
from trainers.errors import Interrupted
from trainers.evaluate.scoring import compute_reference
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenPair, tokenize_pairs
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, LoraSpec, LossSpec, OptimSpec, Placement
from trainers.storage import parse_uri
from trainers.train.checkpoints import Checkpoints
from trainers.train.loop import train
from trainers.train.stopping import never

EX_RM = RewardSpec(kind="ex_rm")
IM_RM = RewardSpec(kind="im_rm", beta=0.1)
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training; after `stop_after` steps it is asked to stop, which writes a checkpoint.

    With a `mirror` (s3://…) every rank is on a node of its own: it shares no folder with the others. The first
    `validation` pairs are scored after every epoch. `partitions_all` is what a real model's size does: ZeRO-3 otherwise
    keeps weights as small as a tiny model's on every rank.
    """

    name: str
    model: str
    out: str
    reward: dict[str, Any]
    placement: dict[str, Any]
    optim: dict[str, Any]
    pairs: int
    precision: str = "fp32"
    checkpoints: str | None = None
    every_steps: int = 3
    stop_after: int | None = None
    mirror: str | None = None
    validation: int = 0
    partitions_all: bool = False
    lora: dict[str, Any] | None = None
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    ties: bool = False
    merge: bool = False


def pairs_for(model: Path, count: int, *, ties: bool = False) -> list[TokenPair]:
    """Pairs of the tiny world with rewritings, their lengths 10:1, so that ranks have uneven work; every third may be a tie."""
    tokenizer = load_tokenizer(str(model))
    rows = (worlds.pairs_with_rewording("train") * 2)[:count]
    pairs, _ = tokenize_pairs(rows, tokenizer, DrawSpec())

    def longer(pair: TokenPair, n: int, **more: Any) -> TokenPair:
        return dataclasses.replace(pair, prompt=pair.prompt * (1 + 9 * (n % 2)), margin=n % 5 / 2, **more)

    return [
        longer(pair, n, rewriting=longer(pair.rewriting, n), tie=ties and n % 3 == 1)
        for n, pair in enumerate(pairs)
        if pair.rewriting
    ]


def launch(jobs: Sequence[Job], folder: Path, world_size: int) -> dict[str, dict[str, Any]]:
    """Run the jobs in one gang; name → {log, perf} (log None where it was stopped)."""
    # The full product has 64 jobs in a gang.
    return together(functools.partial(_run_all, jobs), folder, world_size, max(1200, 400 + 15 * len(jobs)))


def together(work: Callable[[], Any], folder: Path, world_size: int, within_s: float = 400.0) -> Any:
    """Call `work` in every rank of a gang, and return what it gives in the first one, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "found.json"
    environments = _environments(world_size)
    names = [folder / f"rank{rank}" for rank in range(world_size)]
    ranks = [
        forked(name, _rank, (work, file, environment))
        for name, environment in zip(names, environments, strict=True)
    ]
    deadline = time.monotonic() + within_s
    try:
        # One that fails leaves the others waiting for it.
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert time.monotonic() < deadline, [output(name)[-2000:] for name in names]
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world_size, [output(name)[-2000:] for name in names]
    return json.loads(file.read_text())


def _environments(world_size: int) -> list[dict[str, str]]:
    """Of each rank; what a launcher says to more than one."""
    if world_size == 1:
        return [dict(os.environ)]
    size = str(world_size)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(world_size))]


def _rank(work: Callable[[], Any], file: Path, environment: dict[str, str]) -> None:
    """Call `work`; rank 0 writes what came of it to the file."""
    # The process that this one is forked from has the environment of an earlier test.
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    if "RANK" in environment:
        # As Ray Train does: the launcher makes the group, and each training joins it.
        torch.distributed.init_process_group("gloo")
    found = work()
    if environment.get("RANK", "0") == "0":
        file.write_text(json.dumps(found))
    if "RANK" in environment:
        # Rank 0 serves the group's store until the last has left.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _run_all(jobs: Sequence[Job]) -> dict[str, Any]:
    return {job.name: _run(job) for job in jobs}


def _run(job: Job, report: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    pairs = pairs_for(Path(job.model), job.pairs, ties=job.ties)
    reward = RewardSpec(**job.reward)
    reference = None
    if reward.uses_reference:
        policy = trainings.load(Path(job.model), "unembedding", job.precision)
        reference = compute_reference(policy, pairs, report=lambda row: None)
    inputs = trainings.inputs(
        Path(job.model),
        pairs,
        precision=job.precision,
        reward=reward,
        optim=OptimSpec(**job.optim),
        placement=Placement(**job.placement),
        seed=SEED,
        reference=reference,
        validation=pairs[: job.validation],
        lora=None if job.lora is None else LoraSpec(**job.lora),
        loss=LossSpec(**job.loss),
        merge=job.merge,
    )
    kept = _kept(job)
    steps = itertools.count(1)
    try:
        with _partitioning_all() if job.partitions_all else contextlib.nullcontext():
            result = train(
                inputs,
                report=report,
                out_dir=Path(job.out),
                checkpoints=kept,
                # Asked once a step, before it is made.
                stop=never
                if job.stop_after is None
                else lambda: 60.0 if next(steps) == job.stop_after else None,
            )
    except Interrupted:
        return {"log": None}
    return {"log": result.log, "perf": result.perf}


@contextlib.contextmanager
def _partitioning_all() -> Iterator[None]:
    import deepspeed

    def initialize(*, config: dict[str, Any], **others: Any) -> Any:
        zero = {**config["zero_optimization"], "stage3_param_persistence_threshold": 0}
        return begin(config={**config, "zero_optimization": zero}, **others)

    begin = deepspeed.initialize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", initialize)
        yield


def _kept(job: Job) -> Checkpoints | None:
    if job.checkpoints is None:
        return None
    folder = Path(job.checkpoints)
    if job.mirror is None:
        return Checkpoints(folder=folder, every_steps=job.every_steps)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    alone = folder / f"node{os.environ.get('RANK', '0')}"
    return Checkpoints(folder=alone, every_steps=job.every_steps, mirror=parse_uri(job.mirror))
