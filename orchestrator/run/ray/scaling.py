"""Nodes that the autoscaler may add: which they are, which of them are still absent, and how they are asked for.

An absent node's id is its type and a number, as in `gpu_worker 3`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.plan.hardware import Node, read_cluster

# Ray's cluster launcher leaves the cluster's own description on its head.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
# Spot machines with GPUs take minutes to come; RMSWEEP_NODE_WAIT_S sets another time.
WAIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """All workers that the autoscaler may have up at once, and how long one is waited for, in seconds."""

    nodes: tuple[Node, ...]
    wait_s: float = field(default_factory=lambda: float(os.environ.get("RMSWEEP_NODE_WAIT_S", WAIT_S)))

    def without(self, ids: Iterable[str]) -> "Scaling":
        """Return the same without any node of these nodes' types."""
        gone = set(map(node_type, ids))
        return replace(self, nodes=tuple(node for node in self.nodes if node_type(node.id) not in gone))


NOTHING_SCALES = Scaling(nodes=())


def node_type(id: str) -> str:
    """The type of an absent node by its id."""
    return id.rpartition(" ")[0] or id


def node_types(ids: Iterable[str]) -> str:
    """The types of absent nodes, for people."""
    return ", ".join(dict.fromkeys(map(node_type, ids)))


def still_absent(nodes: Sequence[Node], live: Sequence[Node]) -> dict[str, Node]:
    """Return the nodes that are not up, by id; a live node stands for one of its size."""
    missing = list(nodes)
    for up in live:
        match = next((node for node in missing if _size(node) == _size(up)), None)
        if match is not None:
            missing.remove(match)
    return {node.id: node for node in missing}


def _size(node: Node) -> tuple[int, int]:
    """Return what tells types of node apart; machines report fewer CPUs or more than their type's description."""
    return (node.gpus, 0 if node.gpus else node.cpus)


def all_workers(given: str | None = None, bootstrap: Path = BOOTSTRAP) -> tuple[Node, ...]:
    """All workers of the cluster that was joined, up or not: by `--cluster`, else by what its head says.

    None where this is no head of Ray's launcher. Raises PlanError.
    """
    if given is not None:
        nodes = read_cluster(given)
    elif bootstrap.expanduser().is_file():
        nodes = read_cluster(str(bootstrap), "Ray's description of this cluster,")
    else:
        return ()
    return tuple(node for node in nodes if not node.head)


def ask_for(wanted: Sequence[Mapping[str, float]]) -> None:
    """Have the autoscaler provide for these bundles, those in use included; it forgets what it was asked before."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in wanted])
