"""What a sweep may run on: `--cluster` strings, a Ray cluster's YAML, or the nodes that are there, as groups of nodes.

    2x8xH100-80GB                          two nodes with eight H100 each
    2x8xH100-80GB,1x4xA100-40GB@2.50       and one with four A100, at 2.50 $ per GPU-hour
    cluster.yaml                           max_workers of each node type, in the format of `ray up`

Pure, but for reading the file. No Ray.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.plan.capacity import DEFAULT_GPU_GB, Node
from trainers.errors import PlanError

EXAMPLE = "2x8xH100-80GB, mixed 2x8xH100-80GB,1x4xA100-40GB, or with a price per GPU-hour 1x8xH100-80GB@2.50"
# What a node has beside each GPU where nobody says; data preparation and actors need few.
CPUS_PER_GPU = 8
MOST_NODES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """A GPU: memory in GB, dense TFLOP/s in bf16 and in plain fp32 (no TF32: torch's default), $ per GPU-hour."""

    name: str
    gb: float
    bf16_tflops: float
    fp32_tflops: float
    price: float


# Memory and peak rates from NVIDIA's data sheets (SXM where there is a choice; rates without sparsity). TF32 would be
# 495 (H100), 156 (A100), 1100 (B200), 183 (L40S), 35 (A10G), 60 (L4); training in fp32 does not turn it on.
# Prices are an ASSUMPTION: AWS on demand, us-east-1, as of 2025-06, recalled and not looked up; give --price.
PRICES_ASSUMED = "AWS on demand, us-east-1, as of 2025-06, not looked up"
GPU_KINDS = (
    GpuKind(name="H100", gb=80, bf16_tflops=989, fp32_tflops=67, price=6.88),
    GpuKind(name="H200", gb=141, bf16_tflops=989, fp32_tflops=67, price=7.91),
    GpuKind(name="B200", gb=180, bf16_tflops=2250, fp32_tflops=75, price=14.24),
    GpuKind(name="A100", gb=40, bf16_tflops=312, fp32_tflops=19.5, price=2.75),
    GpuKind(name="A100", gb=80, bf16_tflops=312, fp32_tflops=19.5, price=3.43),
    GpuKind(name="L40S", gb=48, bf16_tflops=362, fp32_tflops=91.6, price=1.86),
    GpuKind(name="A10G", gb=24, bf16_tflops=70, fp32_tflops=31.5, price=1.01),
    GpuKind(name="L4", gb=24, bf16_tflops=121, fp32_tflops=30.3, price=0.80),
)
_NAMES = tuple(dict.fromkeys(kind.name for kind in GPU_KINDS))
# AWS instance types (EC2's own tables): kind of GPU, GPUs, virtual CPUs.
INSTANCES: Mapping[str, tuple[str, int, int]] = {
    "p6-b200.48xlarge": ("B200-180GB", 8, 192),
    "p5.48xlarge": ("H100-80GB", 8, 192),
    "p5.4xlarge": ("H100-80GB", 1, 16),
    "p5e.48xlarge": ("H200-141GB", 8, 192),
    "p5en.48xlarge": ("H200-141GB", 8, 192),
    "p4d.24xlarge": ("A100-40GB", 8, 96),
    "p4de.24xlarge": ("A100-80GB", 8, 96),
    **{f"g5.{size}xlarge": ("A10G-24GB", 1, 4 * size) for size in (2, 4, 8, 16)},
    "g5.xlarge": ("A10G-24GB", 1, 4),
    "g5.12xlarge": ("A10G-24GB", 4, 48),
    "g5.24xlarge": ("A10G-24GB", 4, 96),
    "g5.48xlarge": ("A10G-24GB", 8, 192),
    **{f"g6.{size}xlarge": ("L4-24GB", 1, 4 * size) for size in (2, 4, 8, 16)},
    "g6.xlarge": ("L4-24GB", 1, 4),
    "g6.12xlarge": ("L4-24GB", 4, 48),
    "g6.48xlarge": ("L4-24GB", 8, 192),
    "g6e.xlarge": ("L40S-48GB", 1, 4),
    "g6e.12xlarge": ("L40S-48GB", 4, 48),
    "g6e.48xlarge": ("L40S-48GB", 8, 192),
}
_GROUP = re.compile(r"(?P<nodes>[^x]+)x(?P<gpus>[^x]+)x(?P<kind>[^@]+)(?:@(?P<price>.*))?")
_KIND = re.compile(r"(?P<name>[A-Z][A-Z0-9]*?)(?:-(?P<gb>\d+)GB?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Nodes that are alike. `kind` is None without GPUs; `price` is $ per GPU-hour where it was given.

    `name` is the node type's in a cluster's YAML; `head` is whether the head is one of it.
    """

    count: int
    cpus: int
    gpus: int = 0
    kind: GpuKind | None = None
    price: float | None = None
    name: str = ""
    head: bool = False


def read_cluster(text: str, flag: str = "--cluster") -> tuple[NodeGroup, ...]:
    """The groups that the flag's value describes. Raises PlanError naming the part that does not parse."""
    if text.endswith((".yaml", ".yml")):
        return _of_yaml(Path(text).expanduser(), flag)
    return tuple(_group(part.strip(), text, flag) for part in text.split(","))


def nodes_of(groups: Iterable[NodeGroup]) -> tuple[Node, ...]:
    """Every node of the groups, for placement and the gate."""
    return tuple(
        Node(
            id=f"{group.name or f'group{number}'} {place}",
            cpus=group.cpus,
            gpus=group.gpus,
            gpu_gb=group.kind.gb if group.kind else DEFAULT_GPU_GB,
            gpu_kind=label(group.kind) if group.kind else "",
        )
        for number, group in enumerate(groups)
        for place in range(group.count)
    )


def groups_of(nodes: Sequence[Node]) -> tuple[NodeGroup, ...]:
    """Nodes that are there, as groups; a GPU that nobody knows is as slow and dear as the least of those known."""
    alike: dict[tuple[int, int, str, float], int] = {}
    for node in nodes:
        name = (node.cpus, node.gpus, node.gpu_kind, node.gpu_gb)
        alike[name] = alike.get(name, 0) + 1
    return tuple(
        NodeGroup(count=count, cpus=cpus, gpus=gpus, kind=_kind_of(kind, gb) if gpus else None)
        for (cpus, gpus, kind, gb), count in alike.items()
    )


def label(kind: GpuKind) -> str:
    """`H100-80GB`."""
    return f"{kind.name}-{kind.gb:g}GB"


def gpu_kind(text: str) -> GpuKind | None:
    """`H100-80GB`, `H100`, or Ray's `A100-80G`; None where it is not known. Memory that is given wins."""
    match = _KIND.fullmatch(text.strip().upper())
    if match is None or match["name"] not in _NAMES:
        return None
    alike = [kind for kind in GPU_KINDS if kind.name == match["name"]]
    if match["gb"] is None:
        return alike[0]
    gb = float(match["gb"])
    if gb <= 0:
        return None
    nearest = min(alike, key=lambda kind: abs(kind.gb - gb))
    return GpuKind(
        name=nearest.name,
        gb=gb,
        bf16_tflops=nearest.bf16_tflops,
        fp32_tflops=nearest.fp32_tflops,
        price=nearest.price,
    )


def describe(groups: Sequence[NodeGroup]) -> str:
    """`2 × 8 × H100-80GB, 1 × 4 CPUs`, for people."""
    return ", ".join(
        f"{group.count} × {group.gpus} × {label(group.kind)}"
        if group.kind and group.gpus
        else f"{group.count} × {group.cpus} CPUs"
        for group in groups
    )


def _kind_of(name: str, gb: float) -> GpuKind:
    known = gpu_kind(name)
    if known is not None:
        return known
    least = min(GPU_KINDS, key=lambda kind: kind.bf16_tflops)
    return GpuKind(
        name="GPU", gb=gb, bf16_tflops=least.bf16_tflops, fp32_tflops=least.fp32_tflops, price=least.price
    )


def _group(part: str, text: str, flag: str) -> NodeGroup:
    def refused(why: str) -> PlanError:
        return PlanError(
            f"{flag} {text}: {part!r} {why}. Give NODESxGPUSxKIND, as in {EXAMPLE}; or a YAML file."
        )

    match = _GROUP.fullmatch(part)
    if match is None:
        raise refused("is not NODESxGPUSxKIND")
    counts = []
    for what in ("nodes", "gpus"):
        if not re.fullmatch(r"[0-9]{1,6}", match[what]) or not 1 <= int(match[what]) <= MOST_NODES:
            raise refused(f"has {match[what]!r} in the place of its number of {what}")
        counts.append(int(match[what]))
    kind = gpu_kind(match["kind"])
    if kind is None:
        known = ", ".join(label(kind) for kind in GPU_KINDS)
        raise refused(f"names {match['kind']!r}, and the kinds of GPU that are known are {known}")
    price = None
    if match["price"] is not None:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", match["price"]):
            raise refused(f"has {match['price']!r} in the place of a price in $ per GPU-hour")
        price = float(match["price"])
    return NodeGroup(count=counts[0], cpus=counts[1] * CPUS_PER_GPU, gpus=counts[1], kind=kind, price=price)


def _of_yaml(file: Path, flag: str) -> tuple[NodeGroup, ...]:
    import yaml  # type: ignore[import-untyped]

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{flag} {file}: it cannot be read as YAML ({_line(error)}).") from error
    types = loaded.get("available_node_types") if isinstance(loaded, dict) else None
    if not isinstance(types, dict) or not types:
        raise PlanError(
            f"{flag} {file}: it has no available_node_types, as a file for `ray up` has; or give {EXAMPLE}."
        )
    head, most = loaded.get("head_node_type"), loaded.get("max_workers")
    groups = [
        _node_type(file, flag, str(name), values, is_head=name == head, most=most)
        for name, values in types.items()
    ]
    return tuple(group for group in _together(groups, most) if group.count)


def _together(groups: Sequence[NodeGroup], most: Any) -> list[NodeGroup]:
    """The same where `most` workers may be up at once: those with most GPUs come first."""
    if not isinstance(most, int):
        return list(groups)
    counts, left = {}, most
    for group in sorted(groups, key=lambda group: -group.gpus):
        workers = min(group.count - group.head, left)
        left -= workers
        counts[group.name] = workers + group.head
    return [replace(group, count=counts[group.name]) for group in groups]


def _node_type(file: Path, flag: str, name: str, values: Any, *, is_head: bool, most: Any) -> NodeGroup:
    at = f"{flag} {file}: available_node_types.{name}"
    if not isinstance(values, dict):
        raise PlanError(f"{at} must hold fields (resources, max_workers, node_config).")
    resources, config = values.get("resources") or {}, values.get("node_config") or {}
    if not isinstance(resources, dict) or not isinstance(config, dict):
        raise PlanError(f"{at}: resources and node_config must hold fields.")
    instance = INSTANCES.get(str(config.get("InstanceType")))
    workers = values.get("max_workers", 0 if is_head else most)
    workers = _count(workers, f"{at}.max_workers")
    if isinstance(most, int):
        workers = min(workers, most)
    gpus = _count(resources.get("GPU", instance[1] if instance else 0), f"{at}.resources.GPU")
    usual = instance[2] if instance else max(1, gpus * CPUS_PER_GPU)
    cpus = _count(resources.get("CPU", usual), f"{at}.resources.CPU")
    count = workers + (1 if is_head else 0)
    if not gpus:
        return NodeGroup(count=count, cpus=cpus, name=name, head=is_head)
    given = [
        str(key).removeprefix("accelerator_type:") for key in resources if "accelerator_type:" in str(key)
    ]
    labels = values.get("labels")
    if isinstance(labels, dict) and "ray.io/accelerator-type" in labels:
        given.append(str(labels["ray.io/accelerator-type"]))
    given += [instance[0]] if instance else []
    kind = next((found for text in given if (found := gpu_kind(text))), None)
    if kind is None:
        raise PlanError(
            f"{at} has {gpus} GPUs of no known kind: give resources a field accelerator_type:H100 (one of "
            f"{', '.join(_NAMES)}), or node_config an InstanceType that is known ({', '.join(list(INSTANCES)[:4])}, …)."
        )
    return NodeGroup(count=count, cpus=cpus, gpus=gpus, kind=kind, name=name, head=is_head)


def _count(value: Any, at: str) -> int:
    if type(value) is int and 0 <= value <= MOST_NODES:
        return value
    if type(value) is float and value.is_integer() and 0 <= value <= MOST_NODES:
        return int(value)
    raise PlanError(f"{at} is {value!r}, not a whole number from 0 to {MOST_NODES}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
