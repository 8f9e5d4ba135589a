"""Classify a trial's failure, and decide whether, when and with which placement it is tried again.

Errors are unwrapped from those of Ray and Train, which are not imported, and classified by trainers/errors.py.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import WEIGHTS, Store
from trainers.errors import NO_MEMORY, Damaged, Diverged, Interrupted, OutOfMemory, SweepError, WorkerLost
from trainers.specs import Placement

# Errors of Ray and Train that mean a lost process, node or worker group.
_LOST = frozenset(
    {
        *("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError"),
        *("LocalRayletDiedError", "ActorUnschedulableError", "TaskUnschedulableError", "ObjectLostError"),
        *("OwnerDiedError", "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"),
        *("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError", "ActorPlacementGroupRemoved"),
    }
)
# If a training's heaviest forward is unknown, we halve down to about one ordinary pair.
LEAST_TOKENS = 512
# Messages of a rank whose peer is gone.
_LOST_PEER = (
    *("connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout"),
    *("connection refused", "timed out waiting", "nccl", "gloo"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed attempt: the name of its error class, its message, and the `forward_tokens` of an OutOfMemory."""

    cause: str
    message: str
    forward_tokens: int | None = None


def classify(error: BaseException) -> Failure:
    """Return the failure behind an error; an error outside our classes is named by its own class."""
    causes = list(_causes(error))
    # A rank that lost its peer often reports first; prefer the rank that knows why.
    cause = next((item for item in causes if isinstance(item, SweepError)), None)
    if cause is not None:
        smaller = cause.forward_tokens if isinstance(cause, OutOfMemory) else None
        return Failure(cause=type(cause).__name__, message=str(cause), forward_tokens=smaller)
    full = next((item for item in causes if _is_out_of_memory(item)), None)
    if full is not None:
        return Failure(cause=OutOfMemory.__name__, message=f"out of memory: {_first_line(full)}")
    lost = next((item for item in causes if _is_lost(item)), None)
    if lost is not None:
        return Failure(
            cause=WorkerLost.__name__,
            message=f"a process of the trial died or stopped answering ({_first_line(lost)})",
        )
    first = causes[0]
    return Failure(cause=type(first).__name__, message=f"{type(first).__name__}: {_first_line(first)}")


def damage_behind(error: BaseException) -> Damaged | None:
    """Return the Damaged behind an error, None where there is none."""
    return next((item for item in _causes(error) if isinstance(item, Damaged)), None)


def set_aside_damage(error: BaseException, store: Store) -> None:
    """If a damaged artifact caused the error, make it count as missing and raise Damaged, which says so."""
    found = damage_behind(error)
    if found is not None:
        # The next one that needs it computes it again.
        store.discard(found.stage, found.key, found.attempt)
        if found.stage == WEIGHTS and not store.complete(WEIGHTS, found.key):
            # Discard the log too, so that the training counts as missing, not as evicted.
            store.discard("train", found.key)
        said = f"{found}; it counts as missing now, and is computed anew by the same command"
        raise Damaged(said, found.stage, found.key, found.attempt) from error


def lost(error: BaseException) -> bool:
    """Return whether the error means that a process, or its node, is gone."""
    return classify(error).cause == WorkerLost.__name__


def interrupted(error: BaseException) -> bool:
    """Return whether the error is a requested stop."""
    return any(isinstance(item, Interrupted) for item in _causes(error))


def is_final(cause: str) -> bool:
    """Return whether the training would fail the same way again."""
    return cause == Diverged.__name__


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    # If a process is gone, Ray only guesses that memory ran out.
    return named or (not _is_gone(error) and _says(error, NO_MEMORY))


def _is_gone(error: BaseException) -> bool:
    return not _LOST.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED):
        return True
    return _is_gone(error) or _says(error, _LOST_PEER)


def _says(error: BaseException, signs: Sequence[str]) -> bool:
    """Return whether an error of torch or Ray, which have few error classes, contains one of these texts."""
    broken = isinstance(error, RuntimeError) or type(error).__module__.startswith(("torch.", "ray."))
    return broken and any(sign in str(error).lower() for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors wrapped by RayTaskError, WorkerGroupError and ControllerError, else the error itself."""
    ranks = getattr(error, "worker_failures", None)
    inner = [ranks[rank] for rank in sorted(ranks)] if isinstance(ranks, dict) else []
    inner += [getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause")]
    wrapped = [item for item in inner if isinstance(item, BaseException) and item is not error]
    if not wrapped:
        yield error
    for item in wrapped:
        yield from _causes(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAttempt:
    """How long to wait before the next attempt, and its placement."""

    wait_s: float
    placement: Placement


def next_attempt(
    failures: Sequence[Failure],
    placement: Placement,
    policy: RetryPolicy,
    gpus: int = 0,
    *,
    training: bool = True,
) -> NextAttempt | None:
    """Return the attempt that follows the last of `failures`; None where the policy allows no more.

    `gpus` is the most that the training could get. Unless the `training` failed, its placement stays.
    """
    cause = failures[-1].cause
    times = sum(failure.cause == cause for failure in failures)
    if times > policy.limits.get(cause, 0):
        return None
    wait_s = min(policy.back_off_s * 2 ** (times - 1), policy.back_off_most_s)
    if cause != "OutOfMemory" or not training:
        return NextAttempt(wait_s=wait_s, placement=placement)
    smaller = with_less_memory(placement, gpus, failures[-1].forward_tokens)
    # With another placement, start at once: waiting would free nothing.
    return None if smaller is None else NextAttempt(wait_s=0.0, placement=smaller)


def with_less_memory(
    placement: Placement, gpus: int = 0, forward_tokens: int | None = None
) -> Placement | None:
    """Return the next placement that needs less memory at the same effective batch; None where there is none.

    Halves the tokens of a forward down to one pair, then recomputes activations; then, on GPUs, doubles the world size
    up to `gpus`, and last offloads the optimiser. `forward_tokens` is OutOfMemory's own proposal.
    """
    if forward_tokens is None:
        forward_tokens = placement.forward_tokens // 2 if placement.forward_tokens > LEAST_TOKENS else 0
    if forward_tokens:
        return replace(placement, forward_tokens=forward_tokens)
    if not placement.checkpointing:
        return replace(placement, checkpointing=True)
    if placement.device == "cpu" or placement.offload_optimizer:
        return None
    # A checkpoint resumes at another world size, but not at another ZeRO stage; bf16 without ZeRO runs as ZeRO-1.
    divided = replace(placement, zero_stage=max(placement.zero_stage, 1))
    world_size = min(2 * placement.world_size, gpus)
    if world_size <= placement.world_size:
        return replace(divided, offload_optimizer=True)
    return replace(divided, world_size=world_size)


def on_fewer(placement: Placement, fresh: Placement) -> Placement | None:
    """Return `fresh`, which is planned for fewer devices, with the reductions of earlier attempts at `placement`.

    None where it does not use fewer devices.
    """
    if fresh.world_size >= placement.world_size or fresh.device != placement.device:
        return None
    stage = max(fresh.zero_stage, placement.zero_stage)
    return replace(
        fresh,
        compile=placement.compile and stage < 3,
        # A forward that was too large for one rank stays too large in a smaller gang.
        forward_tokens=min(fresh.forward_tokens, placement.forward_tokens),
        checkpointing=fresh.checkpointing or placement.checkpointing,
        offload_optimizer=fresh.offload_optimizer or placement.offload_optimizer,
        # A checkpoint does not resume at another ZeRO stage; a higher one never needs more memory.
        zero_stage=stage,
    )


def describe_fewer(planned: Placement, fewer: Placement) -> str:
    """Describe a training that continues on fewer devices than planned."""
    what = "GPUs" if planned.device == "cuda" else "processes"
    return (
        f"planned for {planned.world_size} {what}, which the cluster no longer has; on {fewer.world_size}: "
        f"{describe_split(fewer)}, effective batch as before"
    )


def describe_change(before: Placement, after: Placement) -> str:
    """Describe how a training continues after it ran out of memory."""
    wider = f"on {after.world_size} GPUs " if after.world_size > before.world_size else ""
    return f"{wider}with {describe_split(after)}"


def describe_split(placement: Placement) -> str:
    """Describe how a step is split, as in `4096 tokens a forward`."""
    recomputed = ", activations recomputed" if placement.checkpointing else ""
    offloaded = ", optimiser in the host's memory" if placement.offload_optimizer else ""
    return f"{placement.forward_tokens} tokens a forward{recomputed}{offloaded}"
