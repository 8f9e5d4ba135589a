"""Nodes that the autoscaler may add: which they are, which of them are still absent, and how they are asked for.

An absent node's id is its type and a number, as in `gpu_worker 3`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.plan import DEFAULT_GPU_GB, GPU_GB, Node
from trainers.errors import PlanError

# Ray's cluster launcher leaves the cluster's own description on its head.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
# Spot machines with GPUs take minutes to come; RMSWEEP_NODE_WAIT_S sets another time.
WAIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """All workers that the autoscaler may have up at once, and how long one is waited for, in seconds."""

    nodes: tuple[Node, ...]
    wait_s: float = WAIT_S

    def without(self, ids: Iterable[str]) -> "Scaling":
        """The same, with no node of these nodes' types to come."""
        gone = set(map(node_type, ids))
        return replace(self, nodes=tuple(node for node in self.nodes if node_type(node.id) not in gone))


NOTHING_SCALES = Scaling(nodes=())


def node_type(id: str) -> str:
    """The type of an absent node by its id."""
    return id.rpartition(" ")[0] or id


def node_types(ids: Iterable[str]) -> str:
    """The types of absent nodes, for people."""
    return ", ".join(dict.fromkeys(map(node_type, ids)))


def scaling(nodes: Sequence[Node]) -> Scaling:
    """A cluster that may come to these nodes; fixed where there are none."""
    return Scaling(nodes=tuple(nodes), wait_s=float(os.environ.get("RMSWEEP_NODE_WAIT_S", WAIT_S)))


def still_absent(nodes: Sequence[Node], live: Sequence[Node]) -> dict[str, Node]:
    """Those of the nodes that are not up: a live node stands for one of its size."""
    missing = list(nodes)
    for up in live:
        match = next((node for node in missing if _size(node) == _size(up)), None)
        if match is not None:
            missing.remove(match)
    return {node.id: node for node in missing}


def _size(node: Node) -> tuple[int, int]:
    """What tells types of node apart: machines report fewer CPUs or more than their type's description."""
    return (node.gpus, 0 if node.gpus else node.cpus)


def described_nodes(config: Mapping[str, Any]) -> tuple[Node, ...]:
    """All workers that a cluster's YAML lets the autoscaler start: max_workers of each type, and of all together.

    Raises PlanError where a type lacks its resources.
    """
    types: Mapping[str, Any] = config.get("available_node_types") or {}
    most = int(config.get("max_workers", 2))
    nodes: list[Node] = []
    # The largest first, as the limit on all together would be used for them.
    for name, kind in sorted(types.items(), key=lambda item: -_resource(item[1], "GPU")):
        if name == config.get("head_node_type"):
            continue
        if not _resource(kind, "CPU"):
            raise PlanError(
                f"node type {name} of the cluster's YAML names no CPUs; give it resources: {{CPU: …, GPU: …}}."
            )
        sizes = [
            GPU_GB[label.removeprefix("accelerator_type:")]
            for label in kind["resources"]
            if label.removeprefix("accelerator_type:") in GPU_GB
        ]
        nodes += [
            Node(
                id=f"{name} {number}",
                cpus=_resource(kind, "CPU"),
                gpus=_resource(kind, "GPU"),
                gpu_gb=min(sizes, default=DEFAULT_GPU_GB),
            )
            for number in range(min(int(kind.get("max_workers", most)), most - len(nodes)))
        ]
    return tuple(nodes)


def _resource(kind: Mapping[str, Any], name: str) -> int:
    return int((kind.get("resources") or {}).get(name, 0))


def own_description(file: Path = BOOTSTRAP) -> tuple[Node, ...]:
    """The workers of the cluster whose head this is, up or not; none where this is no head of Ray's launcher.

    Raises PlanError.
    """
    import yaml  # type: ignore[import-untyped]

    path = file.expanduser()
    if not path.is_file():
        return ()
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise PlanError(f"{path} is no YAML ({error}); restore it with `ray up`.") from error
    return described_nodes(config)


def all_workers(given: Sequence[Node] = ()) -> tuple[Node, ...]:
    """All workers of the cluster that was joined: those given, else what its head says. Raises PlanError."""
    return tuple(given) or own_description()


def ask_for(wanted: Sequence[Mapping[str, float]]) -> None:
    """Have the autoscaler provide for these bundles, those in use included; it forgets what it was asked before."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in wanted])
