"""How a training is laid on devices: the fewest GPUs that hold it, at the exact effective batch. Pure functions.

On GPUs, in this order: no recomputation, then recomputed activations, then the optimiser's state in the host's memory;
within that the fewest GPUs, then the lowest ZeRO stage, then the most tokens a forward. All GPUs count as the smallest
of them, since the gate may send a gang to any. Figures for GPUs are predictions of memory_model.py, untested on one.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from orchestrator.plan.hardware import GPU_KINDS, Node
from orchestrator.plan.memory import PairTokens, Training, footprint
from orchestrator.spec import catalog
from orchestrator.spec.trials import PlacementRule, TrialSpec, matches
from trainers.errors import PlanError, SpecError
from trainers.models import tiny
from trainers.models.architecture import FAMILIES, Architecture
from trainers.rewards import RewardSpec
from trainers.specs import BUILTIN, DrawSpec, ModelSpec, OptimSpec, Placement

# Budgets of a forward that are tried.
_TOKENS_STEP = 128
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

    `architecture` is that of a model that the catalog does not know; a model of unknown size gets one GPU, and no
    forward that is longer than the longest pair. Raises PlanError; SpecError for tf32 without a GPU.
    """
    gpus = gpus_of(capacity)
    if not gpus.number:
        _refuse_tf32([trial])
        return _place_on_cpus(trial, capacity, rules)
    training = training_of(trial, architecture)
    if training is None:
        return Placement(
            forward_tokens=int(_longest_pair(trial.model, trial.train_draw).total), device="cuda"
        )
    found = fitting(training, gpus)
    if found is None:
        raise PlanError(_why_not(trial, training, gpus))
    return found


def training_of(trial: TrialSpec, architecture: Architecture | None = None) -> Training | None:
    """Return what of a trial's training needs memory and time; None where nobody knows its model's size."""
    shapes = architecture or catalog.architecture(trial.model)
    if shapes is None:
        return None
    training = _training(trial.model, shapes, trial.reward, trial.optim, trial.train_draw)
    return replace(training, lora=trial.lora, copies=2 if trial.loss.consistency else 1)


def _training(
    model: ModelSpec, shapes: Architecture, reward: RewardSpec, optim: OptimSpec, draw: DrawSpec
) -> Training:
    return Training(
        architecture=shapes,
        reward=reward,
        optim=optim,
        precision=model.precision,
        pair=_longest_pair(model, draw) if shapes.family in FAMILIES else _longest_pair(model, draw).in_rows,
    )


def _longest_pair(model: ModelSpec, draw: DrawSpec) -> PairTokens:
    """Return the longest pair that the draw lets through; what built-in models are given is shorter."""
    prompt, response = draw.max_prompt_tokens, draw.max_response_tokens
    if model.source.startswith(BUILTIN):
        prompt = response = tiny.MAX_POSITIONS // 2
    return PairTokens(prompt=prompt, chosen=response, rejected=response)


class Gpus(NamedTuple):
    """How many GPUs there are, the GB of the smallest, and the least GB of host memory that comes to one; 0 where there are none."""

    number: int
    gb: float
    host_gb: float = math.inf


def gpus_of(capacity: Iterable[Node]) -> Gpus:
    """Return the GPUs of all nodes, each taken to be as the smallest."""
    nodes = [node for node in capacity if node.gpus]
    return Gpus(
        number=sum(node.gpus for node in nodes),
        gb=min((node.gpu_gb for node in nodes), default=0.0),
        host_gb=min((node.host_gb / node.gpus for node in nodes), default=0.0),
    )


@functools.lru_cache(maxsize=4096)
def fitting(training: Training, gpus: Gpus) -> Placement | None:
    """Place a training on these GPUs; None where it does not fit on them."""
    for least in _candidates(training, gpus.number):

        def gb(tokens: int, least: Placement = least) -> float:
            return footprint(training, replace(least, forward_tokens=tokens)).total

        if footprint(training, least).host > gpus.host_gb:
            continue
        if gb(least.forward_tokens) <= gpus.gb:
            # A step in one forward has no gradients of earlier ones: it may fit where a little less does not.
            most = least.forward_tokens * math.ceil(training.optim.effective_batch / least.world_size)
            sizes = range(least.forward_tokens, most, _TOKENS_STEP)
            largest = most if gb(most) <= gpus.gb else sizes[bisect.bisect(sizes, gpus.gb, key=gb) - 1]
            return replace(least, forward_tokens=largest)
    return None


def _candidates(training: Training, gpus: int) -> Iterator[Placement]:
    """Every placement on at most that many GPUs, those to be preferred first; a forward of each is one pair."""
    most = min(gpus, training.optim.effective_batch)
    # Powers of two share the nodes that there are without a rest.
    widths = sorted({most, *(2**power for power in range(most.bit_length()))})
    for checkpointing, offload in _LEVELS:
        for width in widths:
            # Alone nothing is partitioned, and ZeRO-2 keeps least beside an offloaded optimiser.
            for stage in ((2,) if width == 1 else (2, 3)) if offload else ((0,) if width == 1 else (1, 2, 3)):
                yield Placement(
                    world_size=width,
                    zero_stage=stage,
                    forward_tokens=int(training.pair.total),
                    checkpointing=checkpointing,
                    offload_optimizer=offload,
                    device="cuda",
                )


def _why_not(trial: TrialSpec, training: Training, gpus: Gpus) -> str:
    """Say why a training does not fit on these GPUs, and what would make it fit."""
    count, gpu_gb, host_gb = gpus
    used = (footprint(training, placed) for placed in _candidates(training, count))
    least = min(used, key=lambda found: found.total)
    ways = []
    most = training.optim.effective_batch
    wider = next((n for n in range(count + 1, most + 1) if fitting(training, gpus._replace(number=n))), None)
    if wider is not None:
        ways.append(f"on {wider} GPUs of {gpu_gb:g} GB")
    larger = sorted((kind for kind in GPU_KINDS if kind.gb > gpu_gb), key=lambda kind: kind.gb)
    found = next((kind for kind in larger if fitting(training, gpus._replace(gb=kind.gb))), None)
    if found is not None:
        ways.append(f"on {count} × {found.label}")
    if least.host > host_gb:
        ways.append(f"with {least.host:.0f} GB of host memory a GPU for the optimiser, not {host_gb:.0f}")
    return (
        f"{trial.model.name} · {trial.reward.name} needs {least.total:.0f} GB on each of at most {count} GPUs of "
        f"{gpu_gb:g} GB even with recomputed activations and an offloaded optimiser ({least.state:.0f} GB of training "
        f"state, {least.activations:.0f} GB of activations of a pair of {training.pair.total:.0f} tokens, "
        f"{least.unmeasured:.0f} GB of margin). It would fit "
        f"{', or '.join(ways) or 'on larger GPUs, with a smaller model, or in bf16'}."
    )


def fits_gpus(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> bool:
    """Whether each model can be trained on the GPUs by the paper's recipe, by either of the paper's reward types."""
    gpus = gpus_of(capacity)
    return gpus.number > 0 and all(
        shapes is not None
        and fitting(_training(model, shapes, reward, OptimSpec(), DrawSpec()), gpus) is not None
        for model in models
        for shapes in [catalog.architecture(model)]
        for reward in (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=1.0))
    )


def require_fit(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> None:
    """Raises PlanError with every line of `misfits`; SpecError for tf32 without a GPU."""
    if not gpus_of(capacity).number:
        _refuse_tf32(trials)
    lines = misfits(trials, capacity)
    if lines:
        ways = "Run on a cluster (RAY_ADDRESS, --cluster), choose --models, or try --profile laptop."
        raise PlanError("\n".join([*lines, ways]))


def _refuse_tf32(trials: Sequence[TrialSpec]) -> None:
    named = dict.fromkeys(trial.model.name for trial in trials if trial.model.precision == "tf32")
    if named:
        raise SpecError(
            f"{', '.join(named)} in tf32: only GPUs have it, and there is none; take fp32 or bf16."
        )


def misfits(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> list[str]:
    """Say why the models of known size that fit nowhere do not, one line for each model and reward type."""
    gpus = gpus_of(capacity)
    if not gpus.number:
        large = dict.fromkeys(
            f"{trial.model.name} ({trial.model.parameters / 1e9:.1f} billion parameters)"
            for trial in trials
            if trial.model.parameters
        )
        return [f"0 GPUs are here, and these models need some: {', '.join(large)}."] if large else []
    trainings = [(trial, training) for trial in trials if (training := training_of(trial)) is not None]
    lines = [
        _why_not(trial, training, gpus) for trial, training in trainings if fitting(training, gpus) is None
    ]
    return list(dict.fromkeys(lines))


def _place_on_cpus(trial: TrialSpec, capacity: Sequence[Node], rules: Sequence[PlacementRule]) -> Placement:
    batch = trial.optim.effective_batch
    rule = next((rule for rule in rules if matches(trial.labels, rule.match)), None)
    cpus = sum(node.cpus for node in capacity)
    world_size = rule.world_size if rule is not None and rule.world_size <= min(cpus, batch) else 1
    tokens = int(_longest_pair(trial.model, trial.train_draw).total)
    if trial.model.source.startswith(BUILTIN):
        # Tiny models pay for each forward; for others no forward is longer than the longest pair.
        tokens *= math.ceil(batch / world_size)
    return Placement(
        world_size=world_size,
        zero_stage=rule.zero_stage if rule is not None else 0,
        forward_tokens=tokens,
    )
