"""How long work takes: estimated from operations at first, then from finished trainings. Numbers of docs/planning.md.

`plan`, the order of the trainings, the gate and the remaining time use these estimates. Times are in seconds.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.plan.hardware import GpuKind, Node
from orchestrator.plan.memory import PairTokens, Training, scoring, weight_bytes
from orchestrator.plan.placement import training_of
from orchestrator.plan.schedule import UNKNOWN_S
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import PrepareStage, PretrainStage, SampleStage, TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.records import TrialNote
from trainers.models.architecture import ANSWERS_AT_ONCE, SCORED_TOKENS, Architecture
from trainers.specs import Placement, Precision

# Share of the peak rate that a training's products reach: ASSUMED, untested on a GPU; on a CPU that of its two threads
# (0.2 TFLOP/s, benchmarks/README.md).
UTILISATION = {"bf16": 0.45, "tf32": 0.45, "fp32": 0.70, "cpu": 0.69}
CPU_TFLOPS = 0.1
# Bytes that an update reads and writes for a parameter (gradient, weight, two moments, in fp32), and GB/s: of an
# offloaded update in the host's memory, and of a CPU's memory and between its processes. ASSUMED.
UPDATE_BYTES, HOST_GB_S, CPU_GB_S = 28, 50.0, (10.0, 1.0)
# GB/s from a host to one of its GPUs (PCIe 4 with 16 lanes reaches about 25): ASSUMED.
PCIE_GB_S = 20.0
# Overhead of a forward pass, and of a process before its first step: ASSUMED.
FORWARD_S = {"cpu": 0.01, "cuda": 0.03}
SET_UP_S = {"cpu": 1.0, "cuda": 90.0}
# A backward pass does twice the operations of a forward pass.
BACKWARD = 2
# For sets that are not prepared yet: UltraFeedback's test pairs have 515 tokens on average (measured), of which a third
# is assumed to be the prompt; the tiny world's have about 30. UNSEEN_PAIRS is assumed of a set that was not fetched.
UNSEEN_LENGTHS = PairTokens(prompt=135, chosen=190, rejected=190)
TINY_LENGTHS = PairTokens(prompt=14, chosen=8, rejected=8)
UNSEEN_PAIRS = 2000
# The pace of a training is measured over at least this many steps, since the first ones are slower.
ENOUGH_STEPS = 10


def forward_flops(training: Training, lengths: PairTokens) -> float:
    """Return the operations of one pair's forward pass without the unembedding: 2 a weight and token, plus attention."""
    shapes = training.architecture
    tables = 1 if shapes.tied else 2
    matrices = shapes.parameters - tables * shapes.vocabulary * shapes.hidden
    first = (lengths.prompt + lengths.chosen) ** 2 / 2
    second = lengths.rejected * (lengths.prompt + lengths.rejected / 2)
    attention = 4 * shapes.heads * shapes.head_width * (first + second) * shapes.layers
    return 2 * matrices * lengths.total + attention


def unembedding_flops(training: Training, lengths: PairTokens) -> float:
    """Return the operations of the forward pass from one pair's hidden states to log-probabilities."""
    reward, shapes = training.reward.type, training.architecture
    if reward.output == "head":
        return 0.0
    tokens = lengths.responses if reward.rendering == "response" else 3
    return 2.0 * shapes.vocabulary * shapes.hidden * tokens


def peak_tflops(kind: GpuKind | None, precision: Precision) -> float:
    """Return the dense peak rate of a device for products in that precision; `kind` is None for one CPU thread."""
    return CPU_TFLOPS if kind is None else float(getattr(kind, f"{precision}_tflops"))


def flops_per_s(kind: GpuKind | None, precision: Precision) -> float:
    """Return the operations per second that one device is assumed to reach."""
    return peak_tflops(kind, precision) * UTILISATION["cpu" if kind is None else precision] * 1e12


def step_parts(
    training: Training, lengths: PairTokens, placement: Placement, kind: GpuKind | None
) -> dict[str, float]:
    """Return the seconds of each part of an optimiser step; no part is assumed to overlap with another."""
    ranks = placement.world_size
    pairs = training.copies * training.optim.effective_batch / ranks
    forwards = min(math.ceil(pairs), math.ceil(pairs * lengths.total / placement.forward_tokens))
    recomputed, stage, trained = int(placement.checkpointing), placement.zero_stage, training.trainable
    width = weight_bytes(training.precision)
    memory, link = (kind.memory_gb_s, kind.link_gb_s) if kind else CPU_GB_S
    # ZeRO 3 gathers the weights in each pass, ZeRO 1 and 2 once after the update. Gradients are sent in fp32; ZeRO 2 and 3
    # send them after each forward.
    whole = training.architecture.trained(training.reward.type.output)
    gathered = whole * forwards * (2 + recomputed) if stage == 3 else trained * min(stage, 1)
    sent = width * gathered + 4 * trained * (forwards if stage >= 2 else 1)
    share = trained / ranks if stage else trained
    rate = flops_per_s(kind, training.precision)
    return {
        "backbone": pairs * (1 + _backward(training) + recomputed) * forward_flops(training, lengths) / rate,
        # Blocks of logits are always computed twice.
        "head": pairs * (2 + _backward(training)) * unembedding_flops(training, lengths) / rate,
        "optimiser": share * UPDATE_BYTES / (HOST_GB_S if placement.offload_optimizer else memory) / 1e9,
        "communication": sent * (1 - 1 / ranks) / link / 1e9,
        "launches": forwards * FORWARD_S[placement.device],
    }


def _backward(training: Training) -> int:
    """Return the operations of a backward pass in forward passes; with an adapter, weights have no gradients."""
    return 1 if training.lora else BACKWARD


def utilisation(training: Training, lengths: PairTokens, placement: Placement, kind: GpuKind | None) -> float:
    """Return the share of the peak rate that a step uses; operations that are computed twice count once."""
    work = forward_flops(training, lengths) + unembedding_flops(training, lengths)
    pairs = training.copies * training.optim.effective_batch / placement.world_size
    seconds = sum(step_parts(training, lengths, placement, kind).values())
    return pairs * (1 + _backward(training)) * work / seconds / peak_tflops(kind, training.precision) / 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Seconds of a step, and seconds before the first one, as means over `trainings`."""

    step_s: float
    set_up_s: float
    trainings: int = 1

    def __add__(self, other: "Rate") -> "Rate":
        both = self.trainings + other.trainings
        return Rate(
            step_s=(self.step_s * self.trainings + other.step_s * other.trainings) / both,
            set_up_s=(self.set_up_s * self.trainings + other.set_up_s * other.trainings) / both,
            trainings=both,
        )


# Model, reward type, training set and placement.
RateName = tuple[str, str, str, Placement]


def rate_name(plan: TrialPlan, placement: Placement) -> RateName:
    """Return what trainings that run at one rate have in common."""
    return (plan.spec.model.name, plan.spec.reward_name, plan.spec.train_set.name, placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Estimates times from prepared sets, the kind of GPU (None: CPUs), and the rates of finished trainings."""

    store: Store
    kind: GpuKind | None = None
    measured: Mapping[RateName, Rate] = field(default_factory=dict)

    def having(self, measured: Mapping[RateName, Rate]) -> "Durations":
        """Add the rates of finished trainings; rates of one name are averaged."""
        return replace(self, measured=_mean([*self.measured.items(), *measured.items()]))

    def rate(self, plan: TrialPlan, placement: Placement) -> Rate | None:
        """Return the rate of a plan's training under a placement; None if the model's size is unknown."""
        measured = self.measured.get(rate_name(plan, placement))
        training = training_of(plan.spec, plan.architecture)
        if measured is not None or training is None:
            return measured
        parts = step_parts(training, self.lengths(plan), placement, self.kind)
        return Rate(step_s=sum(parts.values()), set_up_s=SET_UP_S[placement.device])

    def lengths(self, plan: TrialPlan) -> PairTokens:
        """Return the mean lengths of the plan's training pairs."""
        return _prepared(plan.train.prepared, self.store)[1]

    def train_s(self, plan: TrialPlan, placement: Placement) -> float:
        """Return the seconds of the whole training; UNKNOWN_S if its rate is unknown."""
        rate = self.rate(plan, placement)
        if rate is None:
            return UNKNOWN_S
        (pairs, lengths), optim = _prepared(plan.train.prepared, self.store), plan.train.optim
        held_out = round(pairs * plan.spec.validation.share) if plan.spec.validation else 0
        steps = math.ceil((pairs - held_out) / optim.effective_batch)
        # Every rank scores what is held out after each epoch.
        return rate.set_up_s + optim.epochs * (
            steps * rate.step_s + self._forwards_s(plan, held_out, lengths)
        )

    def scoring_s(self, plan: TrialPlan, stages: Iterable[PrepareStage], placement: Placement) -> float:
        """Return the seconds of a process that scores these sets by the plan's model on one device."""
        training = training_of(plan.spec, plan.architecture)
        if training is None:
            return UNKNOWN_S
        sets = [_prepared(stage, self.store) for stage in stages]
        seconds = SET_UP_S[placement.device] + sum(self._forwards_s(plan, *found) for found in sets)
        if self.kind is None:
            return seconds
        forwards = sum(math.ceil(pairs * lengths.total / SCORED_TOKENS) for pairs, lengths in sets)
        return seconds + forwards * scoring(training, self.kind.gb).copied_gb / PCIE_GB_S

    def sample_s(
        self, plan: TrialPlan, stage: SampleStage, policy: Architecture | None, placement: Placement
    ) -> float:
        """Return the seconds in which a policy answers the prompts on one device; UNKNOWN_S if its size is unknown.

        Every answer is taken to be as long as it may be. A batch reads all weights for each token. Until the rows of the
        set are in the store, each counts as a prompt.
        """
        if policy is None:
            return UNKNOWN_S
        asked = {pair.prompt for pair in pairs_of(self.store, stage.prompts.digest)}
        rows = len(asked) or stage.prompts.rows or UNSEEN_PAIRS
        prompts, samples = min(rows, stage.draw.max_pairs or rows), stage.sampling.samples
        # The set is prepared where it is evaluated on, too.
        prepared = PrepareStage(base=stage.base, split=stage.prompts, draw=plan.spec.eval_draw)
        length, new = _prepared(prepared, self.store)[1].prompt, stage.sampling.max_new_tokens
        table = policy.vocabulary * policy.hidden
        matrices = policy.parameters - (1 if policy.tied else 2) * table
        work = 2 * prompts * samples * (matrices * (length + new) + table * new)
        batches = math.ceil(prompts / max(1, ANSWERS_AT_ONCE // samples)) * math.ceil(
            samples / ANSWERS_AT_ONCE
        )
        memory = self.kind.memory_gb_s if self.kind else CPU_GB_S[0]
        read = weight_bytes(stage.base.precision) * (matrices + table)
        token_s = read / memory / 1e9 + FORWARD_S[placement.device]
        rate = flops_per_s(self.kind, stage.base.precision)
        return SET_UP_S[placement.device] + work / rate + batches * new * token_s

    def _forwards_s(self, plan: TrialPlan, pairs: int, lengths: PairTokens) -> float:
        """Return the seconds of the forward passes of the pairs; 0 if the model's size is unknown."""
        training = training_of(plan.spec, plan.architecture)
        if training is None:
            return 0.0
        work = pairs * (forward_flops(training, lengths) + unembedding_flops(training, lengths))
        return work / flops_per_s(self.kind, training.precision)


def measured_rates(trained: Mapping[str, tuple[str, str, str]], store: Store) -> dict[RateName, Rate]:
    """Read the rates of the finished ones of these trainings (key → model, reward name and training set)."""
    found = []
    for key, name in trained.items():
        manifest = store.sound_manifest("train", key)
        info = manifest["info"] if manifest else {}
        perf, laid = info.get("perf", {}), info.get("placement")
        # An earlier rmsweep had other fields in its placements.
        if laid and laid.keys() == set(Placement.__slots__) and "step_s" in perf:
            rate = Rate(step_s=perf["step_s"], set_up_s=perf.get("set_up_s", 0.0))
            found.append(((*name, Placement(**laid)), rate))
    return _mean(found)


def _mean(rates: Iterable[tuple[RateName, Rate]]) -> dict[RateName, Rate]:
    means: dict[RateName, Rate] = {}
    for name, rate in rates:
        means[name] = means[name] + rate if name in means else rate
    return means


def slowest(nodes: Iterable[Node]) -> GpuKind | None:
    """Return the lowest memory and rates of the nodes' GPUs; None without GPUs. A kind may be slower in fp32 only."""
    kinds = [kind for node in nodes if (kind := node.kind) is not None]
    rates = ("gb", "bf16_tflops", "tf32_tflops", "fp32_tflops", "memory_gb_s", "link_gb_s")
    worst = {rate: min(getattr(kind, rate) for kind in kinds) for rate in rates if kinds}
    return kinds[0]._replace(**worst) if kinds else None


def _prepared(stage: PrepareStage, store: Store) -> tuple[int, PairTokens]:
    """Return the pairs of a prepared set and their mean lengths; assumptions if it is not prepared."""
    manifest = store.sound_manifest(stage.kind, stage.key)
    info = manifest["info"] if manifest else {}
    lengths = TINY_LENGTHS if isinstance(stage.base.origin, PretrainStage) else UNSEEN_LENGTHS
    if "mean_tokens" in info:
        lengths = PairTokens(**info["mean_tokens"])
    if "pairs" in info:
        return int(info["pairs"]), lengths
    rows = stage.split.rows if stage.split.fetched else None
    return min((n for n in (rows, stage.draw.max_pairs) if n is not None), default=UNSEEN_PAIRS), lengths


def time_left_s(notes: Mapping[str, TrialNote], kinds: Mapping[str, str]) -> float | None:
    """Return the seconds until all of these trials are trained, by the trainings of known pace; None before there is one.

    `kinds` names, by key, the trainings that take equally long; a kind of unknown pace is assumed to take the mean of all.
    """
    took: dict[str, list[float]] = {}
    for key, note in notes.items():
        if note.train_s is not None:
            took.setdefault(kinds[key], []).append(note.train_s)
    if not took:
        return None
    means = {kind: sum(seconds) / len(seconds) for kind, seconds in took.items()}
    usual = sum(means.values()) / len(means)
    left_s, at_once = 0.0, 0
    for key, note in notes.items():
        if note.state not in ("waiting", "running"):
            continue
        trains = note.stage == "train" and note.total > 0
        # After its training a trial waits or evaluates.
        share = 1 - note.step / note.total if trains else float(note.train_s is None)
        left_s += share * means.get(kinds[key], usual)
        at_once += trains
    return left_s / max(1, at_once)


@dataclass(slots=True, kw_only=True)
class Pace:
    """How far one stage of a trial is, and how fast it goes. Rates are pairs per second; a training's is its last step's.

    `train_s` are the seconds of the whole training at the pace of its steps so far, None before there are enough of them.
    Shared stages may run at the same time: the one that reported last is shown.
    """

    stage: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    rate: float | None = None
    train_s: float | None = None
    # By stage and data set: the time of the first report, and how much was done then.
    _first: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def begin(self, stage: str) -> None:
        """Record that a stage has begun."""
        self.stage, self.done, self.total = stage, 0, 0
        self.loss = self.rate = None
        self._first = {known: first for known, first in self._first.items() if known[0] != stage}
        self._first[stage, ""] = time.monotonic(), 0

    def take(self, stage: str, row: Mapping[str, Any]) -> None:
        """Record the last row: {step, total, loss, pairs, step_s} of a training, {done, total} in pairs of other stages."""
        done = row.get("step", row.get("done"))
        if done is None or "total" not in row:
            return
        self.stage, self.done, self.total, self.loss = stage, int(done), int(row["total"]), row.get("loss")
        now = time.monotonic()
        began, before = self._first.setdefault((stage, row.get("dataset", "")), (now, self.done))
        per_s = (self.done - before) / max(now - began, 1e-3) or None
        self.rate = per_s
        if "step" in row:
            if per_s is not None and self.done - before >= ENOUGH_STEPS:
                self.train_s = self.total / per_s
            self.rate = row["pairs"] / row["step_s"] if row.get("step_s") and "pairs" in row else None
