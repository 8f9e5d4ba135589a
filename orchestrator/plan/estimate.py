"""How long and how dear: floating-point operations → seconds → a schedule. Pure functions; numbers of docs/planning.md.

A rate starts from a count of operations at an assumed utilisation, and is replaced by that of finished trainings of the
same model, reward type and placement. Times in seconds.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan.hardware import GpuKind
from orchestrator.plan.memory import Training
from trainers.specs import Placement

# Share of the peak rate that a training reaches: ASSUMED, untested on a GPU.
UTILISATION = {"bf16": 0.35, "fp32": 0.60}
# One thread of a CPU at fp32: of the 0.2 TFLOP/s of two threads (benchmarks/README.md), the share a training reached.
CPU_TFLOPS, CPU_UTILISATION = 0.1, 0.69
# What a forward costs beside its operations, and what a process costs before its first step: ASSUMED.
FORWARD_S = {"cpu": 0.01, "cuda": 0.03}
SET_UP_S = {"cpu": 1.0, "cuda": 90.0}
BACKWARD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of the parts of a pair."""

    prompt: float
    chosen: float
    rejected: float

    @property
    def total(self) -> float:
        """Tokens of the packed pair."""
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Seconds of a step and of what comes before the first; the mean of so many `trainings`."""

    step_s: float
    set_up_s: float
    trainings: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something that holds `width` devices for `seconds`, once the jobs it comes `after` have ended."""

    id: str
    width: int
    seconds: float
    after: tuple[str, ...] = ()


def forward_flops(training: Training, lengths: Lengths) -> float:
    """Operations of one pair's forward pass without the unembedding: 2 a weight and token, and the attention's."""
    shapes = training.architecture
    tables = 1 if shapes.tied else 2
    matrices = shapes.parameters - tables * shapes.vocabulary * shapes.hidden
    first = (lengths.prompt + lengths.chosen) ** 2 / 2
    second = lengths.rejected * (lengths.prompt + lengths.rejected / 2)
    attention = 4 * shapes.heads * shapes.head_width * (first + second) * shapes.layers
    return 2 * matrices * lengths.total + attention


def unembedding_flops(training: Training, lengths: Lengths) -> float:
    """Operations of one pair's log-probabilities, forward."""
    reward, shapes = training.reward.type, training.architecture
    if reward.output == "head":
        return 0.0
    tokens = lengths.chosen + lengths.rejected if reward.rendering == "response" else 3
    return 2.0 * shapes.vocabulary * shapes.hidden * tokens


def train_flops(training: Training, lengths: Lengths, *, checkpointing: bool) -> float:
    """Operations of one pair's forward and backward pass; blocks of logits are always computed twice."""
    passes = 1 + BACKWARD + (1 if checkpointing else 0)
    return passes * forward_flops(training, lengths) + (2 + BACKWARD) * unembedding_flops(training, lengths)


def flops_per_s(kind: GpuKind | None, precision: str) -> float:
    """Operations per second that one device is taken to reach; `kind` is None for one CPU thread."""
    if kind is None:
        return CPU_TFLOPS * CPU_UTILISATION * 1e12
    peak = kind.bf16_tflops if precision == "bf16" else kind.fp32_tflops
    return peak * UTILISATION[precision] * 1e12


def step_s(training: Training, lengths: Lengths, placement: Placement, kind: GpuKind | None) -> float:
    """Seconds of one optimiser step."""
    pairs = placement.micro_batch * placement.accumulation
    work = pairs * train_flops(training, lengths, checkpointing=placement.checkpointing)
    overhead = placement.accumulation * FORWARD_S[placement.device]
    return work / flops_per_s(kind, training.precision) + overhead


def scoring_s(training: Training, lengths: Lengths, pairs: int, kind: GpuKind | None) -> float:
    """Seconds to score that many pairs on one device, start-up left out."""
    work = forward_flops(training, lengths) + unembedding_flops(training, lengths)
    return pairs * work / flops_per_s(kind, training.precision)


def mean_rate(left: Rate, right: Rate) -> Rate:
    """That of the trainings of both."""
    both = left.trainings + right.trainings
    return Rate(
        step_s=(left.step_s * left.trainings + right.step_s * right.trainings) / both,
        set_up_s=(left.set_up_s * left.trainings + right.set_up_s * right.trainings) / both,
        trainings=both,
    )


def makespan_s(jobs: Sequence[Job], devices: int) -> float:
    """When the last job ends if the widest and then longest that fits always starts: a list schedule with backfill.

    Raises ValueError where a job is wider than the devices, or waits for one that never comes.
    """
    waiting = sorted(jobs, key=lambda job: (-job.width, -job.seconds, job.id))
    ended: set[str] = set()
    running: list[tuple[float, str, int]] = []
    now, free = 0.0, devices
    while waiting or running:
        held = []
        for job in waiting:
            if job.width <= free and ended.issuperset(job.after):
                heapq.heappush(running, (now + job.seconds, job.id, job.width))
                free -= job.width
            else:
                held.append(job)
        waiting = held
        if not running:
            raise ValueError(f"{waiting[0].id} can never start on {devices} devices")
        now, id, width = heapq.heappop(running)
        free += width
        ended.add(id)
    return now


def lower_bound_s(jobs: Sequence[Job], devices: int) -> float:
    """No schedule is shorter: the larger of all the work over all the devices, and the longest chain."""
    area = sum(job.width * job.seconds for job in jobs)
    return max(area / devices, _longest_chain(jobs)) if jobs else 0.0


def _longest_chain(jobs: Sequence[Job]) -> float:
    by_id = {job.id: job for job in jobs}
    ends: dict[str, float] = {}

    def end(id: str) -> float:
        if id not in ends:
            job = by_id[id]
            ends[id] = job.seconds + max((end(before) for before in job.after), default=0.0)
        return ends[id]

    return max(end(id) for id in by_id)


def time_left_s(seconds: Mapping[str, float], left: Mapping[str, float], at_once: int) -> float | None:
    """Seconds to the end of a sweep by the mean time of its finished trainings of each kind; None before the first.

    `left` counts those of each kind that are not finished, one under way as what is left of it; a kind of which none
    is finished is taken to need the mean of all.
    """
    if not seconds:
        return None
    usual = sum(seconds.values()) / len(seconds)
    work = sum(seconds.get(kind, usual) * count for kind, count in left.items())
    return work / max(1, at_once)
