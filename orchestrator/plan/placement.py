"""How a training is placed on devices: the fewest GPUs that hold it, at the exact effective batch. Pure functions.

On GPUs, in this order: no recomputation, then recomputed activations, then the optimiser's state in the host's memory;
within that the fewest GPUs, then the lowest ZeRO stage, then the most tokens a forward. Every GPU counts as the
smallest, since the gate may send a gang to any. Memory is predicted by memory.py, which no GPU has confirmed.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from orchestrator.plan.hardware import GPU_KINDS, Node
from orchestrator.plan.memory import PairTokens, Training, footprint, scoring
from orchestrator.spec import catalog
from orchestrator.spec.trials import PlacementRule, TrialSpec, matches
from trainers.errors import PlanError, SpecError
from trainers.models import tiny
from trainers.models.architecture import FAMILIES, Architecture
from trainers.rewards import RewardSpec
from trainers.specs import BUILTIN, DrawSpec, ModelSpec, OptimSpec, Placement

# Step between the forward budgets that are tried.
_TOKENS_STEP = 128
# (recomputation, offload), from the fastest to the slowest.
_LEVELS = ((False, False), (True, False), (True, True))


def place(
    trial: TrialSpec,
    capacity: Sequence[Node],
    rules: Sequence[PlacementRule] = (),
    *,
    architecture: Architecture | None = None,
) -> Placement:
    """Place a trial's training: on GPUs if there are any, else on CPU processes.

    `architecture` is given for a model that is not in the catalog. A model of unknown size gets one GPU, and forwards
    of at most the longest pair. Raises PlanError; SpecError for tf32 without a GPU.
    """
    gpus = gpus_of(capacity)
    if not gpus.number:
        if trial.model.precision == "tf32":
            raise SpecError(
                f"{trial.model.name} in tf32: only GPUs have it, and there is none; take fp32 or bf16."
            )
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


def compiled(placed: Placement) -> Placement:
    """Return the placement with layers that are compiled, which ZeRO 3 does not allow."""
    return replace(placed, compile=placed.zero_stage < 3)


def training_of(trial: TrialSpec, architecture: Architecture | None = None) -> Training | None:
    """Return what decides the memory and time of a trial's training; None if its model's size is unknown."""
    shapes = architecture or catalog.architecture(trial.model)
    if shapes is None:
        return None
    training = _training(trial.model, shapes, trial.reward, trial.optim, trial.train_draw)
    return replace(training, lora=trial.lora, copies=2 if trial.loss.consistency else 1)


def _training(
    model: ModelSpec, shapes: Architecture, reward: RewardSpec, optim: OptimSpec, draw: DrawSpec
) -> Training:
    pair = _longest_pair(model, draw)
    if shapes.family not in FAMILIES:
        # It may not take packed pairs: two rows, each with the prompt.
        pair = replace(pair, prompt=2 * pair.prompt)
    return Training(architecture=shapes, reward=reward, optim=optim, precision=model.precision, pair=pair)


def _longest_pair(model: ModelSpec, draw: DrawSpec) -> PairTokens:
    """Return the longest pair that the draw lets through; built-in models have a lower limit of their own."""
    prompt, response = draw.max_prompt_tokens, draw.max_response_tokens
    if model.source.startswith(BUILTIN):
        prompt = response = tiny.MAX_POSITIONS // 2
    return PairTokens(prompt=prompt, chosen=response, rejected=response)


class Gpus(NamedTuple):
    """The number of GPUs, the memory of the smallest, and the least host memory per GPU, in GB; 0 without GPUs."""

    number: int
    gb: float
    host_gb: float = math.inf


def gpus_of(capacity: Iterable[Node]) -> Gpus:
    """Sum up the GPUs of all nodes. A process takes a CPU, too, so a GPU without one does not count."""
    nodes = [node for node in capacity if node.gpus]
    return Gpus(
        number=sum(min(node.gpus, node.cpus) for node in nodes),
        gb=min((node.gpu_gb for node in nodes), default=0.0),
        host_gb=min((node.host_gb / node.gpus for node in nodes), default=0.0),
    )


@functools.lru_cache(maxsize=4096)
def fitting(training: Training, gpus: Gpus) -> Placement | None:
    """Place a training on these GPUs; None if they cannot hold it, or one of them cannot score with the model."""
    scored = scoring(training, gpus.gb)
    if scored.gb > gpus.gb or scored.host_gb > gpus.host_gb:
        return None
    for least in _candidates(training, gpus.number):

        def gb(tokens: int, least: Placement = least) -> float:
            return footprint(training, replace(least, forward_tokens=tokens)).total

        if footprint(training, least).host > gpus.host_gb:
            continue
        if gb(least.forward_tokens) <= gpus.gb:
            # A step in one forward holds no gradients of earlier ones, so it may fit where a smaller budget does not.
            most = least.forward_tokens * math.ceil(training.optim.effective_batch / least.world_size)
            sizes = range(least.forward_tokens, most, _TOKENS_STEP)
            largest = most if gb(most) <= gpus.gb else sizes[bisect.bisect(sizes, gpus.gb, key=gb) - 1]
            return replace(least, forward_tokens=largest)
    return None


def _candidates(training: Training, gpus: int) -> Iterator[Placement]:
    """Yield the placements on at most that many GPUs, preferred ones first, each with one pair a forward."""
    most = min(gpus, training.optim.effective_batch)
    # Powers of two fill nodes evenly.
    widths = sorted({most, *(2**power for power in range(most.bit_length()))})
    for checkpointing, offload in _LEVELS:
        for width in widths:
            # One GPU has nothing to partition. With an offloaded optimiser ZeRO-2 keeps least on the GPU.
            for stage in ((2,) if width == 1 else (2, 3)) if offload else ((0,) if width == 1 else (1, 2, 3)):
                yield Placement(
                    world_size=width,
                    zero_stage=stage,
                    forward_tokens=int(training.copies * training.pair.total),
                    checkpointing=checkpointing,
                    offload_optimizer=offload,
                    device="cuda",
                )


def _why_not(trial: TrialSpec, training: Training, gpus: Gpus) -> str:
    """Return why a training does not fit on these GPUs, and what would make it fit."""
    count, gpu_gb, host_gb = gpus
    scored = scoring(training, gpu_gb)
    used = (footprint(training, placed) for placed in _candidates(training, count))
    least = min(used, key=lambda found: found.total)
    if scored.gb > gpu_gb:
        needs = f"{scored.gb:.0f} GB on one GPU to be scored, even layer by layer, and the smallest have {gpu_gb:g} GB"
    elif least.total <= gpu_gb and (host := max(scored.host_gb, least.host)) > host_gb:
        needs = f"{host:.0f} GB of host memory a GPU, for its optimiser or its layers, not {host_gb:.0f}"
    else:
        needs = (
            f"{least.total:.0f} GB on each of at most {count} GPUs of {gpu_gb:g} GB even with recomputed activations and an "
            f"offloaded optimiser ({least.state:.0f} GB of training state, {least.activations:.0f} GB of activations of a "
            f"pair of {training.pair.total:.0f} tokens, {least.unmeasured:.0f} GB of margin)"
        )
    more = range(count + 1, training.optim.effective_batch + 1)
    kinds = sorted((kind for kind in GPU_KINDS if kind.gb > gpu_gb), key=lambda kind: kind.gb)
    wider = (f"{n} GPUs of {gpu_gb:g} GB" for n in more if fitting(training, gpus._replace(number=n)))
    larger = (f"{count} × {kind.label}" for kind in kinds if fitting(training, gpus._replace(gb=kind.gb)))
    ways = list(filter(None, (next(wider, ""), next(larger, ""))))
    ways = ways or ["larger GPUs, with a smaller model, or in bf16"]
    return f"{trial.model.name} · {trial.reward.name} needs {needs}. It would fit on {', or on '.join(ways)}."


def fits_gpus(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> bool:
    """Return whether each model can be trained on the GPUs by the paper's recipe, as ex_rm and as im_rm."""
    gpus = gpus_of(capacity)
    return gpus.number > 0 and all(
        shapes is not None
        and fitting(_training(model, shapes, reward, OptimSpec(), DrawSpec()), gpus) is not None
        for model in models
        for shapes in [catalog.architecture(model)]
        for reward in (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=1.0))
    )


def require_fit(trials: Sequence[TrialSpec], capacity: Sequence[Node]) -> None:
    """Raise PlanError with a line for each model of known size and reward type that fits nowhere; SpecError for tf32 without a GPU."""
    lines = []
    for trial in trials:
        try:
            place(trial, capacity)
        except PlanError as error:
            lines.append(str(error))
    large = dict.fromkeys(
        f"{trial.model.name} ({trial.model.parameters / 1e9:.1f} billion parameters)"
        for trial in trials
        if trial.model.parameters
    )
    if large and not gpus_of(capacity).number:
        lines.append(f"0 GPUs are here, and these models need some: {', '.join(large)}.")
    if lines:
        ways = "Run on a cluster (RAY_ADDRESS, --cluster), choose --models, or try --profile laptop."
        raise PlanError("\n".join([*dict.fromkeys(lines), ways]))


def _place_on_cpus(trial: TrialSpec, capacity: Sequence[Node], rules: Sequence[PlacementRule]) -> Placement:
    batch = trial.optim.effective_batch
    rule = next((rule for rule in rules if matches(trial.labels, rule.match)), None)
    cpus = sum(node.cpus for node in capacity)
    world_size = rule.world_size if rule is not None and rule.world_size <= min(cpus, batch) else 1
    tokens = int(_longest_pair(trial.model, trial.train_draw).total)
    if trial.model.source.startswith(BUILTIN):
        # For tiny models the number of forwards costs most; for others memory does.
        tokens *= math.ceil(batch / world_size)
    return Placement(
        world_size=world_size,
        zero_stage=rule.zero_stage if rule is not None else 0,
        forward_tokens=tokens,
    )
