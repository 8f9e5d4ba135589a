"""The DeepSpeed loop: one reward model, one set of pairs, one seed. The same code for one process or a gang.

Shapes: P pairs of a micro-batch.
Every pair of an effective batch weighs the same, short last batches included, and no pair is dropped: the loss of
a forward is Σ over its pairs × world size × accumulation / pairs in the effective batch, since DeepSpeed averages
gradients over ranks and divides by the accumulation.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainers.errors import Diverged
from trainers.losses import bradley_terry
from trainers.models import full_weights, initialise_head, load_model, load_tokenizer, pad_token, save_model
from trainers.pairs import TokenPair, collate, epoch_order, split_step, steps_of_epoch
from trainers.reference import Reference
from trainers.rewards import reward_module
from trainers.specs import OptimSpec, Placement, Precision, RewardSpec

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """Everything a rank needs; `location` and `revision` say where the base model is."""

    location: str
    revision: str | None
    precision: Precision
    reward: RewardSpec
    optim: OptimSpec
    placement: Placement
    seed: int
    pairs: Sequence[TokenPair]
    reference: Reference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The training log, one row a step, and what it cost."""

    log: list[dict[str, float]]
    train_accuracy: float
    perf: dict[str, float]


def train(inputs: TrainInputs, *, report: Report, out_dir: Path) -> TrainResult:
    """Train and, on rank 0, write the final model into `out_dir`/model. Raises Diverged, ModelError.

    `report` is called on rank 0 with the row of each finished step.
    """
    started = time.perf_counter()
    _forget_peak_memory()
    tokenizer = load_tokenizer(inputs.location, inputs.revision)
    model = load_model(
        inputs.location, kind=inputs.reward.kind, precision=inputs.precision, revision=inputs.revision
    )
    if inputs.reward.kind == "ex_rm":
        initialise_head(model, inputs.seed)
    with process_group():
        engine = _engine(reward_module(inputs.reward, model), inputs)
        try:
            loop_started = time.perf_counter()
            log = _loop(engine, inputs, pad_token(tokenizer), report)
            loop_s = time.perf_counter() - loop_started
            weights = full_weights(model)
            if dist.get_rank() == 0:
                save_model(model, weights, tokenizer, out_dir / "model")
        finally:
            engine.destroy()
    return TrainResult(
        log=log,
        train_accuracy=_last_epoch_accuracy(log),
        perf=_performance(log, set_up_s=loop_started - started, loop_s=loop_s),
    )


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Make this process a rank: of the gang that launched it, or a world of its own that ends with the block."""
    import deepspeed
    from deepspeed.comm import comm

    # DeepSpeed would compile a shared-memory op (45–100 s); gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    own = not dist.is_initialized()
    if own and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend)
    elif own:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, auto_mpi_discovery=False)
    try:
        yield
    finally:
        if own:
            # A reused process starts its next training from a clean slate.
            comm.destroy_process_group()
            comm.cdb = None


def _engine(module: nn.Module, inputs: TrainInputs) -> Any:
    import deepspeed

    optim, placement = inputs.optim, inputs.placement
    # In evaluation mode: a dropout would make the result depend on rank, placement and process.
    module.eval()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    config = {
        "train_micro_batch_size_per_gpu": placement.micro_batch,
        "gradient_accumulation_steps": placement.accumulation,
        "zero_optimization": {"stage": placement.zero_stage},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would clip to norm 1; the paper does not clip (paper §1).
        "gradient_clipping": 0.0,
        "bf16": {"enabled": inputs.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _loop(engine: Any, inputs: TrainInputs, pad_id: int, report: Report) -> list[dict[str, float]]:
    optim, pairs = inputs.optim, inputs.pairs
    lengths = [pair.longest for pair in pairs]
    steps = [
        (epoch, step)
        for epoch in range(optim.epochs)
        for step in steps_of_epoch(epoch_order(len(pairs), inputs.seed, epoch), optim.effective_batch)
    ]
    log: list[dict[str, float]] = []
    for number, (epoch, step) in enumerate(steps):
        began = time.perf_counter()
        sums, grad_norm = _step(engine, inputs, step, lengths, pad_id)
        row = {
            "step": float(number + 1),
            "epoch": float(epoch),
            "pairs": float(len(step)),
            "loss": sums[0] / len(step),
            "accuracy": sums[1] / len(step),
            "margin": sums[2] / len(step),
            "tokens": sums[3],
            "grad_norm": grad_norm,
            "lr": optim.lr,
            "time": time.time(),
            "step_s": time.perf_counter() - began,
        }
        log.append(row)
        if dist.get_rank() == 0:
            report({**row, "total": len(steps)})
    return log


def _step(
    engine: Any, inputs: TrainInputs, step: Sequence[int], lengths: Sequence[int], pad_id: int
) -> tuple[list[float], float]:
    """One optimiser step: sums over its pairs of loss, right rankings, margin and tokens; the gradient norm."""
    placement = inputs.placement
    world_size, accumulation = placement.world_size, placement.accumulation
    forwards = split_step(step, lengths, world_size=world_size, accumulation=accumulation)[dist.get_rank()]
    sums = torch.zeros(4, dtype=torch.float64)
    for positions in forwards:
        # Every rank must run every collective: a forward without pairs runs one of weight 0.
        weight = world_size * accumulation / len(step) if positions else 0.0
        pairs = [inputs.pairs[position] for position in positions or step[:1]]
        batch = collate(
            pairs, pad_id=pad_id, weight=weight, reference=inputs.reference, device=str(engine.device)
        )
        chosen_P, rejected_P = engine(batch)
        loss_P = bradley_terry(chosen_P, rejected_P)
        engine.backward((loss_P * batch.weight_P).sum())
        grad_norm = _gradient_norm(engine) if placement.zero_stage == 0 else None
        engine.step()
        if positions:
            margin_P = (chosen_P - rejected_P).detach().double()
            right = (margin_P > 0).double() + 0.5 * (margin_P == 0).double()
            tokens = batch.attention_mask_RT.sum()
            sums += torch.stack([loss_P.detach().double().sum(), right.sum(), margin_P.sum(), tokens]).cpu()
    shared = sums.to(engine.device)
    dist.all_reduce(shared)
    totals: list[float] = shared.tolist()
    norm = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
    if not (torch.isfinite(shared).all() and math.isfinite(norm)):
        at = [inputs.pairs[position].index for position in step]
        raise Diverged(
            f"the loss or its gradient is not finite at optimiser step {engine.global_steps} (lr {inputs.optim.lr}, pairs {at[:8]}…); "
            "lower --lr, or look at those pairs."
        )
    return totals, norm


def _gradient_norm(engine: Any) -> float | None:
    """Norm of the averaged gradients before a step without ZeRO, which DeepSpeed does not compute unclipped."""
    if not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _last_epoch_accuracy(log: Sequence[dict[str, float]]) -> float:
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    return sum(row["accuracy"] * row["pairs"] for row in last) / sum(row["pairs"] for row in last)


def _performance(log: Sequence[dict[str, float]], *, set_up_s: float, loop_s: float) -> dict[str, float]:
    return {
        "tokens_per_s": sum(row["tokens"] for row in log) / loop_s,
        "pairs_per_s": sum(row["pairs"] for row in log) / loop_s,
        "step_s": loop_s / len(log),
        "set_up_s": set_up_s,
        "peak_mem_gb": _peak_memory_gb(),
    }


def _forget_peak_memory() -> None:
    """Start a new maximum: a reused process would report that of an earlier training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_gb() -> float:
    """Of the GPU where there is one, else the process's resident memory (Linux; NaN elsewhere)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return kilobytes[0] * 1024 / 1e9 if kilobytes else math.nan
