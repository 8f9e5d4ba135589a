"""The training loop: one reward model, one set of pairs, one seed. The same code for one process or a gang.

torchrun --nproc-per-node 2 -m trainers.train --model MODEL --data DATA --reward ex_rm --out OUT
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers import checkpoints as saved
from trainers.batching import epoch_order, steps_of_epoch
from trainers.checkpoints import Checkpoints
from trainers.engine import learning_rate, process_group
from trainers.epochs import collect_epochs, keep_epoch
from trainers.errors import Diverged, Interrupted
from trainers.evaluate import score_pairs
from trainers.inputs import TrainInputs
from trainers.layouts import layout_of
from trainers.memory import forget_peak_memory, memory_named, peak_memory_gb
from trainers.metrics import accuracy
from trainers.models import freeze, load_model
from trainers.packing import Layout
from trainers.resuming import Start, identity, start
from trainers.saving import CARD, folder_files, full_weights, model_card, save_model
from trainers.step import optimiser_step
from trainers.stopping import StopLeft, never
from trainers.templates import load_tokenizer

Report = Callable[[dict[str, Any]], None]
GoesOn = Callable[[int, float], bool]


def always(epoch: int, accuracy: float) -> bool:
    """Nobody ends a training early."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The training log, one row a step with the indices of its pairs, and what it cost."""

    log: list[dict[str, Any]]
    train_accuracy: float
    perf: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """Where a training keeps checkpoints, under which identity, who may ask it to stop, and what ends an epoch."""

    checkpoints: Checkpoints | None
    identity: dict[str, str]
    stop: StopLeft
    end_epoch: Callable[[int], None]
    goes_on: GoesOn


def train(
    inputs: TrainInputs,
    *,
    report: Report,
    out_dir: Path,
    checkpoints: Checkpoints | None = None,
    stop: StopLeft = never,
    goes_on: GoesOn = always,
) -> TrainResult:
    """Train and, on rank 0, write the final model into `out_dir`/model, and those of kept epochs beside it.

    `report` is called on rank 0 with the row of each finished step, and with {"notice": text}. Where `checkpoints`
    holds one, training goes on from it; it ends early where `goes_on` says no of an epoch (from 1) and its accuracy on the
    validation pairs, which every rank must be told alike. Raises Diverged, OutOfMemory, ModelError, StorageError; Interrupted where
    `stop` asked.
    """
    started = time.perf_counter()
    forget_peak_memory()
    model, tokenizer = _loaded(inputs)
    # Before anything is trained: what cannot be saved would lose a training.
    files = {**folder_files(model, tokenizer), CARD: _card(inputs, {})}
    kept_in, mirror = (out_dir, None) if checkpoints is None else (checkpoints.folder, checkpoints.mirror)
    epochs, kept = inputs.optim.epochs, inputs.keep_epochs

    def end_epoch(epoch: int) -> None:
        if epoch in kept:
            keep_epoch(model, files, kept_in, epoch, epochs, mirror)

    with process_group():
        named = {} if checkpoints is None else identity(model, inputs)
        keeping = Keeping(
            checkpoints=checkpoints, identity=named, stop=stop, end_epoch=end_epoch, goes_on=goes_on
        )
        too_large = _too_large(inputs)
        with memory_named(too_large):
            begun = start(model, inputs, checkpoints, keeping.identity)
        try:
            _tell(begun.notices, report)
            loop_started = time.perf_counter()
            with memory_named(too_large):
                log = _loop(begun, inputs, layout_of(model), report, keeping)
                loop_s = time.perf_counter() - loop_started
                weights = full_weights(model)
            perf = _performance(log[len(begun.log) :], set_up_s=loop_started - started, loop_s=loop_s)
            result = TrainResult(log=log, train_accuracy=_last_epoch_accuracy(log), perf=perf)
            if dist.get_rank() == 0:
                card = _card(inputs, _facts(inputs, result))
                save_model(weights, {**files, CARD: card}, out_dir / "model")
                collect_epochs(kept_in, out_dir, kept, epochs, mirror)
        finally:
            begun.engine.destroy()
    return result


def _loaded(inputs: TrainInputs) -> tuple[Any, Any]:
    """The model to train, and its tokenizer."""
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
    return model, tokenizer


def _tell(notices: Sequence[str], report: Report) -> None:
    if dist.get_rank() == 0:
        for notice in notices:
            report({"notice": notice})


def _loop(
    begun: Start, inputs: TrainInputs, layout: Layout, report: Report, keeping: Keeping
) -> list[dict[str, Any]]:
    """Train to the end; the whole log, the part behind a checkpoint included."""
    engine, optim, pairs, log = begun.engine, inputs.optim, inputs.pairs, list(begun.log)
    total = optim.epochs * _steps_of_one_epoch(inputs)
    saved_at, write_s = time.monotonic(), begun.write_s
    for number, (epoch, step) in enumerate(_steps(inputs, len(log)), len(log)):
        began = time.perf_counter()
        lr = learning_rate(optim, number, total)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        wishes = _wishes(keeping, number + 1, time.monotonic() - saved_at, write_s)
        sums, grad_norm = optimiser_step(engine, inputs, step, layout, wishes)
        if not (all(map(math.isfinite, sums)) and math.isfinite(grad_norm)):
            raise _diverged(inputs, step, number + 1, lr)
        row: dict[str, Any] = {
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
        ends_epoch = (number + 1) % _steps_of_one_epoch(inputs) == 0
        if inputs.validation:
            row["validation_accuracy"] = _validated(engine.module, inputs) if ends_epoch else None
        log.append(row)
        if dist.get_rank() == 0:
            report({**row, "total": total})
        if ends_epoch and inputs.validation and not keeping.goes_on(epoch + 1, row["validation_accuracy"]):
            return log
        if ends_epoch:
            # Before the checkpoint: who goes on from that finds what was kept of earlier epochs.
            keeping.end_epoch(epoch + 1)
        write, stop = (wish > 0 for wish in sums[4:])
        if write and keeping.checkpoints is not None and len(log) < total:
            write_s = saved.save(engine, keeping.checkpoints, log, total=total, training=keeping.identity)
            saved_at = time.monotonic()
            if dist.get_rank() == 0:
                report({"checkpoint": number + 1})
        if stop and len(log) < total:
            raise Interrupted(f"stopped on request after step {number + 1} of {total}.")
    return log


def _steps_of_one_epoch(inputs: TrainInputs) -> int:
    return math.ceil(len(inputs.pairs) / inputs.optim.effective_batch)


def _steps(inputs: TrainInputs, done: int) -> Iterator[tuple[int, list[int]]]:
    """Epoch and positions of the pairs of each step after the first `done`; an epoch is drawn when it begins."""
    first, within = divmod(done, _steps_of_one_epoch(inputs))
    for epoch in range(first, inputs.optim.epochs):
        order = epoch_order(len(inputs.pairs), inputs.seed, epoch)
        for step in steps_of_epoch(order, inputs.optim.effective_batch)[within:]:
            yield epoch, step
        within = 0


def _validated(reward: Any, inputs: TrainInputs) -> float:
    """Accuracy on the validation pairs with the weights as they are. Every rank scores all of them."""
    # Only layers that recompute their activations; to put the whole in training mode would start its dropouts.
    training = [module for module in reward.modules() if module.training]
    chosen_P, rejected_P = score_pairs(
        reward, inputs.validation, reference=inputs.reference, report=lambda row: None
    )
    for module in training:
        module.training = True
    return accuracy(chosen_P, rejected_P)


def _wishes(keeping: Keeping, step: int, since_s: float, write_s: float) -> list[float]:
    """[write a checkpoint after this step, stop after it], which the step's own collective makes everyone's.

    Rank 0 says when to write; any rank may have been asked to stop, and rank 0 knows whether a checkpoint still fits.
    """
    left = keeping.stop()
    if dist.get_rank() > 0 or keeping.checkpoints is None:
        return [0.0, float(left is not None)]
    due = keeping.checkpoints.due(step, since_s)
    return [float(due if left is None else write_s < left), float(left is not None)]


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


def _card(inputs: TrainInputs, facts: dict[str, object]) -> bytes:
    return model_card(inputs.name, inputs.reward, facts).encode()


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
