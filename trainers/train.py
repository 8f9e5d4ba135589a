"""The training loop: one reward model, one set of pairs, one seed. The same code for one process or a gang.

    torchrun --nproc-per-node 2 -m trainers.train --model MODEL --data DATA --reward ex_rm --out OUT

Shapes: P pairs of a micro-batch.
Every pair of an effective batch weighs the same, short last batches included, and no pair is dropped: the loss of
a forward is Σ over its pairs × world size × accumulation / pairs in the effective batch, since DeepSpeed averages
gradients over ranks and divides by the accumulation.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainers import checkpoints as saved
from trainers.batching import epoch_order, split_step, steps_of_epoch
from trainers.checkpoints import Checkpoints
from trainers.engine import effective_zero_stage, learning_rate, make_engine, process_group
from trainers.errors import Diverged
from trainers.layouts import layout_of
from trainers.memory import forget_peak_memory, memory_named, peak_memory_gb
from trainers.models import freeze, load_model
from trainers.packing import Layout, References, collate
from trainers.pairs import TokenPair
from trainers.rewards import RewardSpec
from trainers.saving import full_weights, model_card, save_model
from trainers.scoring import RewardModule
from trainers.specs import UNTRUSTED, OptimSpec, Placement, Precision, Trust
from trainers.templates import load_tokenizer

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """Everything a rank needs; `location` and `revision` say where the base model is, `name` what it is called."""

    name: str
    location: str
    revision: str | None
    precision: Precision
    reward: RewardSpec
    optim: OptimSpec
    placement: Placement
    seed: int
    pairs: Sequence[TokenPair]
    reference: References | None
    trust: Trust = UNTRUSTED


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The training log, one row a step with the indices of its pairs, and what it cost."""

    log: list[dict[str, Any]]
    train_accuracy: float
    perf: dict[str, float]


def train(
    inputs: TrainInputs, *, report: Report, out_dir: Path, checkpoints: Checkpoints | None = None
) -> TrainResult:
    """Train and, on rank 0, write the final model into `out_dir`/model. Raises Diverged, ModelError, StorageError.

    `report` is called on rank 0 with the row of each finished step. Where `checkpoints` holds one, training goes on
    from it.
    """
    started = time.perf_counter()
    forget_peak_memory()
    tokenizer = load_tokenizer(inputs.location, inputs.revision, inputs.trust)
    model = load_model(
        inputs.location,
        tokenizer=tokenizer,
        output=inputs.reward.type.output,
        precision=inputs.precision,
        revision=inputs.revision,
        head_seed=inputs.seed,
        trust=inputs.trust,
    )
    freeze(model, inputs.optim.freeze)
    with process_group():
        identity = {} if checkpoints is None else _identity(model, inputs)
        too_large = _too_large(inputs)
        with memory_named(too_large):
            engine, log = _start(model, inputs, checkpoints, identity)
        try:
            loop_started = time.perf_counter()
            resumed_at = len(log)
            with memory_named(too_large):
                _loop(engine, inputs, layout_of(model), report, log, checkpoints, identity)
                loop_s = time.perf_counter() - loop_started
                weights = full_weights(model)
            result = TrainResult(
                log=log,
                train_accuracy=_last_epoch_accuracy(log),
                perf=_performance(log[resumed_at:], set_up_s=loop_started - started, loop_s=loop_s),
            )
            if dist.get_rank() == 0:
                card = model_card(inputs.name, inputs.reward, _facts(inputs, result))
                save_model(model, weights, tokenizer, out_dir / "model", card)
        finally:
            engine.destroy()
    return result


def _start(
    model: Any, inputs: TrainInputs, checkpoints: Checkpoints | None, identity: dict[str, str]
) -> tuple[Any, list[dict[str, Any]]]:
    """The engine, at the beginning or where the checkpoint left off, and the log up to there."""
    checkpoint = None if checkpoints is None else saved.latest(checkpoints.folder)
    universal = False
    if checkpoints is not None and checkpoint is not None:
        zero_stage = effective_zero_stage(inputs.placement, inputs.precision)
        saved.require_same_training(checkpoint, checkpoints.folder, identity)
        universal = saved.prepare_resume(checkpoint, checkpoints.folder, zero_stage)
    engine = make_engine(
        RewardModule(model, inputs.reward),
        optim=inputs.optim,
        placement=inputs.placement,
        precision=inputs.precision,
        universal=universal,
    )
    if checkpoints is None or checkpoint is None:
        return engine, []
    try:
        saved.load(engine, checkpoint, checkpoints.folder, universal=universal)
    except BaseException:
        engine.destroy()
        raise
    return engine, list(checkpoint.log)


def _loop(
    engine: Any,
    inputs: TrainInputs,
    layout: Layout,
    report: Report,
    log: list[dict[str, Any]],
    checkpoints: Checkpoints | None,
    identity: dict[str, str],
) -> None:
    optim, pairs = inputs.optim, inputs.pairs
    steps = [
        (epoch, step)
        for epoch in range(optim.epochs)
        for step in steps_of_epoch(epoch_order(len(pairs), inputs.seed, epoch), optim.effective_batch)
    ]
    for number in range(len(log), len(steps)):
        epoch, step = steps[number]
        began = time.perf_counter()
        lr = learning_rate(optim, number, len(steps))
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        sums, grad_norm = _step(engine, inputs, step, layout)
        if not (all(map(math.isfinite, sums)) and math.isfinite(grad_norm)):
            raise _diverged(inputs, step, number + 1, lr)
        row = {
            "step": float(number + 1),
            "epoch": float(epoch),
            "pairs": float(len(step)),
            "loss": sums[0] / len(step),
            "accuracy": sums[1] / len(step),
            "margin": sums[2] / len(step),
            "tokens": sums[3],
            "grad_norm": grad_norm,
            "lr": lr,
            "time": time.time(),
            "step_s": time.perf_counter() - began,
            "indices": [pairs[position].index for position in step],
        }
        log.append(row)
        if checkpoints is not None and (number + 1) % checkpoints.every_steps == 0:
            saved.save(engine, checkpoints, log, identity)
        if dist.get_rank() == 0:
            report({**row, "total": len(steps)})


def _step(engine: Any, inputs: TrainInputs, step: Sequence[int], layout: Layout) -> tuple[list[float], float]:
    """One optimiser step: sums over its pairs of loss, right rankings, margin and tokens; the gradient norm."""
    placement = inputs.placement
    world_size, accumulation = placement.world_size, placement.accumulation
    lengths = {position: inputs.pairs[position].tokens for position in step}
    forwards = split_step(step, lengths, world_size=world_size, accumulation=accumulation)[dist.get_rank()]
    sums = torch.zeros(4, dtype=torch.float64)
    norm = 0.0
    for positions in forwards:
        # Every rank must run every collective: a forward without pairs runs one of weight 0.
        weight = world_size * accumulation / len(step) if positions else 0.0
        batch = collate(
            [inputs.pairs[position] for position in positions or step[:1]],
            layout=layout,
            weight=weight,
            reference=inputs.reference,
            device=str(engine.device),
        )
        scores = engine(batch)
        engine.backward((scores.loss_P * batch.weight_P).sum())
        norm = _gradient_norm(engine, inputs)
        engine.step()
        if positions:
            margin_P = (scores.chosen_P - scores.rejected_P).detach().double()
            right = (margin_P > 0).double() + 0.5 * (margin_P == 0).double()
            totals = [scores.loss_P.detach().double().sum(), right.sum(), margin_P.sum()]
            sums[:3] += torch.stack(totals).cpu()
            sums[3] += batch.tokens
    shared = sums.to(engine.device)
    dist.all_reduce(shared)
    if _needs_own_norm(inputs):
        return shared.tolist(), norm
    return shared.tolist(), float(engine.get_global_grad_norm())


def _needs_own_norm(inputs: TrainInputs) -> bool:
    """Whether DeepSpeed does not know the gradient's norm: without ZeRO it computes none."""
    return effective_zero_stage(inputs.placement, inputs.precision) == 0


def _gradient_norm(engine: Any, inputs: TrainInputs) -> float:
    """Norm of the averaged gradients, before they are clipped and applied."""
    if not (_needs_own_norm(inputs) and engine.is_gradient_accumulation_boundary()):
        return 0.0
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _diverged(inputs: TrainInputs, step: Sequence[int], number: int, lr: float) -> Diverged:
    at = [inputs.pairs[position].index for position in step]
    return Diverged(
        f"the loss or its gradient is not finite at optimiser step {number} (learning rate {lr}, pairs {at}); "
        "lower --lr, or look at those pairs."
    )


def _too_large(inputs: TrainInputs) -> str:
    placement = inputs.placement
    longest = max(pair.tokens for pair in inputs.pairs)
    return (
        f"a micro-batch of {placement.micro_batch} pairs (the longest has {longest} tokens) at ZeRO "
        f"{placement.zero_stage} on {placement.world_size} ranks does not fit in memory; use a smaller "
        "micro-batch, activation checkpointing, a higher ZeRO stage or more ranks."
    )


def _identity(model: Any, inputs: TrainInputs) -> dict[str, str]:
    """What a checkpoint must have in common with the training that goes on from it."""
    shapes = getattr(model.config, "hidden_size", 0), getattr(model.config, "num_hidden_layers", 0)
    return {
        "architecture": f"{type(model).__name__} {shapes[0]}x{shapes[1]}, vocabulary {model.config.vocab_size}",
        "reward": str(inputs.reward),
        "optimiser": str(inputs.optim),
        "seed": str(inputs.seed),
        "precision": inputs.precision,
        "base model": f"{inputs.name} {inputs.revision or ''}".strip(),
        "pairs": _digest((pair.index, pair.prompt, pair.chosen, pair.rejected) for pair in inputs.pairs),
        "reference": _digest(sorted((inputs.reference or {}).items())),
    }


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:12]


def _facts(inputs: TrainInputs, result: TrainResult) -> dict[str, object]:
    """What a model card tells."""
    optim, last = inputs.optim, result.log[-1]
    return {
        "base model": inputs.name,
        "training pairs": len(inputs.pairs),
        "optimiser": f"{optim.optimizer}, learning rate {optim.lr}, {optim.schedule}",
        "pairs a step": optim.effective_batch,
        "epochs": optim.epochs,
        "seed": inputs.seed,
        "precision": inputs.precision,
        "training accuracy, last epoch": f"{result.train_accuracy:.4f}",
        "loss, last step": f"{last['loss']:.4f}",
        "margin, last step": f"{last['margin']:.4f}",
    }


def _last_epoch_accuracy(log: Sequence[dict[str, Any]]) -> float:
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    return sum(row["accuracy"] * row["pairs"] for row in last) / sum(row["pairs"] for row in last)


def _performance(log: Sequence[dict[str, Any]], *, set_up_s: float, loop_s: float) -> dict[str, float]:
    if not log:
        return {"set_up_s": set_up_s, "peak_mem_gb": peak_memory_gb()}
    return {
        "tokens_per_s": sum(row["tokens"] for row in log) / loop_s,
        "pairs_per_s": sum(row["pairs"] for row in log) / loop_s,
        "step_s": loop_s / len(log),
        "set_up_s": set_up_s,
        "peak_mem_gb": peak_memory_gb(),
    }


if __name__ == "__main__":
    from trainers.command import command
    from trainers.train_command import Train, run

    command(Train, run, "trainers.train")
