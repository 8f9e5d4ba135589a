"""What every process that computes for us does first."""

import logging
import os
import warnings
from pathlib import Path

# One process of ours per core: more threads only fight (2 processes × 2 threads on 2 cores ran 3–8× slower).
THREADS = "1"
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": THREADS,
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}
# Ray reads its authentication mode when it is imported, and not again.
DRIVER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def has_cluster() -> bool:
    """Whether Ray would find a running cluster to join; asked without importing Ray."""
    return bool(os.environ.get("RAY_ADDRESS")) or Path("/tmp/ray/ray_current_cluster").is_file()


def set_ray_environment() -> None:
    """Settings of the driver that must stand before `import ray`; the user's own win."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def prepare_worker() -> None:
    """One thread on a CPU, and quiet libraries."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        torch.set_num_threads(int(THREADS))
    transformers_logging.disable_progress_bar()
