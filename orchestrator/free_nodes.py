"""Book of the cluster's nodes: which are up, what of them is free, and which may yet come. No Ray."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.gate import Grant, Request, decide
from orchestrator.plan import Node
from orchestrator.scaling import Scaling, node_types, still_absent

logger = logging.getLogger(__name__)


class FreeNodes:
    """Nodes that are up, as they come and go, and those of `scaling` that are not; `late` are types that never came."""

    def __init__(self, up: Sequence[Node], scaling: Scaling) -> None:
        self._up = {node.id: node for node in up}
        self._free = dict(self._up)
        self.scaling = scaling
        self._absent = still_absent(scaling.nodes, up)
        self._suspected: set[str] = set()
        self.late: list[str] = []

    @property
    def absent(self) -> Mapping[str, Node]:
        """Those that may yet come, by id."""
        return self._absent

    def whole(self) -> list[Node]:
        """All nodes that there are and may yet come, as if nothing ran."""
        return [*self._up.values(), *self._absent.values()]

    def free(self) -> list[Node]:
        """The same, without what is held, and without nodes that may be dead."""
        trusted = [node for id, node in self._free.items() if id not in self._suspected]
        return [*trusted, *self._absent.values()]

    def fits(self, request: Request) -> bool:
        """Whether the request could be granted if nothing ran."""
        return bool(decide(self.whole(), [request]))

    def hold(self, grant: Grant) -> None:
        """Take what is granted."""
        self._change(grant, -1)

    def give_back(self, grant: Grant) -> None:
        """Free what was granted."""
        self._change(grant, +1)

    def suspect(self, grant: Grant) -> set[str]:
        """Start nothing more on the grant's nodes until they are `trusted`; those that were not suspected before."""
        new = self._up.keys() & set(grant.nodes) - self._suspected
        self._suspected |= new
        return new

    def trust(self, id: str) -> None:
        """The node lives, or is gone for good."""
        self._suspected.discard(id)

    def suspects(self, id: str) -> bool:
        """Whether the node may be dead, and has not been given up."""
        return id in self._suspected

    def _change(self, grant: Grant, sign: int) -> None:
        for id in grant.nodes:
            node = self._free.get(id)
            # A node that is gone took what it had with it.
            if node is not None:
                self._free[id] = replace(
                    node,
                    cpus=node.cpus + sign * grant.request.cpus,
                    gpus=node.gpus + sign * grant.request.gpus,
                )

    def follow(self, up: Sequence[Node]) -> None:
        """Forget nodes that are lost, and take in those that have joined."""
        live = {node.id: node for node in up}
        for id in self._up.keys() - live.keys():
            logger.warning("node %s is gone", id)
            del self._up[id], self._free[id]
            self._suspected.discard(id)
        for id in live.keys() - self._up.keys():
            self._up[id] = self._free[id] = live[id]
        self._absent = still_absent(self.scaling.nodes, list(live.values()))

    def absent_types(self, grant: Grant) -> str:
        """The types of the grant's nodes that are yet to come."""
        return node_types(id for id in grant.nodes if id in self._absent)

    def give_up(self, grant: Grant) -> None:
        """Count no longer on the types of the grant's absent nodes; one that comes later is welcome."""
        self.late.append(self.absent_types(grant))
        self.scaling = self.scaling.without(id for id in grant.nodes if id in self._absent)
        self._absent = still_absent(self.scaling.nodes, list(self._up.values()))
