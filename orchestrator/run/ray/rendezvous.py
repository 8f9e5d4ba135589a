"""On a Ray that listens on loopback only, the ranks of a CPU gang find each other through a file.

Ray Train would start torch's TCPStore, a server that listens on every interface without authentication.
"""

import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from orchestrator.run.workers import LOOPBACK


class LoopbackTorchConfig(TorchConfig):
    """Like Ray Train's TorchConfig on a real cluster or with GPUs (whose NCCL opens its own sockets)."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    _folder: Path | None = None

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        on_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        if ray.util.get_node_ip_address() != LOOPBACK or on_gpus:
            super().on_start(worker_group, backend_config)
            return
        self._folder = Path(tempfile.mkdtemp(prefix="rmsweep-gang-"))
        worker_group.execute(_set_torch_distributed_env_vars)
        ranks = range(len(worker_group))
        joining = [
            worker_group.execute_single_async(
                rank, _join, str(self._folder / "ranks"), rank, len(ranks), backend_config.timeout_s
            )
            for rank in ranks
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_shutdown(worker_group, backend_config)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _join(file: str, rank: int, world_size: int, timeout_s: int) -> None:
    from torch import distributed as dist

    from trainers.train.engine import gloo_on_loopback

    gloo_on_loopback()
    # Nothing listens there; some libraries only check that the variables are set.
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
