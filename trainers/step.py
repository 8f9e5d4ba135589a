"""One optimiser step of a gang: its pairs split over ranks and forwards, what their losses sum to, and the gradient.

Shapes: P pairs of a micro-batch.
Every pair of an effective batch weighs the same, short last batches included, and no pair is dropped: the loss of
a forward is Σ over its pairs × world size × accumulation / pairs in the effective batch, since DeepSpeed averages
gradients over ranks and divides by the accumulation.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainers.batching import split_step
from trainers.engine import effective_zero_stage
from trainers.inputs import TrainInputs
from trainers.packing import Layout, collate
from trainers.ropes import shared_tokens


def optimiser_step(
    engine: Any, inputs: TrainInputs, step: Sequence[int], layout: Layout, wishes: Sequence[float]
) -> tuple[list[float], float]:
    """One optimiser step: sums over its pairs of loss, right rankings, margin and tokens, and over ranks of `wishes`;
    the gradient norm.
    """
    placement = inputs.placement
    world_size, accumulation = placement.world_size, placement.accumulation
    lengths = {position: inputs.pairs[position].tokens for position in step}
    forwards = split_step(step, lengths, world_size=world_size, accumulation=accumulation)[dist.get_rank()]
    sums = torch.tensor([0.0] * 4 + list(wishes), dtype=torch.float64)
    norm, shared_length = 0.0, shared_tokens(engine.module)
    for positions in forwards:
        # Every rank must run every collective: a forward without pairs runs one of weight 0.
        weight = world_size * accumulation / len(step) if positions else 0.0
        batch = collate(
            [inputs.pairs[position] for position in positions or step[:1]],
            layout=layout,
            shared_tokens=shared_length,
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
