"""The machines of a cluster, and the memory and speed of their GPUs.

Nodes are read from a `--cluster` string, from a Ray cluster's YAML, or from this machine:

    2x8xH100-80GB                          two nodes with eight H100 each
    2x8xH100-80GB,1x4xA100-40GB@2.50       and one with four A100, at 2.50 $ per GPU-hour
    cluster.yaml                           max_workers of each node type, in the format of `ray up`

Nothing here asks Ray or torch.
"""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trainers.errors import PlanError

EXAMPLE = "2x8xH100-80GB, mixed 2x8xH100-80GB,1x4xA100-40GB, or with a price per GPU-hour 1x8xH100-80GB@2.50"
# Assumed CPUs per GPU of a node that does not say; preparing data and Ray's actors need few.
CPUS_PER_GPU = 8
MOST_NODES = 10_000
# Where NVIDIA's driver lists the GPUs of this machine.
DRIVER_LISTING = Path("/proc/driver/nvidia/gpus")
# Memory of a GPU of unknown kind.
DEFAULT_GPU_GB = 24.0


class GpuKind(NamedTuple):
    """A GPU: memory in GB, dense TFLOP/s in bf16, TF32 and plain fp32, GB/s of its memory and to others, $ per GPU-hour."""

    name: str
    gb: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    price: float

    @property
    def label(self) -> str:
        """Name and memory, as in `H100-80GB`."""
        return f"{self.name}-{self.gb:g}GB"


# Memory and peak rates from NVIDIA's and AMD's data sheets (SXM where there is a choice; rates without sparsity);
# links are one way, NVLink if there is one, else PCIe.
# Prices are an ASSUMPTION: AWS on demand, us-east-1, as of 2025-06, recalled and not looked up; give --price. GB200 is
# AWS's price of a reserved block; AWS has neither A10 (taken as A10G) nor MI300X (taken as Azure's).
PRICES_ASSUMED = "AWS on demand, us-east-1, as of 2025-06, not looked up"
GPU_KINDS = (
    GpuKind("H100", 80, 989, 495, 67, 3350, 450, 6.88),
    GpuKind("H200", 141, 989, 495, 67, 4800, 450, 7.91),
    GpuKind("B200", 180, 2250, 1100, 75, 8000, 900, 14.24),
    GpuKind("GB200", 186, 2500, 1250, 80, 8000, 900, 10.58),
    GpuKind("MI300X", 192, 1307, 653.7, 163.4, 5300, 448, 6.00),
    GpuKind("A100", 40, 312, 156, 19.5, 1555, 300, 2.75),
    GpuKind("A100", 80, 312, 156, 19.5, 2039, 300, 3.43),
    GpuKind("L40S", 48, 362, 183, 91.6, 864, 32, 1.86),
    GpuKind("A10G", 24, 70, 35, 31.5, 600, 32, 1.01),
    GpuKind("A10", 24, 125, 62.5, 31.2, 600, 32, 1.01),
    GpuKind("L4", 24, 121, 60, 30.3, 300, 32, 0.80),
)
# Sizes of an AWS family with one GPU: virtual CPUs by what stands before `xlarge`.
_SINGLES = {"": (1, 4), "2": (1, 8), "4": (1, 16), "8": (1, 32), "16": (1, 64)}
# AWS instance types (EC2's own tables): kind of GPU, GPUs, virtual CPUs.
INSTANCES: Mapping[str, tuple[str, int, int]] = {
    f"{family}.{size}xlarge": (kind, *count)
    for family, kind, sizes in (
        ("p6-b200", "B200-180GB", {"48": (8, 192)}),
        ("p5", "H100-80GB", {"48": (8, 192), "4": (1, 16)}),
        ("p5e", "H200-141GB", {"48": (8, 192)}),
        ("p5en", "H200-141GB", {"48": (8, 192)}),
        ("p4d", "A100-40GB", {"24": (8, 96)}),
        ("p4de", "A100-80GB", {"24": (8, 96)}),
        ("g5", "A10G-24GB", {**_SINGLES, "12": (4, 48), "24": (4, 96), "48": (8, 192)}),
        ("g6", "L4-24GB", {**_SINGLES, "12": (4, 48), "48": (8, 192)}),
        ("g6e", "L40S-48GB", {"": (1, 4), "12": (4, 48), "48": (8, 192)}),
    )
    for size, count in sizes.items()
}
_NAMES = "|".join(dict.fromkeys(kind.name for kind in GPU_KINDS))
_KIND = re.compile(rf"(?P<name>{_NAMES})(?:-(?P<gb>\d+)GB?)?")
_CUDA_DEVICE = re.compile(r"\s*(\d+|(GPU|MIG)-\S+)\s*")
_GROUP = re.compile(r"(?P<nodes>[^x]+)x(?P<gpus>[^x]+)x(?P<kind>[^@]+)(?:@(?P<price>.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine's CPUs and GPUs: all of them in a capacity, the free ones in the state of a gate.

    `gpu_kind` is the label of a GpuKind, "" if unknown; `price` is in $ per GPU-hour, if given; `host_gb` is the host's
    memory, infinite if unknown.
    """

    id: str
    cpus: int
    gpus: int = 0
    gpu_gb: float = DEFAULT_GPU_GB
    gpu_kind: str = ""
    price: float | None = None
    head: bool = False
    host_gb: float = math.inf

    @property
    def kind(self) -> GpuKind | None:
        """The kind of the node's GPUs; None without GPUs. An unknown kind counts as slow as the slowest known one."""
        if not self.gpus:
            return None
        slowest_known = min(GPU_KINDS, key=lambda kind: kind.bf16_tflops)
        return gpu_kind(self.gpu_kind) or slowest_known._replace(name="GPU", gb=self.gpu_gb)


def read_cluster(text: str, flag: str = "--cluster") -> tuple[Node, ...]:
    """Return the nodes that the flag's value describes. Raises PlanError naming the part that does not parse."""
    if text.endswith((".yaml", ".yml")):
        return _of_yaml(Path(text).expanduser(), flag)
    groups = [_group(part.strip(), text, flag) for part in text.split(",")]
    return tuple(
        replace(node, id=f"group{number} {place}")
        for number, (count, node) in enumerate(groups)
        for place in range(count)
    )


def local_capacity() -> tuple[Node, ...]:
    """Return this machine as one node: the GPUs that the driver lists, narrowed by CUDA_VISIBLE_DEVICES."""
    files = sorted(DRIVER_LISTING.glob("*/information"))
    kinds = [listed_kind(file.read_text()) for file in files]
    gpus, visible = len(files), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA stops at the first entry that is none, such as -1.
        gpus = min(gpus, len([*itertools.takewhile(_CUDA_DEVICE.fullmatch, visible.split(","))]))
    gpu_gb, label = min(
        ((kind.gb, kind.label) if kind else (DEFAULT_GPU_GB, "") for kind in kinds),
        default=(DEFAULT_GPU_GB, ""),
    )
    cpus = len(os.sched_getaffinity(0))
    host_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (Node(id="local", cpus=cpus, gpus=gpus, gpu_gb=gpu_gb, gpu_kind=label, host_gb=host_gb),)


def listed_kind(information: str) -> GpuKind | None:
    """Return the kind that NVIDIA's driver names in its listing of a GPU, as in `NVIDIA A100-SXM4-80GB`."""
    name = re.search(rf"\b({_NAMES})\b", information)
    memory = re.search(r"\b(\d+)GB\b", information)
    return None if name is None else gpu_kind(name[0] + (f"-{memory[1]}GB" if memory else ""))


def gpu_kind(text: str) -> GpuKind | None:
    """Return the kind called `H100-80GB`, `H100`, or Ray's `A100-80G`; None if unknown.

    A memory given in the text replaces that of the table.
    """
    match = _KIND.fullmatch(text.strip().upper())
    if match is None:
        return None
    alike = [kind for kind in GPU_KINDS if kind.name == match["name"]]
    gb = float(match["gb"] or alike[0].gb)
    return min(alike, key=lambda kind: abs(kind.gb - gb))._replace(gb=gb) if gb > 0 else None


def host_gb(resources: Mapping[str, Any]) -> float:
    """Return the GB of memory in Ray's resources, for tasks and objects; infinite if they name none."""
    given = [resources.get(name) for name in ("memory", "object_store_memory")]
    return sum(value for value in given if isinstance(value, int | float)) / 1e9 or math.inf


def kind_in(resources: Iterable[str]) -> GpuKind | None:
    """Return the kind in the names of Ray's resources, as in `accelerator_type:H100`; None if there is none."""
    names = (name.partition("accelerator_type:")[2] for name in resources)
    return next((kind for name in names if (kind := gpu_kind(name))), None)


def describe(nodes: Iterable[Node]) -> str:
    """Return the nodes by kind: `2 × 8 × H100-80GB, 1 × 4 CPUs`."""
    kinds = (
        f"{node.gpus} × {node.kind.label}" if node.kind is not None else f"{node.cpus} CPUs" for node in nodes
    )
    return ", ".join(f"{count} × {kind}" for kind, count in Counter(kinds).items())


def _group(part: str, text: str, flag: str) -> tuple[int, Node]:
    """Return the number of nodes in a part like `2x8xH100-80GB`, and one of them."""

    def refused(why: str) -> PlanError:
        return PlanError(
            f"{flag} {text}: {part!r} {why}. Give NODESxGPUSxKIND, as in {EXAMPLE}; or a YAML file."
        )

    match = _GROUP.fullmatch(part)
    if match is None:
        raise refused("is not NODESxGPUSxKIND")
    for what in ("nodes", "gpus"):
        if not re.fullmatch(r"[0-9]{1,6}", match[what]) or not 1 <= int(match[what]) <= MOST_NODES:
            raise refused(f"has {match[what]!r} in the place of its number of {what}")
    kind = gpu_kind(match["kind"])
    if kind is None:
        known = ", ".join(kind.label for kind in GPU_KINDS)
        raise refused(f"names {match['kind']!r}, and the kinds of GPU that are known are {known}")
    price = match["price"]
    if price is not None and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", price):
        raise refused(f"has {price!r} in the place of a price in $ per GPU-hour")
    gpus = int(match["gpus"])
    return int(match["nodes"]), Node(
        id="",
        cpus=gpus * CPUS_PER_GPU,
        gpus=gpus,
        gpu_gb=kind.gb,
        gpu_kind=kind.label,
        price=None if price is None else float(price),
    )


def _of_yaml(file: Path, flag: str) -> tuple[Node, ...]:
    """Return the largest set of nodes that the cluster may have up; under its cap, nodes with most GPUs come first."""
    import yaml  # type: ignore[import-untyped]

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise PlanError(f"{flag} {file}: it cannot be read as YAML ({why}).") from error
    types = loaded.get("available_node_types") if isinstance(loaded, dict) else None
    if not isinstance(types, dict) or not types:
        raise PlanError(
            f"{flag} {file}: it has no available_node_types, as a file for `ray up` has; or give {EXAMPLE}."
        )
    head, most = loaded.get("head_node_type"), loaded.get("max_workers")
    read = {
        str(name): _node_type(
            f"{flag} {file}: available_node_types.{name}", fields, 0 if name == head else most
        )
        for name, fields in types.items()
    }
    if head not in types:
        raise PlanError(
            f"{flag} {file}: head_node_type is {head!r}; name one of {', '.join(map(str, types))}."
        )
    left = math.inf if most is None else _count(most, f"{flag} {file}: max_workers")
    counts: dict[str, int] = {}
    for name, (workers, _) in sorted(read.items(), key=lambda item: -item[1][1].gpus):
        counts[name] = int(min(workers, left))
        left -= counts[name]
    return tuple(
        replace(node, id=f"{name} {place}", head=name == head and place == 0)
        for name, (_, node) in read.items()
        for place in range(counts[name] + (name == head))
    )


def _node_type(at: str, fields: Any, usual: Any) -> tuple[int, Node]:
    """Return the most workers of a node type (`usual` if it does not say), and one of them."""
    if not isinstance(fields, dict):
        raise PlanError(f"{at} must hold fields (resources, max_workers, node_config).")
    resources, config = fields.get("resources") or {}, fields.get("node_config") or {}
    if not isinstance(resources, dict) or not isinstance(config, dict):
        raise PlanError(f"{at}: resources and node_config must hold fields.")
    instance = INSTANCES.get(str(config.get("InstanceType")))
    workers = _count(fields.get("max_workers", usual), f"{at}.max_workers")
    gpus = _count(resources.get("GPU", instance[1] if instance else 0), f"{at}.resources.GPU")
    cpus = instance[2] if instance else max(1, gpus * CPUS_PER_GPU)
    cpus = _count(resources.get("CPU", cpus), f"{at}.resources.CPU")
    if not gpus or not cpus:
        return workers, Node(id="", cpus=cpus)
    labels = fields.get("labels")
    label = str(labels.get("ray.io/accelerator-type")) if isinstance(labels, dict) else ""
    kind = kind_in(map(str, resources)) or gpu_kind(label) or gpu_kind(instance[0] if instance else "")
    if kind is None:
        raise PlanError(
            f"{at} has {gpus} GPUs of no known kind: give resources a field accelerator_type:H100 (one of "
            f"{_NAMES.replace('|', ', ')}), or node_config an InstanceType that is known ({', '.join(list(INSTANCES)[:4])}, …)."
        )
    return workers, Node(
        id="", cpus=cpus, gpus=gpus, gpu_gb=kind.gb, gpu_kind=kind.label, host_gb=host_gb(resources)
    )


def _count(value: Any, at: str) -> int:
    if type(value) in (int, float) and 0 <= value <= MOST_NODES and value == int(value):
        return int(value)
    raise PlanError(f"{at} is {value!r}, not a whole number from 0 to {MOST_NODES}.")
