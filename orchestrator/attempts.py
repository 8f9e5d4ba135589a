"""What is done about a failure: whether a trial is tried again, after how long, and with what placement. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.spec import RetryPolicy
from trainers.specs import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed attempt: the name of its error class, and its message."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The next attempt: after how many seconds, and with what placement."""

    wait_s: float
    placement: Placement


def next_attempt(failures: Sequence[Failure], placement: Placement, policy: RetryPolicy) -> Retry | None:
    """What follows the last of `failures`; None where the policy has had enough of its kind."""
    cause = failures[-1].cause
    times = sum(failure.cause == cause for failure in failures)
    if times > policy.limit(cause):
        return None
    wait_s = min(policy.back_off_s * 2 ** (times - 1), policy.back_off_most_s)
    if cause != "OutOfMemory":
        return Retry(wait_s=wait_s, placement=placement)
    smaller = with_less_memory(placement)
    # Another placement is another attempt at once; waiting would free nothing.
    return None if smaller is None else Retry(wait_s=0.0, placement=smaller)


def with_less_memory(placement: Placement) -> Placement | None:
    """Half the micro-batch and twice the accumulation, then recomputed activations: the effective batch stays.

    An odd micro-batch shrinks to its largest proper divisor. None where nothing is left to give up.
    """
    micro_batch = placement.micro_batch
    if micro_batch > 1:
        smaller = max(size for size in range(1, micro_batch // 2 + 1) if micro_batch % size == 0)
        accumulation = placement.accumulation * micro_batch // smaller
        return replace(placement, micro_batch=smaller, accumulation=accumulation)
    return None if placement.checkpointing else replace(placement, checkpointing=True)


def on_fewer(placement: Placement, fresh: Placement) -> Placement | None:
    """`fresh`, planned for fewer devices, with what earlier attempts gave up of `placement`; None where it has no fewer.

    The effective batch is that of both.
    """
    if fresh.world_size >= placement.world_size or fresh.device != placement.device:
        return None
    # A micro-batch that was too large for the planned gang is too large for each rank of a smaller one.
    most = min(fresh.micro_batch, placement.micro_batch)
    per_rank = fresh.micro_batch * fresh.accumulation
    micro_batch = next(size for size in range(most, 0, -1) if per_rank % size == 0)
    checkpointing = fresh.checkpointing or placement.checkpointing
    # A checkpoint goes on at another world size, not at another stage; a higher one never needs more memory.
    zero_stage = max(fresh.zero_stage, placement.zero_stage)
    return replace(
        fresh,
        micro_batch=micro_batch,
        accumulation=per_rank // micro_batch,
        checkpointing=checkpointing,
        zero_stage=zero_stage,
    )


def describe_fewer(planned: Placement, fewer: Placement) -> str:
    """That a training goes on fewer devices than planned, for people."""
    what = "GPUs" if planned.device == "cuda" else "processes"
    return (
        f"planned for {planned.world_size} {what}, which the cluster no longer has; on {fewer.world_size}: "
        f"{describe(fewer)}, effective batch {fewer.effective_batch} as before"
    )


def describe(placement: Placement) -> str:
    """`2 × 8 pairs a forward × forwards`, for people."""
    recomputed = ", activations recomputed" if placement.checkpointing else ""
    return f"micro-batch {placement.micro_batch} × accumulation {placement.accumulation}{recomputed}"
