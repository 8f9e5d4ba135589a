"""How a training is laid on devices: the fewest GPUs that hold it, at the exact effective batch. Pure functions.

On GPUs, in this order: no recomputation, then recomputed activations, then the optimiser's state in the host's memory;
within that the fewest GPUs, then the lowest ZeRO stage, then the largest micro-batch. All GPUs count as the smallest
of them, since the gate may send a gang to any. Figures for GPUs are predictions of memory_model.py, untested on one.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.plan.hardware import GPU_KINDS, Node
from orchestrator.plan.memory import Footprint, PairTokens, Training, footprint
from orchestrator.spec import catalog
from orchestrator.spec.trials import PlacementRule, TrialSpec, matches
from trainers.errors import PlanError
from trainers.models import tiny
from trainers.models.architecture import Architecture
from trainers.rewards import RewardSpec
from trainers.specs import BUILTIN, DrawSpec, ModelSpec, OptimSpec, Placement

# Recomputation, offload: each gives up more speed than the one before.
_LEVELS = ((False, False), (True, False), (True, True))


def place(
    trial: TrialSpec,
    capacity: Sequence[Node],
    rules: Sequence[PlacementRule] = (),
    *,
    architecture: Architecture | None = None,
) -> Placement:
    """Lay a trial's training out: on GPUs where there are any, else on CPU processes.

    The effective batch is always the spec's. `architecture` is that of a model that the catalog does not
    know; a model of unknown size gets one GPU and one pair a forward. Raises PlanError.
    """
    gpus, gpu_gb = gpus_of(capacity)
    if not gpus:
        return _place_on_cpus(trial, capacity, rules)
    training = training_of(trial, architecture)
    if training is None:
        return _split(trial.optim.effective_batch, 1, 0, 1, "cuda")
    found = fitting(training, gpus, gpu_gb)
    if found is None:
        raise PlanError(_why_not(trial, training, gpus, gpu_gb))
    return found


def training_of(trial: TrialSpec, architecture: Architecture | None = None) -> Training | None:
    """Return what of a trial's training needs memory and time; None where nobody knows its model's size."""
    shapes = architecture or catalog.architecture(trial.model)
    if shapes is None:
        return None
    return replace(
        _training(trial.model, shapes, trial.reward, trial.optim, trial.train_draw), lora=trial.lora
    )


def _training(
    model: ModelSpec, shapes: Architecture, reward: RewardSpec, optim: OptimSpec, draw: DrawSpec
) -> Training:
    # The longest pair that the draw lets through; what built-in models are given is shorter.
    prompt, response = draw.max_prompt_tokens, draw.max_response_tokens
    if model.source.startswith(BUILTIN):
        prompt = response = tiny.MAX_POSITIONS // 2
    return Training(
        architecture=shapes,
        reward=reward,
        optim=optim,
        precision=model.precision,
        pair=PairTokens(prompt=prompt, chosen=response, rejected=response),
    )


def gpus_of(capacity: Iterable[Node]) -> tuple[int, float]:
    """Count the GPUs, and find the GB of the smallest; (0, 0) where there are none."""
    nodes = [node for node in capacity if node.gpus]
    return sum(node.gpus for node in nodes), min((node.gpu_gb for node in nodes), default=0.0)


@functools.lru_cache(maxsize=4096)
def fitting(training: Training, gpus: int, gpu_gb: float) -> Placement | None:
    """Place a training on that many GPUs of that size; None where it fits on none."""
    return next((found for found, used in _candidates(training, gpus) if used.total <= gpu_gb), None)


def _candidates(training: Training, gpus: int) -> Iterator[tuple[Placement, Footprint]]:
    """Every placement on at most that many GPUs with its footprint, those to be preferred first."""
    batch = training.optim.effective_batch
    for checkpointing, offload in _LEVELS:
        for width in (width for width in range(1, min(gpus, batch) + 1) if batch % width == 0):
            # Alone nothing is partitioned, and ZeRO-2 keeps least beside an offloaded optimiser.
            stages = ((2,) if width == 1 else (2, 3)) if offload else ((0,) if width == 1 else (1, 2, 3))
            per_rank = batch // width
            for stage in stages:
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
                    yield placed, footprint(training, placed)


def _why_not(trial: TrialSpec, training: Training, gpus: int, gpu_gb: float) -> str:
    """Say why a training fits nowhere on that many GPUs of that size, and what would make it fit."""
    _, least = min(_candidates(training, gpus), key=lambda found: found[1].total)
    ways = []
    batch = training.optim.effective_batch
    wider = next((n for n in range(gpus + 1, batch + 1) if fitting(training, n, gpu_gb)), None)
    if wider is not None:
        ways.append(f"on {wider} GPUs of {gpu_gb:g} GB")
    larger = sorted((kind for kind in GPU_KINDS if kind.gb > gpu_gb), key=lambda kind: kind.gb)
    found = next((kind for kind in larger if fitting(training, gpus, kind.gb)), None)
    if found is not None:
        ways.append(f"on {gpus} × {found.label}")
    for width in (2**power for power in range(1, gpus.bit_length())):
        divided = replace(training, optim=replace(training.optim, effective_batch=width))
        if batch % width and fitting(divided, width, gpu_gb):
            ways.append(f"with --effective-batch a multiple of {width}, which divides it over {width} GPUs")
            break
    return (
        f"{trial.model.name} · {trial.reward.name} needs {least.total:.0f} GB on each of at most {gpus} GPUs of "
        f"{gpu_gb:g} GB even with recomputed activations and an offloaded optimiser ({least.state:.0f} GB of training "
        f"state, {least.activations:.0f} GB of activations of a pair of {training.pair.total:.0f} tokens, "
        f"{least.unmeasured:.0f} GB of margin). It would fit "
        f"{', or '.join(ways) or 'on larger GPUs, with a smaller model, or in bf16'}."
    )


def fits_gpus(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> bool:
    """Whether each model can be trained on the GPUs by the paper's recipe, by either of the paper's reward types."""
    gpus, gpu_gb = gpus_of(capacity)
    return gpus > 0 and all(
        shapes is not None
        and fitting(_training(model, shapes, reward, OptimSpec(), DrawSpec()), gpus, gpu_gb) is not None
        for model in models
        for shapes in [catalog.architecture(model)]
        for reward in (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=1.0))
    )


def require_fit(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> None:
    """Raises PlanError with every line of `misfits`."""
    lines = misfits(trials, capacity)
    if lines:
        ways = "Run on a cluster (RAY_ADDRESS, --cluster), choose --models, or try --profile laptop."
        raise PlanError("\n".join([*lines, ways]))


def misfits(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> list[str]:
    """Say why the models of known size that fit nowhere do not, one line for each model and reward type."""
    gpus, gpu_gb = gpus_of(capacity)
    if not gpus:
        large = dict.fromkeys(
            f"{trial.model.name} ({trial.model.parameters / 1e9:.1f} billion parameters)"
            for trial in trials
            if trial.model.parameters
        )
        return [f"0 GPUs are here, and these models need some: {', '.join(large)}."] if large else []
    trainings = [(trial, training) for trial in trials if (training := training_of(trial)) is not None]
    lines = [
        _why_not(trial, training, gpus, gpu_gb)
        for trial, training in trainings
        if fitting(training, gpus, gpu_gb) is None
    ]
    return list(dict.fromkeys(lines))


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
