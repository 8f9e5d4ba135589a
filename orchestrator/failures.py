"""What went wrong, in the words of the innermost error: through Ray's and Train's wrappers, without importing them."""

from collections.abc import Iterator

from trainers.errors import SweepError


def message(error: BaseException) -> str:
    """One line for people: our own errors speak for themselves, others get their type in front."""
    causes = list(_causes(error))
    # A rank that lost its peer often reports first; the rank that knows why says more.
    cause = next((item for item in causes if isinstance(item, SweepError)), causes[0])
    if isinstance(cause, SweepError):
        return str(cause)
    first = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {first[0] if first else ''}"


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
