"""This project's trainer as a contender: its model, its engine and its optimiser step, as `trainers.train.loop` runs them."""

import contextlib
import time
from collections.abc import Sequence

# Imported by the engine when it is needed; here, so that it is not counted as the model's memory.
import deepspeed  # noqa: F401

from benchmarks.data import parameter_bytes
from benchmarks.naive import pretend_trained
from benchmarks.turns import BETA, HEAD_SEED, LEARNING_RATE, Job
from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models.layouts import layout_of
from trainers.models.loading import device, load_model
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import References
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement
from trainers.train.engine import make_engine, process_group
from trainers.train.loop import TrainInputs, optimiser_step


class OurContender:
    """`batch` pairs a step in one packed forward; the reference's log-probs are computed once, beforehand."""

    def __init__(self, job: Job, pairs: Sequence[TokenPair]) -> None:
        reward = RewardSpec(kind=job.kind, beta=BETA if job.kind == "im_rm" else None)
        self.model = load_model(
            job.model,
            tokenizer=load_tokenizer(job.model),
            output=reward.type.output,
            precision=job.precision,
            head_seed=HEAD_SEED,
        ).to(device())
        self.parameter_bytes = parameter_bytes(self.model)
        began = time.perf_counter()
        reference = compute_reference(self.model, pairs, report=_silent) if reward.uses_reference else None
        self.prepass_seconds = time.perf_counter() - began
        self._inputs = _inputs(job, reward, pairs, reference)
        self._module = RewardModule(self.model, reward)
        self._position = {pair.index: position for position, pair in enumerate(pairs)}
        if job.task == "score":
            pretend_trained(self.model)
            return
        # The group lasts as long as the worker.
        self._group = contextlib.ExitStack()
        self._group.enter_context(process_group())
        self._engine = make_engine(
            self._module, optim=self._inputs.optim, placement=self._inputs.placement, precision=job.precision
        )

    def step(self, pairs: Sequence[TokenPair]) -> float:
        """One optimiser step; its loss."""
        positions = [self._position[pair.index] for pair in pairs]
        sums, _ = optimiser_step(self._engine, self._inputs, positions, layout_of(self.model), (0.0, 0.0))
        return sums[0] / len(pairs)

    def mean_margin(self, pairs: Sequence[TokenPair]) -> float:
        """Score the pairs; the mean margin, for comparison with other contenders."""
        chosen, rejected = score_pairs(self._module, pairs, reference=self._inputs.reference, report=_silent)
        return float((chosen - rejected).mean())


def _silent(_: object) -> None:
    """Progress that nobody reads."""


def _inputs(
    job: Job, reward: RewardSpec, pairs: Sequence[TokenPair], reference: References | None
) -> TrainInputs:
    return TrainInputs(
        name="benchmark",
        location=job.model,
        revision=None,
        precision=job.precision,
        reward=reward,
        optim=OptimSpec(lr=LEARNING_RATE, effective_batch=job.batch),
        placement=Placement(forward_tokens=sum(pair.tokens for pair in pairs)),
        seed=HEAD_SEED,
        pairs=pairs,
        reference=reference,
    )
