"""Nodes on which a process was lost: each is asked whether it lives before anything else starts there.

Ray lists a dead node for a while as if it lived, and it would take one attempt of every trial that waits.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from orchestrator.cluster import lives
from orchestrator.free_nodes import FreeNodes
from orchestrator.gate import Grant

ASK_EVERY_S = 2.0
# Longer than Ray takes to give up a dead node; of one that is listed still, the retry policy has the last word.
SUSPECTED_S = 90.0

logger = logging.getLogger(__name__)


class Suspicion:
    """Suspects nodes of the book, and calls `decide` when one is trusted again. Lives in a running event loop."""

    def __init__(self, nodes: FreeNodes, decide: Callable[[], None]) -> None:
        self._nodes, self._decide = nodes, decide
        self._looking: set[asyncio.Task[None]] = set()

    def of(self, grant: Grant) -> None:
        """Start nothing more on the grant's nodes until they answer."""
        for id in self._nodes.suspect(grant):
            task = asyncio.create_task(self._until_it_lives(id))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _until_it_lives(self, id: str) -> None:
        logger.warning("node %s may be dead; nothing starts there until it answers", id)
        give_up_at = time.monotonic() + SUSPECTED_S
        try:
            while self._nodes.suspects(id) and not await lives(id) and time.monotonic() < give_up_at:
                await asyncio.sleep(ASK_EVERY_S)
        finally:
            self._nodes.trust(id)
            self._decide()
