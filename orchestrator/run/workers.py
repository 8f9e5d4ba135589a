"""Set up worker processes and the driver's Ray, and free memory between trials."""

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
    # We run one process per core; more threads compete for it (2 processes × 2 threads on 2 cores ran 3–8× slower).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Forwards vary in size, and blocks of fixed sizes would fragment the memory.
    ALLOCATOR: "expandable_segments:True",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
}
LOOPBACK = "127.0.0.1"
# Ray reads these only when it is imported.
DRIVER_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Seconds between Tune's own snapshots, which nobody reads.
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    # Tune's own handler would treat Ctrl-C as success.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def cluster_address() -> str | None:
    """Return the address of the cluster to join: RAY_ADDRESS, else that of `ray start` on this machine. Imports no Ray."""
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    started = Path("/tmp/ray/ray_current_cluster")
    address = started.read_text().strip() if started.is_file() else ""
    # A killed cluster leaves its address behind, and Ray would try it for minutes.
    return address if address and answers(address) else None


def answers(address: str) -> bool:
    """Return whether a server listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_S):
            return True
    except (OSError, ValueError):
        return False


def set_ray_environment() -> None:
    """Set the driver's environment before `import ray`; the user's own values win."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # If there is no token on this machine, its cluster asks for none.
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(token) or (Path.home() / ".ray" / "auth_token").is_file()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token or not cluster_address() else "disabled")


def prepare_worker() -> None:
    """Use one thread on a CPU, and silence libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def working(stage: str, post: Post, key: str, devices: int = 1) -> Iterator[TakeRow]:
    """Set up this worker process for a stage, post its events, and yield its report function."""
    prepare_worker()
    with without_secrets(), reporting(stage, post, key, devices) as report:
        yield report


def make_room() -> None:
    """Free a trial's model and engine, which refer to each other, before the next trial starts.

    Objects that survive the first trial belong to libraries; freezing them saves 0.2 s each time.
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
