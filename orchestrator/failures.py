"""What went wrong, by the tree of trainers/errors.py: through Ray's and Train's wrappers, without importing them."""

import errno
from collections.abc import Iterator

from orchestrator.attempts import Failure
from trainers.errors import Damaged, Diverged, Interrupted, OutOfMemory, SweepError, WorkerLost

# Ray's and Train's names for a process, node or worker group that is gone.
_LOST = frozenset(
    {
        *("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError"),
        *("LocalRayletDiedError", "ActorUnschedulableError", "TaskUnschedulableError", "ObjectLostError"),
        *("OwnerDiedError", "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"),
        *("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError", "ActorPlacementGroupRemoved"),
    }
)
# What a rank says whose peer is gone.
_LOST_PEER = (
    *("connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout"),
    *("connection refused", "timed out waiting", "nccl", "gloo"),
)


def classify(error: BaseException) -> Failure:
    """The failure by its error class; the class of an error that the tree does not name is its own."""
    causes = list(_causes(error))
    # A rank that lost its peer often reports first; the rank that knows why says more.
    cause = next((item for item in causes if isinstance(item, SweepError)), None)
    if cause is not None:
        return Failure(cause=type(cause).__name__, message=str(cause))
    if any("OutOfMemory" in type(item).__name__ or isinstance(item, MemoryError) for item in causes):
        return Failure(cause=OutOfMemory.__name__, message=f"out of memory: {_first_line(causes[0])}")
    lost = next((item for item in causes if _is_lost(item)), None)
    if lost is not None:
        return Failure(
            cause=WorkerLost.__name__,
            message=f"a process of the trial died or stopped answering ({_first_line(lost)})",
        )
    first = causes[0]
    return Failure(cause=type(first).__name__, message=f"{type(first).__name__}: {_first_line(first)}")


def damage(error: BaseException) -> Damaged | None:
    """The damaged artifact that an error is about, if it is about one."""
    return next((item for item in _causes(error) if isinstance(item, Damaged)), None)


def lost(error: BaseException) -> bool:
    """Whether a process, or the node that it was on, is gone."""
    return classify(error).cause == WorkerLost.__name__


def interrupted(error: BaseException) -> bool:
    """Whether it was asked for."""
    return any(isinstance(item, Interrupted) for item in _causes(error))


def is_final(cause: str) -> bool:
    """Whether the same training would fail the same way again."""
    return cause == Diverged.__name__


def _is_lost(error: BaseException) -> bool:
    if {kind.__name__ for kind in type(error).__mro__} & _LOST:
        return True
    said = str(error).lower()
    broken = isinstance(error, RuntimeError) or type(error).__module__.startswith(("torch.", "ray."))
    if isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED):
        return True
    return broken and any(sign in said for sign in _LOST_PEER)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors at the bottom of RayTaskError.cause, WorkerGroupError, ControllerError and their tracebacks."""
    ranks = getattr(error, "worker_failures", None)
    inner = [ranks[rank] for rank in sorted(ranks)] if isinstance(ranks, dict) else []
    inner += [getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause")]
    wrapped = [item for item in inner if isinstance(item, BaseException) and item is not error]
    if not wrapped:
        yield error
    for item in wrapped:
        yield from _causes(item)
