"""What is there to run on, and the gate's decision. Pure functions, no Ray. What fits where is placement.py's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

DEFAULT_GPU_GB = 24.0
GPU_GB = {"H100": 80.0, "H200": 141.0, "A100": 40.0, "A100-80G": 80.0, "L40S": 48.0, "A10G": 24.0, "L4": 24.0}

RequestKind = Literal["shared", "evaluate", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: whole CPUs and GPUs, those free in a gate's state, all of them in a capacity."""

    id: str
    cpus: int
    gpus: int = 0
    gpu_gb: float = DEFAULT_GPU_GB
    gpu_kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`workers` processes of `cpus` and `gpus` each, wanted by one stage of one trial."""

    id: str
    kind: RequestKind
    workers: int = 1
    cpus: int = 1
    gpus: int = 0

    @property
    def width(self) -> int:
        """What it occupies: GPUs where it asks for any, else CPUs."""
        return self.workers * (self.gpus or self.cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The node of each worker of a request."""

    request: Request
    nodes: tuple[str, ...]


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


def decide(free: Sequence[Node], waiting: Sequence[Request]) -> list[Grant]:
    """Which waiting requests (in order of arrival) start now on what is free.

    Work that others wait for, and evaluation, come before training; the widest training first. The first
    that does not fit holds back those behind it, so nothing wide starves.
    """
    ranked = sorted(waiting, key=lambda request: (request.kind == "train", -request.width))
    nodes = {node.id: node for node in free}
    grants: list[Grant] = []
    for request in ranked:
        grant = _fit(nodes, request)
        if grant is None:
            break
        for node in grant.nodes:
            nodes[node] = _less(nodes[node], request)
        grants.append(grant)
    return grants


def _less(node: Node, request: Request) -> Node:
    return replace(node, cpus=node.cpus - request.cpus, gpus=node.gpus - request.gpus)


def _fit(nodes: dict[str, Node], request: Request) -> Grant | None:
    """All workers on the fullest node that holds them, else spread over as few nodes as it takes."""

    def slots(node: Node) -> int:
        by_cpu = node.cpus // request.cpus if request.cpus else request.workers
        by_gpu = node.gpus // request.gpus if request.gpus else request.workers
        return min(by_cpu, by_gpu)

    whole = [node for node in nodes.values() if slots(node) >= request.workers]
    if whole:
        best = min(whole, key=lambda node: (slots(node), node.id))
        return Grant(request=request, nodes=(best.id,) * request.workers)
    chosen: list[str] = []
    for node in sorted(nodes.values(), key=lambda node: (-slots(node), node.id)):
        chosen += [node.id] * min(slots(node), request.workers - len(chosen))
    return Grant(request=request, nodes=tuple(chosen)) if len(chosen) == request.workers else None
