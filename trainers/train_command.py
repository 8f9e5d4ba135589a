"""`python -m trainers.train`: one training without Ray, in one process or under torchrun or the deepspeed launcher."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch.distributed as dist
from pyarrow import parquet

from trainers.checkpoints import Checkpoints
from trainers.command import (
    dump,
    model_folder,
    named_reward,
    plain_name,
    read_named_pairs,
    say_counts,
)
from trainers.engine import process_group
from trainers.errors import SpecError
from trainers.inputs import TrainInputs
from trainers.models import device, load_model
from trainers.packing import References
from trainers.pairs import TokenPair, tokenize_pairs
from trainers.reference import compute_reference
from trainers.specs import DrawSpec, OptimSpec, Placement, Precision, Trust
from trainers.stopping import GRACE_S, StopRequest
from trainers.templates import load_tokenizer
from trainers.train import TrainResult, train


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a reward model; ranks are the launcher's. Run again, it goes on from its last checkpoint."""

    model: str
    """Folder, GGUF file or hub id; also the reference of im_rm."""
    reward: str
    """ex_rm, im_rm, ex_grm, or an ablation: ex_rm_mean, im_rm_no_reference."""
    data: str
    """File, folder, built-in set or hub id of prompt, chosen, rejected."""
    out: Path
    """Folder for model/, log.parquet and, meanwhile, checkpoints/."""
    split: str = "train"
    """Split of a folder or hub set."""
    beta: float | None = None
    """β of im_rm (default 0.01)."""
    optim: OptimSpec = field(default_factory=OptimSpec)
    seed: int = 0
    """Of the head, the order of pairs, and the draw."""
    max_pairs: int | None = None
    """Train on the first N of a seeded permutation."""
    max_prompt_tokens: int = 1024
    """Pairs with a longer prompt are left out and counted, never cut."""
    max_response_tokens: int = 1024
    """Pairs with a longer response are left out and counted, never cut."""
    precision: Precision = "fp32"
    """bf16 keeps fp32 master weights."""
    zero_stage: int = 0
    """ZeRO stage of DeepSpeed."""
    micro_batch: int = 4
    """Pairs of a forward; the accumulation follows from it, the ranks and the effective batch."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory."""
    checkpoint_steps: int | None = None
    """Optimiser steps between checkpoints (default: one every ten minutes)."""
    grace_s: float = GRACE_S
    """Seconds that SIGINT or SIGTERM leave for a last checkpoint."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Danger: a pickle can run any code of its author."""
    trust_remote_code: bool = False
    """Run the Python files of a model's folder. Danger: any code of its author runs with your rights."""
    # The deepspeed launcher gives it to every rank; the environment says the same.
    local_rank: int = 0
    """Given by the deepspeed launcher."""


def run(arguments: Train) -> None:
    """Train, and put the finished model into `out`. Raises SweepError."""
    world_size, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    final, draft = arguments.out / "model", arguments.out / "draft"
    if final.exists():
        raise SpecError(f"{final} is there already; give another --out.")
    reward = named_reward(arguments.reward, arguments.beta)
    placement = _placement(arguments, world_size)
    limits = DrawSpec(
        max_pairs=arguments.max_pairs,
        seed=arguments.seed,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_response_tokens,
    )
    trust = Trust(allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code)
    _name, rows = read_named_pairs(arguments.data, arguments.split)
    with model_folder(arguments.model) as location, process_group():
        pairs, counts = tokenize_pairs(
            rows, load_tokenizer(location, trust=trust), limits, reward.type.rendering
        )
        say_counts(counts, len(pairs), limits, arguments.model)
        inputs = TrainInputs(
            name=plain_name(Path(arguments.model).absolute().name, "model"),
            location=location,
            revision=None,
            precision=arguments.precision,
            reward=reward,
            optim=arguments.optim,
            placement=placement,
            seed=arguments.seed,
            pairs=pairs,
            reference=_reference(location, arguments.precision, pairs, trust)
            if reward.uses_reference
            else None,
            trust=trust,
        )
        if first:
            shutil.rmtree(draft, ignore_errors=True)
        checkpoints = Checkpoints(
            folder=arguments.out / "checkpoints", every_steps=arguments.checkpoint_steps
        )
        result = _train(inputs, draft, checkpoints, arguments.grace_s)
    if first:
        parquet.write_table(pa.Table.from_pylist(result.log), arguments.out / "log.parquet")
        (draft / "model").rename(final)
        draft.rmdir()
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        print(dump({"train_accuracy": result.train_accuracy, **result.perf}))


def _train(inputs: TrainInputs, out_dir: Path, checkpoints: Checkpoints, grace_s: float) -> TrainResult:
    request = StopRequest(grace_s)
    with request.listening(), request.deferred():
        return train(inputs, report=_say_step, out_dir=out_dir, checkpoints=checkpoints, stop=request.left_s)


def _placement(arguments: Train, world_size: int) -> Placement:
    batch = arguments.optim.effective_batch
    if arguments.micro_batch < 1:
        raise SpecError(f"--micro-batch {arguments.micro_batch}: give at least 1.")
    micro_batch = min(arguments.micro_batch, max(1, batch // world_size))
    accumulation, rest = divmod(batch, micro_batch * world_size)
    if rest:
        raise SpecError(
            f"--effective-batch {batch} is not a multiple of --micro-batch {micro_batch} times {world_size} ranks."
        )
    return Placement(
        world_size=world_size,
        zero_stage=arguments.zero_stage,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpointing=arguments.checkpointing,
        offload_optimizer=arguments.offload_optimizer,
    )


def _reference(location: str, precision: Precision, pairs: Sequence[TokenPair], trust: Trust) -> References:
    """Reference log-prob sums, each rank computing its share."""
    model = load_model(
        location,
        tokenizer=load_tokenizer(location, trust=trust),
        output="unembedding",
        precision=precision,
        trust=trust,
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = compute_reference(model.to(device()), pairs[rank::world_size], report=lambda row: None)
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, mine)
    return {index: sums for share in shares for index, sums in share.items()}


def _say_step(row: dict[str, Any]) -> None:
    if "step" not in row:
        print(row.get("notice", f"checkpoint at step {row.get('checkpoint')}"), file=sys.stderr, flush=True)
        return
    print(
        f"step {row['step']:.0f}/{row['total']}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
        f"margin {row['margin']:+.4f}  {row['step_s']:.1f} s",
        file=sys.stderr,
        flush=True,
    )
