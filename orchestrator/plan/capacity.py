"""What there is to run on. Pure functions, no Ray. What fits where is placement.py's, what starts when gate.py's."""

import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_GPU_GB = 24.0
GPU_GB = {"H100": 80.0, "H200": 141.0, "A100": 40.0, "A100-80G": 80.0, "L40S": 48.0, "A10G": 24.0, "L4": 24.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: whole CPUs and GPUs, those free in a gate's state, all of them in a capacity."""

    id: str
    cpus: int
    gpus: int = 0
    gpu_gb: float = DEFAULT_GPU_GB
    gpu_kind: str = ""


def local_capacity() -> tuple[Node, ...]:
    """This machine, without asking Ray or torch: what the driver lists, narrowed by CUDA_VISIBLE_DEVICES."""
    listed = Path("/proc/driver/nvidia/gpus")
    files = sorted(listed.glob("*/information")) if listed.is_dir() else []
    kinds = [_gpu_kind(file.read_text()) for file in files]
    sizes = [GPU_GB.get(kind, DEFAULT_GPU_GB) for kind in kinds]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(sizes) if visible is None else min(len(sizes), len([item for item in visible.split(",") if item]))
    )
    gpu_gb = min(sizes, default=DEFAULT_GPU_GB)
    gpu_kind = kinds[sizes.index(gpu_gb)] if kinds else ""
    cpus = len(os.sched_getaffinity(0))
    return (Node(id="local", cpus=cpus, gpus=count, gpu_gb=gpu_gb, gpu_kind=gpu_kind),)


def _gpu_kind(information: str) -> str:
    """The kind by the name in the driver's listing; the longest known name that stands in it, "" for none."""
    known = [kind for kind in GPU_GB if kind in information.replace("A100-SXM4-80GB", "A100-80G")]
    return max(known, key=len, default="")
