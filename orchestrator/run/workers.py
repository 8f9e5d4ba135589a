"""What every process that computes for us does first, and between two trials."""

import contextlib
import gc
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from orchestrator.run.events import Post, TakeRow, reporting
from orchestrator.spec.redaction import without_secrets

PROBE_S = 3.0
# torch reads the second name, too.
ALLOCATOR, OLDER_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
WORKER_ENVIRONMENT = {
    # One process of ours per core: more threads only fight (2 processes × 2 threads on 2 cores ran 3–8× slower).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Forwards differ in their tokens: blocks of fixed sizes would leave gaps between them.
    ALLOCATOR: "expandable_segments:True",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
}
LOOPBACK = "127.0.0.1"
# Ray reads its settings when it is imported, and not again.
DRIVER_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Seconds between Tune's records of all its trials, which nobody reads: its folder is scratch.
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    # Tune's own handler would turn Ctrl-C into a sweep that ended well.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def cluster_address() -> str | None:
    """Address of the cluster to join: RAY_ADDRESS, else what `ray start` left on this machine. No Ray needed."""
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    started = Path("/tmp/ray/ray_current_cluster")
    address = started.read_text().strip() if started.is_file() else ""
    # A cluster that was killed leaves its address behind, and Ray would try it for minutes.
    return address if address and answers(address) else None


def answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_S):
            return True
    except (OSError, ValueError):
        return False


def set_ray_environment() -> None:
    """Settings of the driver that must stand before `import ray`; the user's own win."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A cluster that is joined says whether it wants a token: where there is none to show, it does not.
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(token) or (Path.home() / ".ray" / "auth_token").is_file()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token or not cluster_address() else "disabled")


def prepare_worker() -> None:
    """One thread on a CPU, and quiet libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def working(stage: str, post: Post) -> Iterator[TakeRow]:
    """Make this a process that computes a stage for others, who follow it by its events; yield its report function."""
    prepare_worker()
    with without_secrets(), reporting(stage, post) as report:
        yield report


def make_room() -> None:
    """Give back what a trial held: a model and its engine refer to each other, and the next one needs their room.

    What is there after the first trial is the libraries' and stays; to look through it takes 0.2 s each time.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
