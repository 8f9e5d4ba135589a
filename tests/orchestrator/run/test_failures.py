"""Which error it was, beneath the wrappers of Ray and Train, whose shapes these stand-ins have."""

import errno

import pytest
import torch

from orchestrator.run.failures import classify, damage_behind, interrupted, is_final
from trainers.errors import Damaged, Diverged, Interrupted, OutOfMemory, WorkerLost


class RayTaskError(Exception):
    """Carries what a task raised as `cause`."""

    def __init__(self, cause=None):
        super().__init__("traceback of a remote process")
        self.cause = cause


class ControllerError(Exception):
    """Carries what the controller met."""

    def __init__(self, failure):
        super().__init__("controller")
        self.controller_failure = failure


class WorkerGroupError(Exception):
    """Carries what each rank raised."""

    def __init__(self, failures):
        super().__init__("worker group")
        self.worker_failures = failures


class UserExceptionWithTraceback(Exception):
    """Carries what a rank's function raised."""

    def __init__(self, error):
        super().__init__("user")
        self._base_exc = error


class ActorDiedError(Exception):
    """A process that is gone."""


PEER = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: error,
        RayTaskError,
        lambda error: RayTaskError(RayTaskError(error)),
        lambda error: ControllerError(WorkerGroupError({0: RayTaskError(error)})),
        lambda error: WorkerGroupError({0: PEER, 1: UserExceptionWithTraceback(error)}),
    ],
)
def test_the_tree_is_found_beneath_every_wrapper(wrap):
    assert classify(wrap(Diverged("step 3"))).cause == "Diverged"
    assert classify(wrap(Diverged("step 3"))).message == "step 3"
    found = damage_behind(wrap(Damaged("file x", "train", "k", "a")))
    assert (found.stage, found.key, found.attempt) == ("train", "k", "a")
    assert interrupted(wrap(Interrupted("stop")))
    assert not interrupted(wrap(OutOfMemory("no room")))
    assert damage_behind(wrap(OutOfMemory("no room"))) is None


def test_who_knows_why_is_heard_before_who_lost_a_peer():
    both = WorkerGroupError({0: PEER, 1: OutOfMemory("a micro-batch of 4")})
    assert (classify(both).cause, classify(both).message) == ("OutOfMemory", "a micro-batch of 4")
    assert classify(WorkerGroupError({0: PEER, 1: ActorDiedError("gone")})).cause == "WorkerLost"


@pytest.mark.parametrize(
    "error",
    [
        PEER,
        ActorDiedError("The actor died"),
        # Ray guesses why; the process may have been killed for any reason.
        type("WorkerCrashedError", (Exception,), {"__module__": "ray.exceptions"})("killed: out of memory?"),
        RuntimeError("NCCL error: unhandled system error"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        WorkerLost("rank 1"),
    ],
)
def test_a_process_that_is_gone(error):
    assert classify(RayTaskError(error)).cause == "WorkerLost"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.distributed.DistBackendError(
            "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
            "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function "
            "failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        torch.distributed.DistBackendError(
            "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda error\n"
            "Last error:\nFailed to CUDA calloc 10485760 bytes"
        ),
    ],
)
def test_memory_that_ran_out(error):
    assert classify(WorkerGroupError({0: PEER, 1: RayTaskError(error)})).cause == "OutOfMemory"


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("gloo"), ValueError("connection refused"), ValueError("out of memory")),
        *(RuntimeError("shapes differ"), torch.AcceleratorError("CUDA error: device-side assert triggered")),
    ],
)
def test_a_defect_keeps_its_own_name(error):
    failure = classify(RayTaskError(error))
    assert failure.cause == type(error).__name__
    assert failure.message.startswith(f"{type(error).__name__}: ")


def test_an_error_that_names_itself_as_its_cause_ends():
    error = RayTaskError()
    error.cause = error
    assert classify(error).cause == "RayTaskError"


def test_only_a_diverged_training_is_final():
    assert is_final("Diverged")
    assert not is_final("WorkerLost")
    assert not is_final("")
