"""How a training is laid on devices: the fewest GPUs that hold it, at the exact effective batch. Pure functions.

On GPUs, in this order: no recomputation, then recomputed activations, then the optimiser's state in the host's memory;
within that the fewest GPUs, then the lowest ZeRO stage, then the largest micro-batch. All GPUs count as the smallest
of them, since the gate may send a gang to any. Figures for GPUs are predictions of memory_model.py, untested on one.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.plan.capacity import Node
from orchestrator.plan.hardware import GPU_KINDS, label
from orchestrator.plan.memory import Footprint, PairTokens, Training, footprint
from orchestrator.spec import catalog
from orchestrator.spec.trials import PlacementRule, TrialSpec, matches
from trainers import tiny
from trainers.architecture import Architecture
from trainers.errors import PlanError
from trainers.rewards import RewardSpec
from trainers.specs import BUILTIN, DrawSpec, ModelSpec, OptimSpec, Placement

# Recomputation, offload: each gives up more speed than the one before.
_LEVELS = ((False, False), (True, False), (True, True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A training whose architecture is known, and its effective batch."""

    name: str
    training: Training

    @property
    def batch(self) -> int:
        """Pairs per optimiser step."""
        return self.training.optim.effective_batch


def place(
    trial: TrialSpec,
    capacity: Sequence[Node],
    rules: Sequence[PlacementRule] = (),
    *,
    architecture: Architecture | None = None,
) -> Placement:
    """How a trial's training is laid out: on GPUs where there are any, else on CPU processes.

    The effective batch is always the spec's. `architecture` is that of a model that the catalog does not
    know; one of unknown size gets one GPU and one pair a forward. Raises PlanError.
    """
    if not any(node.gpus for node in capacity):
        return _place_on_cpus(trial, capacity, rules)
    need = need_of(trial, architecture)
    if need is None:
        return _split(trial.optim.effective_batch, 1, 0, 1, "cuda")
    gpus, gpu_gb = gpus_of(capacity)
    found = fitting(need, gpus, gpu_gb)
    if found is None:
        raise PlanError(why_not(need, gpus, gpu_gb))
    return found


def need_of(trial: TrialSpec, architecture: Architecture | None = None) -> Need | None:
    """What a trial's training needs memory for; None where nobody knows its model's size."""
    shapes = architecture or catalog.architecture(trial.model)
    if shapes is None:
        return None
    return Need(
        name=f"{trial.model.name} · {trial.reward.name}",
        training=Training(
            architecture=shapes,
            reward=trial.reward,
            optim=trial.optim,
            precision=trial.model.precision,
            pair=limits(trial.train_draw, trial.model),
        ),
    )


def limits(draw: DrawSpec, model: ModelSpec) -> PairTokens:
    """The longest pair that a draw lets through; what built-in ones hold is less."""
    if model.source.startswith(BUILTIN):
        half = tiny.MAX_POSITIONS // 2
        return PairTokens(prompt=half, chosen=half, rejected=half)
    return PairTokens(
        prompt=draw.max_prompt_tokens, chosen=draw.max_response_tokens, rejected=draw.max_response_tokens
    )


def gpus_of(capacity: Iterable[Node]) -> tuple[int, float]:
    """How many GPUs there are, and the GB of the smallest; (0, 0) where there are none."""
    nodes = [node for node in capacity if node.gpus]
    return sum(node.gpus for node in nodes), min((node.gpu_gb for node in nodes), default=0.0)


@functools.lru_cache(maxsize=4096)
def fitting(need: Need, gpus: int, gpu_gb: float) -> Placement | None:
    """The placement of a training on that many GPUs of that size; None where it fits on none."""
    return next((found for found, used in _candidates(need, gpus) if used.total <= gpu_gb), None)


def predicted(need: Need, placement: Placement) -> Footprint:
    """GB of one rank at its peak."""
    return footprint(need.training, placement)


def why_not(need: Need, gpus: int, gpu_gb: float) -> str:
    """Why a training fits nowhere on that many GPUs of that size, and what would make it fit."""
    _, least = min(_candidates(need, gpus), key=lambda found: found[1].total)
    state = least.weights + least.masters + least.optimizer + least.gradients
    said = (
        f"{need.name} needs {least.total:.0f} GB on each of at most {gpus} GPUs of {gpu_gb:g} GB even with recomputed "
        f"activations and an offloaded optimiser ({state:.0f} GB of training state, {least.activations:.0f} GB of "
        f"activations of a pair of {need.training.pair.total} tokens, {least.unmeasured:.0f} GB of margin)."
    )
    return f"{said} It would fit {', or '.join(_ways_out(need, gpus, gpu_gb))}."


def _ways_out(need: Need, gpus: int, gpu_gb: float) -> list[str]:
    ways = []
    wider = next((n for n in range(gpus + 1, need.batch + 1) if fitting(need, n, gpu_gb)), None)
    if wider is not None:
        ways.append(f"on {wider} GPUs of {gpu_gb:g} GB")
    larger = sorted((kind for kind in GPU_KINDS if kind.gb > gpu_gb), key=lambda kind: kind.gb)
    found = next((kind for kind in larger if fitting(need, gpus, kind.gb)), None)
    if found is not None:
        ways.append(f"on {gpus} × {label(found)}")
    for width in (2**power for power in range(1, gpus.bit_length())):
        if need.batch % width and fitting(_with_batch(need, width), width, gpu_gb):
            ways.append(f"with --effective-batch a multiple of {width}, which divides it over {width} GPUs")
            break
    return ways or ["on larger GPUs, with a smaller model, or in bf16"]


def _with_batch(need: Need, batch: int) -> Need:
    optim = replace(need.training.optim, effective_batch=batch)
    return replace(need, training=replace(need.training, optim=optim))


def _candidates(need: Need, gpus: int) -> Iterator[tuple[Placement, Footprint]]:
    """Every placement on at most that many GPUs with its footprint, those to be preferred first."""
    batch = need.batch
    widths = [width for width in range(1, min(gpus, batch) + 1) if batch % width == 0]
    for checkpointing, offload in _LEVELS:
        for width in widths:
            for stage in _stages(width, offload=offload):
                per_rank = batch // width
                for micro_batch in (size for size in range(per_rank, 0, -1) if per_rank % size == 0):
                    placed = Placement(
                        world_size=width,
                        zero_stage=stage,
                        micro_batch=micro_batch,
                        accumulation=per_rank // micro_batch,
                        checkpointing=checkpointing,
                        offload_optimizer=offload,
                        device="cuda",
                    )
                    yield placed, predicted(need, placed)


def _stages(width: int, *, offload: bool) -> tuple[int, ...]:
    """ZeRO stages worth trying: alone nothing is partitioned, and ZeRO-2 keeps least beside an offloaded optimiser."""
    if width == 1:
        return (2,) if offload else (0,)
    return (2, 3) if offload else (1, 2, 3)


def fits_gpus(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> bool:
    """Whether each model can be trained on the GPUs by the paper's recipe, by either of the paper's reward types."""
    gpus, gpu_gb = gpus_of(capacity)
    rewards = (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=1.0))
    return gpus > 0 and all(
        shapes is not None and fitting(_paper_need(model, shapes, reward), gpus, gpu_gb) is not None
        for model in models
        for shapes in [catalog.architecture(model)]
        for reward in rewards
    )


def _paper_need(model: ModelSpec, shapes: Architecture, reward: RewardSpec) -> Need:
    training = Training(
        architecture=shapes,
        reward=reward,
        optim=OptimSpec(),
        precision=model.precision,
        pair=limits(DrawSpec(), model),
    )
    return Need(name=model.name, training=training)


def misfits(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> list[str]:
    """Why the models of known size that fit nowhere do not, one line for each model and reward type."""
    gpus, gpu_gb = gpus_of(capacity)
    if not gpus:
        return _too_large_for_cpus(trials)
    lines = []
    for trial in trials:
        need = need_of(trial)
        if need is not None and fitting(need, gpus, gpu_gb) is None:
            lines.append(why_not(need, gpus, gpu_gb))
    return list(dict.fromkeys(lines))


def _too_large_for_cpus(trials: Sequence[TrialSpec]) -> list[str]:
    models = dict.fromkeys(trial.model for trial in trials if trial.model.parameters)
    if not models:
        return []
    named = ", ".join(
        f"{model.name} ({(model.parameters or 0) / 1e9:.1f} billion parameters)" for model in models
    )
    return [f"0 GPUs are here, and these models need some: {named}."]


def require_fit(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> None:
    """Raises PlanError with every line of `misfits`."""
    lines = misfits(trials, capacity)
    if lines:
        ways = "Run on a cluster (RAY_ADDRESS, --cluster), choose --models, or try --profile laptop."
        raise PlanError("\n".join([*lines, ways]))


def _place_on_cpus(trial: TrialSpec, capacity: Sequence[Node], rules: Sequence[PlacementRule]) -> Placement:
    batch = trial.optim.effective_batch
    rule = next((rule for rule in rules if matches(trial.labels, rule.match)), None)
    cpus = sum(node.cpus for node in capacity)
    world_size = rule.world_size if rule is not None else 1
    if world_size > cpus or batch % world_size:
        world_size = 1
    # Padding is the cost of a forward with several real pairs; tiny models pay per forward instead.
    wanted = batch if trial.model.source.startswith(BUILTIN) else 1
    return _split(batch, world_size, rule.zero_stage if rule is not None else 0, wanted, "cpu")


def _split(
    batch: int, world_size: int, zero_stage: int, wanted: int, device: Literal["cpu", "cuda"]
) -> Placement:
    per_rank = batch // world_size
    micro_batch = next(size for size in range(min(wanted, per_rank), 0, -1) if per_rank % size == 0)
    return Placement(
        world_size=world_size,
        zero_stage=zero_stage,
        micro_batch=micro_batch,
        accumulation=per_rank // micro_batch,
        device=device,
    )
