"""What fits where: capacity, and Placement of a training. Pure functions, no Ray; what starts when is gate.py's.

The memory model here is the coarse one of weights, gradients and AdamW's two moments in fp32 (16 bytes a
parameter, DESIGN.md), with a stated margin for activations; GPU figures are untested for want of a GPU.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.spec import PlacementRule, TrialSpec, matches
from trainers.errors import PlanError
from trainers.specs import BUILTIN, ModelSpec, Placement

STATE_BYTES_PER_PARAMETER = 16
# Share of a GPU that training state may take; the rest is for activations and fragmentation (unmeasured).
STATE_SHARE = 0.7
LARGE_MODEL = 2_500_000_000
DEFAULT_GPU_GB = 24.0
GPU_GB = {"H100": 80.0, "H200": 141.0, "A100": 40.0, "A100-80G": 80.0, "L40S": 48.0, "A10G": 24.0, "L4": 24.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: whole CPUs and GPUs, those free in a gate's state, all of them in a capacity."""

    id: str
    cpus: int
    gpus: int = 0
    gpu_gb: float = DEFAULT_GPU_GB


def local_capacity() -> tuple[Node, ...]:
    """This machine, without asking Ray or torch: what the driver lists, narrowed by CUDA_VISIBLE_DEVICES."""
    listed = Path("/proc/driver/nvidia/gpus")
    files = sorted(listed.glob("*/information")) if listed.is_dir() else []
    sizes = [_gpu_gb(file.read_text()) for file in files]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(sizes) if visible is None else min(len(sizes), len([item for item in visible.split(",") if item]))
    )
    gpu_gb = min(sizes, default=DEFAULT_GPU_GB)
    return (Node(id="local", cpus=len(os.sched_getaffinity(0)), gpus=count, gpu_gb=gpu_gb),)


def _gpu_gb(information: str) -> float:
    """Memory by the name in the driver's listing; the longest known name that stands in it."""
    known = [kind for kind in GPU_GB if kind in information.replace("A100-SXM4-80GB", "A100-80G")]
    return GPU_GB[max(known, key=len)] if known else DEFAULT_GPU_GB


def gpu_state_gb(parameters: int) -> float:
    """GB of weights, gradients and optimiser, before ZeRO divides them."""
    return parameters * STATE_BYTES_PER_PARAMETER / 1e9


def fits_gpus(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> bool:
    """Whether the largest model of known size can be trained on the GPUs together."""
    room = sum(node.gpus * node.gpu_gb for node in capacity) * STATE_SHARE
    largest = max((model.parameters or 0 for model in models), default=0)
    return room > 0 and gpu_state_gb(largest) <= room


def require_fit(models: Sequence[ModelSpec], capacity: Sequence[Node]) -> None:
    """Raises PlanError where a model of known size fits neither the GPUs nor, without any, a CPU trial."""
    gpus = sum(node.gpus for node in capacity)
    too_large = [
        model
        for model in dict.fromkeys(models)
        if (model.parameters or 0) > 0 and (gpus == 0 or not fits_gpus([model], capacity))
    ]
    if too_large:
        lines = ", ".join(
            f"{m.name} ({gpu_state_gb(m.parameters or 0):.0f} GB of training state)" for m in too_large
        )
        raise PlanError(
            f"{gpus} GPUs are here, and these models need more: {lines}. Run on a cluster (RAY_ADDRESS), "
            "choose --models, or try --profile laptop."
        )


def place(trial: TrialSpec, capacity: Sequence[Node], rules: Sequence[PlacementRule] = ()) -> Placement:
    """How a trial's training is laid out: on GPUs where there are any, else on CPU processes.

    The effective batch is always the spec's. Raises PlanError.
    """
    if any(node.gpus for node in capacity):
        return _place_on_gpus(trial, capacity)
    batch = trial.optim.effective_batch
    rule = next((rule for rule in rules if matches(trial.labels, rule.match)), None)
    cpus = sum(node.cpus for node in capacity)
    world_size = rule.world_size if rule is not None else 1
    if world_size > cpus or batch % world_size:
        world_size = 1
    # Padding is the cost of a forward with several real pairs; tiny models pay per forward instead.
    wanted = batch if trial.model.source.startswith(BUILTIN) else 1
    return _split(batch, world_size, rule.zero_stage if rule is not None else 0, wanted, "cpu")


def _place_on_gpus(trial: TrialSpec, capacity: Sequence[Node]) -> Placement:
    batch = trial.optim.effective_batch
    parameters = trial.model.parameters or 0
    gpus = sum(node.gpus for node in capacity)
    room_gb = min(node.gpu_gb for node in capacity if node.gpus) * STATE_SHARE
    world_size = 1
    while gpu_state_gb(parameters) / world_size > room_gb:
        world_size *= 2
        if world_size <= gpus and batch % world_size:
            raise PlanError(
                f"{trial.model.name} needs {world_size} GPUs, which do not divide an effective batch of {batch} "
                f"pairs; give --effective-batch a multiple of {world_size}."
            )
        if world_size > gpus:
            raise PlanError(
                f"{trial.model.name} needs {gpu_state_gb(parameters):.0f} GB of training state, more than {gpus} GPUs of "
                f"{room_gb / STATE_SHARE:.0f} GB hold. Use more or larger GPUs, or another model."
            )
    wanted = 1 if parameters >= LARGE_MODEL else 4
    return _split(batch, world_size, 3 if world_size > 1 else 0, wanted, "cuda")


def _split(
    batch: int, world_size: int, zero_stage: int, wanted: int, device: Literal["cpu", "cuda"]
) -> Placement:
    per_rank = batch // world_size
    micro_batch = next(size for size in range(min(wanted, per_rank), 0, -1) if per_rank % size == 0)
    return Placement(
        world_size=world_size,
        zero_stage=zero_stage,
        micro_batch=micro_batch,
        accumulation=per_rank // micro_batch,
        device=device,
    )
