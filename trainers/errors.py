"""Every error that rmsweep raises on purpose. A message says what was wrong, where (file, row, flag), and what to do."""

import difflib
from collections.abc import Iterable


class SweepError(Exception):
    """Root of the tree; its message is written for the user and printed without a traceback."""


class SpecError(SweepError):
    """A spec or a flag that cannot be meant."""


class DataError(SweepError):
    """Preference data that cannot be read or trained on."""


class ModelError(SweepError):
    """A model that cannot be found, loaded or scored."""


class PlanError(SweepError):
    """Work that does not fit the machine or cluster."""


class StorageError(SweepError):
    """The artifact store cannot be read or written."""


class Damaged(StorageError):
    """An artifact is not what was written; `stage`, `key` and `attempt` say which."""

    def __init__(self, message: str, stage: str = "", key: str = "", attempt: str = "") -> None:
        super().__init__(message)
        self.stage, self.key, self.attempt = stage, key, attempt


class Unreachable(StorageError, OSError):
    """An object store does not answer or refuses; it is caught as an OSError where a disk's error would be."""


class TrackingError(SweepError):
    """MLflow cannot be reached or refused what was sent."""


class Interrupted(SweepError):
    """Stopped on request; what is there stays."""


class TrialFailed(SweepError):
    """A stage that started and did not end well."""


# What torch, CUDA and its libraries (cuBLAS, cuDNN, NCCL) say, in lower case, where torch has no class for it.
NO_MEMORY = (
    *("out of memory", "_status_alloc_failed", "failed to cuda calloc"),
    *("can't allocate memory", "cannot allocate memory", "bad_alloc"),
)


class OutOfMemory(TrialFailed):
    """The device or the host ran out of memory.

    `forward_tokens` is a budget that halves the heaviest forward; 0 where that is of one pair, None where nobody knows.
    """

    def __init__(self, message: str, *, forward_tokens: int | None = None) -> None:
        super().__init__(message)
        self.forward_tokens = forward_tokens


class Diverged(TrialFailed):
    """The loss or a gradient stopped being finite."""


class WorkerLost(TrialFailed):
    """A worker process died or stopped answering."""


class Timeout(TrialFailed):
    """Something took longer than it was given."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean …?` for the known names nearest to a mistyped one, else the list of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}."
