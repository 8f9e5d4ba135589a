"""The training loop: one reward model, one set of pairs, one seed. The same code for one process or a gang.

Every pair of an effective batch weighs the same, short last batches included, and no pair is dropped: the loss of
a forward is Σ over its pairs × world size / pairs in the effective batch, since DeepSpeed averages gradients over ranks.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainers.errors import Diverged, Interrupted, ModelError
from trainers.evaluate.metrics import accuracy
from trainers.evaluate.scoring import score_pairs
from trainers.models.attention import shared_tokens
from trainers.models.layouts import layout_of
from trainers.models.loading import freeze, load_model
from trainers.models.memory import forget_peak_memory, memory_named, peak_memory
from trainers.models.products import products_of
from trainers.models.reward_parts import RewardModule
from trainers.models.saving import folder_files, full_weights, persistent_buffers, save_model
from trainers.pairs.packing import (
    Layout,
    collate,
    epoch_order,
    forward_cost,
    split_step,
    steps_of_epoch,
)
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenPair
from trainers.train.card import CARD, model_card
from trainers.train.checkpoints import (
    Checkpoint,
    Checkpoints,
    Later,
    agreed_latest,
    collect_epochs,
    keep_epoch,
    load,
    on_first,
    prepare,
    save,
)
from trainers.train.engine import (
    effective_zero_stage,
    learning_rate,
    load_once,
    make_engine,
    process_group,
)
from trainers.train.inputs import TrainInputs, TrainResult
from trainers.train.stopping import StopLeft, never

Report = Callable[[dict[str, Any]], None]
_FINGERPRINT_VALUES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """A training's checkpoints and their identity, its stop request, what to do after an epoch, and rank 0's slow writes."""

    checkpoints: Checkpoints | None
    identity: dict[str, str]
    stop: StopLeft
    end_epoch: Callable[[int], None]
    later: Later


def train(
    inputs: TrainInputs,
    *,
    report: Report,
    out_dir: Path,
    checkpoints: Checkpoints | None = None,
    stop: StopLeft = never,
) -> TrainResult:
    """Train; on rank 0, write the final model to `out_dir`/model, and those of kept epochs beside it.

    `report` is called on rank 0 with the row of each finished step, and with {"notice": text}. Training resumes from
    `checkpoints` if there is one. Raises Diverged, OutOfMemory, ModelError, StorageError; Interrupted if `stop` asked.
    """
    started = time.perf_counter()
    forget_peak_memory()
    epochs, kept = inputs.optim.epochs, inputs.keep_epochs
    kept_in, mirror = (out_dir, None) if checkpoints is None else (checkpoints.folder, checkpoints.mirror)
    with Later() as later, process_group():
        tokenizer = load_tokenizer(inputs.location, inputs.revision, inputs.trust, inputs.template)
        model = load_once(lambda known: _base_model(inputs, tokenizer, known))
        # Before the training, which would be lost if its model could not be saved.
        files = {
            **folder_files(model, tokenizer, adapter=inputs.saves_adapter),
            CARD: model_card(inputs),
        }

        def end_epoch(epoch: int) -> None:
            if epoch in kept:
                keep_epoch(model, files, kept_in, epoch, epochs, later, mirror)

        first = dist.get_rank() == 0
        keeping = Keeping(
            checkpoints=checkpoints,
            identity={} if checkpoints is None else on_first(lambda: _identity(model, inputs)),
            stop=stop,
            end_epoch=end_epoch,
            later=later,
        )
        in_memory = functools.partial(memory_named, **_too_large(inputs))
        with in_memory():
            engine, found, notices = _start(model, inputs, keeping)
            done = 0 if found is None else len(found.log)
        try:
            for notice in notices if first else ():
                report({"notice": notice})
            loop_started = time.perf_counter()
            with in_memory():
                log = _loop(engine, inputs, keeping, found, report if first else lambda row: None)
                loop_s = time.perf_counter() - loop_started
                weights = full_weights(model, adapter=inputs.saves_adapter)
            perf = _performance(log[done:], set_up_s=loop_started - started, loop_s=loop_s)
        finally:
            engine.destroy()
    # The other ranks have left the group, in which they would wait for what follows.
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    right = sum(row["accuracy"] * row["pairs"] for row in last)
    result = TrainResult(log=log, train_accuracy=right / sum(row["pairs"] for row in last), perf=perf)
    if first:
        if not all(bool(values.isfinite().all()) for values in weights.values()):
            raise Diverged(
                f"the weights are not finite after the last optimiser step, {len(log)}; lower --lr."
            )
        card = model_card(inputs, result)
        save_model(weights, {**files, CARD: card}, out_dir / "model")
        collect_epochs(kept_in, out_dir, kept, epochs, mirror)
    return result


def _base_model(inputs: TrainInputs, tokenizer: Any, known: Mapping[str, Any]) -> Any:
    """Load the model to train, with its frozen parts."""
    model = load_model(
        inputs.location,
        tokenizer=tokenizer,
        output=inputs.reward.type.output,
        precision=inputs.precision,
        revision=inputs.revision,
        head_seed=inputs.seed,
        trust=inputs.trust,
        lora=inputs.lora,
        known=known,
    )
    freeze(model, inputs.optim.freeze)
    return model


def _start(model: Any, inputs: TrainInputs, keeping: Keeping) -> tuple[Any, Checkpoint | None, list[str]]:
    """Make the engine, new or restored from the newest sound checkpoint. A collective.

    Returns the engine, the checkpoint and notices about checkpoints. Raises ModelError if the checkpoint belongs to
    another training, SpecError if to another ZeRO stage, StorageError.
    """
    checkpoints = keeping.checkpoints
    found, notices = (None, []) if checkpoints is None else agreed_latest(checkpoints)
    universal = False
    if checkpoints is not None and found is not None:
        different = "; ".join(
            f"{name}: {found.training.get(name)}, not {value}"
            for name, value in keeping.identity.items()
            if found.training.get(name) != value
        )
        if different:
            raise ModelError(
                f"the checkpoint in {checkpoints.kept} is of another training ({different}); remove it to start anew."
            )
        universal = prepare(found, checkpoints, effective_zero_stage(inputs.placement, inputs.precision))
    engine = make_engine(
        RewardModule(model, inputs.reward, inputs.loss),
        optim=inputs.optim,
        placement=inputs.placement,
        precision=inputs.precision,
        universal=universal,
    )
    if checkpoints is not None and found is not None:
        try:
            load(engine, found, checkpoints, universal=universal)
        except BaseException:
            engine.destroy()
            raise
        notices = [*notices, f"resumed at step {found.step} of {found.total}"]
    return engine, found, notices


def _identity(model: Any, inputs: TrainInputs) -> dict[str, str]:
    """Return what a checkpoint and the training that resumes from it must share; `model` is untrained."""
    shapes = getattr(model.config, "hidden_size", 0), getattr(model.config, "num_hidden_layers", 0)
    # A few values of each tensor tell two base models apart without reading all of their weights.
    tensors = (*model.parameters(), *persistent_buffers(model).values())
    values = (tensor.detach().flatten()[:_FINGERPRINT_VALUES].tolist() for tensor in tensors)
    return {
        "architecture": f"{type(model).__name__} {shapes[0]}x{shapes[1]}, vocabulary {model.config.vocab_size}",
        "reward": "; ".join([str(inputs.reward), *map(str, inputs.unusual)]),
        "optimiser": str(inputs.optim),
        "seed": str(inputs.seed),
        "precision": inputs.precision,
        "base model": _digest(values),
        "pairs": _digest(inputs.pairs),
    }


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:12]


def _loop(
    engine: Any, inputs: TrainInputs, keeping: Keeping, found: Checkpoint | None, report: Report
) -> list[dict[str, Any]]:
    """Train from `found` to the end, and return the whole log."""
    optim, pairs, log = inputs.optim, inputs.pairs, [] if found is None else list(found.log)
    layout, of_epoch = layout_of(engine.module.model), inputs.steps_of_epoch
    total = optim.epochs * of_epoch
    saved_at, write_s = time.monotonic(), 0.0 if found is None else found.write_s
    for number, (epoch, step) in enumerate(_steps(inputs, len(log)), len(log)):
        began = time.perf_counter()
        lr = learning_rate(optim, number, total)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        wishes = _wishes(keeping, number + 1, time.monotonic() - saved_at, write_s)
        sums, grad_norm = optimiser_step(engine, inputs, step, layout, wishes)
        indices = [pairs[position].index for position in step]
        if not (all(map(math.isfinite, sums)) and math.isfinite(grad_norm)):
            raise Diverged(
                f"the loss or its gradient is not finite at optimiser step {number + 1} (learning rate {lr}, pairs "
                f"{indices}); lower --lr, or look at those pairs."
            )
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
            "indices": indices,
        }
        ends_epoch = (number + 1) % of_epoch == 0
        if inputs.validation:
            try:
                row["validation_accuracy"] = _validated(engine.module, inputs) if ends_epoch else None
            except ModelError as error:
                raise Diverged(
                    f"rewards of validation pairs are not finite after optimiser step {number + 1} (learning rate {lr}, pairs "
                    f"{indices}); lower --lr, or look at those pairs."
                ) from error
        log.append(row)
        report({**row, "total": total})
        if ends_epoch:
            # Before the checkpoint: a training that resumes from it needs the weights of earlier epochs.
            keeping.end_epoch(epoch + 1)
        write, stop = (wish > 0 for wish in sums[4:])
        if write and keeping.checkpoints is not None and len(log) < total:
            write_s = save(
                engine,
                keeping.checkpoints,
                log,
                total=total,
                training=keeping.identity,
                later=keeping.later,
            )
            saved_at = time.monotonic()
            report({"checkpoint": number + 1})
        if stop and len(log) < total:
            raise Interrupted(f"stopped on request after step {number + 1} of {total}.")
    return log


def _steps(inputs: TrainInputs, done: int) -> Iterator[tuple[int, list[int]]]:
    """Yield epoch and pair positions of each step after the first `done`."""
    first, within = divmod(done, inputs.steps_of_epoch)
    for epoch in range(first, inputs.optim.epochs):
        order = epoch_order(len(inputs.pairs), inputs.seed, epoch)
        for step in steps_of_epoch(order, inputs.optim.effective_batch)[within:]:
            yield epoch, step
        within = 0


def optimiser_step(
    engine: Any, inputs: TrainInputs, step: Sequence[int], layout: Layout, wishes: Sequence[float]
) -> tuple[list[float], float]:
    """Take one optimiser step; each rank computes its share of the pairs, one forward after another.

    Returns sums of loss, right rankings, margin and tokens over all pairs and of `wishes` over ranks, and the gradient
    norm.
    """
    placement, shared_length = inputs.placement, shared_tokens(engine.module)
    costs = {}
    for position in step:
        parts = [forward_cost(pair, layout, shared_length) for pair in _computed(inputs, [position])]
        costs[position] = sum(parts) if layout == "packed" else max(parts) * len(parts)
    forwards = split_step(
        step,
        costs,
        world_size=placement.world_size,
        forward_tokens=placement.forward_tokens,
        padded=layout == "rows",
    )[dist.get_rank()]
    sums = torch.tensor([0.0] * 4 + list(wishes), dtype=torch.float64)
    with products_of(engine.module.model):
        for number, positions in enumerate(forwards, 1):
            # Every rank must run every collective, so a forward without pairs runs one pair of weight 0.
            weight = placement.world_size / len(step) if positions else 0.0
            engine.set_gradient_accumulation_boundary(number == len(forwards))
            batch = collate(
                _computed(inputs, positions or [min(step, key=costs.__getitem__)]),
                layout=layout,
                shared_tokens=shared_length,
                reference=inputs.reference,
                device=str(engine.device),
            )
            scores = engine(batch)
            engine.backward(weight * scores.loss_P.sum())
            if positions:
                margin_P = (scores.chosen_P - scores.rejected_P).detach().double()
                right = (margin_P.sign() + 1) / 2
                if batch.tie_P is not None:
                    right[batch.tie_P[: len(right)]] = 0.5
                totals = [scores.loss_P.detach().double().sum(), right.sum(), margin_P.sum()]
                sums[:3] += torch.stack(totals).cpu()
                sums[3] += batch.tokens
    norm = None
    if effective_zero_stage(placement, inputs.precision) == 0:
        # DeepSpeed gives none at ZeRO 0: compute it from the averaged gradients, before clipping.
        gradients = [found.grad for found in engine.module.parameters() if found.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    shared = sums.to(engine.device)
    dist.all_reduce(shared)
    return shared.tolist(), float(engine.get_global_grad_norm()) if norm is None else norm


def _computed(inputs: TrainInputs, positions: Sequence[int]) -> list[TokenPair]:
    """Return the pairs at these positions, followed by their rewritings if the loss needs them."""
    pairs = [inputs.pairs[position] for position in positions]
    return pairs + [pair.rewriting for pair in pairs if pair.rewriting and inputs.loss.consistency]


def _validated(reward: Any, inputs: TrainInputs) -> float:
    """Return the current accuracy on the validation pairs. Every rank scores all of them."""
    # Only layers with recomputed activations are in training mode; the whole model would apply dropout.
    training = [module for module in reward.modules() if module.training]
    chosen_P, rejected_P = score_pairs(
        reward, inputs.validation, reference=inputs.reference, report=lambda row: None
    )
    for module in training:
        module.training = True
    return accuracy(chosen_P, rejected_P)


def _wishes(keeping: Keeping, step: int, since_s: float, write_s: float) -> list[float]:
    """Return [write a checkpoint after this step, stop after it]; the step's collective sums them over ranks.

    Rank 0 decides when to write, and whether there is time for it before a stop; any rank may be asked to stop.
    """
    left = keeping.stop()
    if dist.get_rank() > 0 or keeping.checkpoints is None:
        return [0.0, float(left is not None)]
    due = keeping.checkpoints.due(step, since_s, write_s)
    return [float(due if left is None else write_s < left), float(left is not None)]


def _too_large(inputs: TrainInputs) -> dict[str, Any]:
    """Return a message for when memory runs out, and the token budget that halves the heaviest forward."""
    placement = inputs.placement
    places = range(len(inputs.pairs))
    lengths = sorted((sum(pair.tokens for pair in _computed(inputs, [n])) for n in places), reverse=True)
    longest, step = lengths[0], sum(lengths[: inputs.optim.effective_batch])
    share = step // placement.world_size + (longest if placement.world_size > 1 else 0)
    heaviest = max(longest, min(placement.forward_tokens, share))
    message = (
        f"a forward of up to {heaviest} tokens (the longest pair has {longest}) at ZeRO {placement.zero_stage} on "
        f"{placement.world_size} ranks does not fit in memory; use fewer --forward-tokens, activation checkpointing, "
        "a higher ZeRO stage or more ranks."
    )
    return {"message": message, "forward_tokens": max(longest, heaviest // 2) if heaviest > longest else 0}


def _performance(log: Sequence[dict[str, Any]], *, set_up_s: float, loop_s: float) -> dict[str, float]:
    perf = {"set_up_s": set_up_s, **peak_memory()}
    if log:
        tokens, pairs = (sum(row[name] for row in log) for name in ("tokens", "pairs"))
        perf |= {"tokens_per_s": tokens / loop_s, "pairs_per_s": pairs / loop_s, "step_s": loop_s / len(log)}
    return perf
