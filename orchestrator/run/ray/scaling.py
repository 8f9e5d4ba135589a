"""Nodes that the autoscaler may add: list them, find those still absent, ask for them.

An absent node's id is its type and a number, as in `gpu_worker 3`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.plan.hardware import Node, read_cluster

# Ray's cluster launcher writes the cluster's description on its head.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
# Spot machines with GPUs take minutes to start; RMSWEEP_NODE_WAIT_S changes it.
WAIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """All workers that the autoscaler may run at once, and how many seconds we wait for one."""

    nodes: tuple[Node, ...]
    wait_s: float = field(default_factory=lambda: float(os.environ.get("RMSWEEP_NODE_WAIT_S", WAIT_S)))

    def without(self, ids: Iterable[str]) -> "Scaling":
        """Return a copy without any node of these nodes' types."""
        gone = set(map(node_type, ids))
        return replace(self, nodes=tuple(node for node in self.nodes if node_type(node.id) not in gone))


NOTHING_SCALES = Scaling(nodes=())


def node_type(id: str) -> str:
    """Return an absent node's type."""
    return id.rpartition(" ")[0] or id


def node_types(ids: Iterable[str]) -> str:
    """Return the types of absent nodes, as text."""
    return ", ".join(dict.fromkeys(map(node_type, ids)))


def still_absent(nodes: Sequence[Node], live: Sequence[Node]) -> dict[str, Node]:
    """Return the nodes that are not up, by id; each live node counts as one of its size."""
    missing = list(nodes)
    for up in live:
        match = next((node for node in missing if _size(node) == _size(up)), None)
        if match is not None:
            missing.remove(match)
    return {node.id: node for node in missing}


def _size(node: Node) -> tuple[int, int]:
    """Return what identifies a node's type; a machine with GPUs may report other CPUs than its type's description."""
    return (node.gpus, 0 if node.gpus else node.cpus)


def all_workers(given: str | None = None, bootstrap: Path = BOOTSTRAP) -> tuple[Node, ...]:
    """Return all workers of the cluster that was joined, up or not, from `--cluster` or else its head's description.

    Returns none where there is neither. Raises PlanError.
    """
    if given is not None:
        nodes = read_cluster(given)
    elif bootstrap.expanduser().is_file():
        nodes = read_cluster(str(bootstrap), "Ray's description of this cluster,")
    else:
        return ()
    return tuple(node for node in nodes if not node.head)


def ask_for(wanted: Sequence[Mapping[str, float]]) -> None:
    """Ask the autoscaler for these bundles, which include those in use; this replaces the last request."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in wanted])
