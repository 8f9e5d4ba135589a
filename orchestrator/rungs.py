"""What trainings of a search score at their rungs, and what becomes of them; part of the coordinator."""

import asyncio
from dataclasses import dataclass

from trainers.errors import Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Accuracy on the validation pairs after an epoch (from 1) that is a rung."""

    epoch: int
    accuracy: float


class Rungs:
    """Scores that wait for a ruling. Nothing is lost with who asked: a ruling is kept, and an open question asked again."""

    def __init__(self) -> None:
        self._scores: dict[tuple[str, int], float] = {}
        self._rulings: dict[tuple[str, int], asyncio.Future[bool]] = {}
        self._ended: set[str] = set()
        self._changed = asyncio.Condition()

    async def goes_on(self, training: str, scored: Scored) -> bool:
        """Wait for the ruling; every rank of a gang gets the same. Raises Interrupted where the sweep is to stop."""
        at = (training, scored.epoch)
        if at not in self._rulings:
            self._scores[at] = scored.accuracy
            self._rulings[at] = asyncio.get_running_loop().create_future()
            await self._tell()
        return await asyncio.shield(self._rulings[at])

    async def undecided(self, training: str) -> Scored | None:
        """Wait for a score without a ruling; None once the training has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: training in self._ended or self._open(training) is not None)
        return None if training in self._ended else self._open(training)

    def rule(self, training: str, epoch: int, goes_on: bool) -> None:
        """Answer whoever waits; the first ruling stays."""
        ruling = self._rulings[training, epoch]
        if not ruling.done():
            ruling.set_result(goes_on)

    async def end(self, training: str) -> None:
        """The training scores no more."""
        self._ended.add(training)
        await self._tell()

    def begin(self, training: str) -> None:
        """The training is tried again."""
        self._ended.discard(training)

    def stop(self) -> None:
        """Let nobody wait any longer."""
        for ruling in self._rulings.values():
            if not ruling.done():
                ruling.set_exception(Interrupted("stopped on request while waiting for a ruling."))

    def _open(self, training: str) -> Scored | None:
        return next(
            (
                Scored(epoch=epoch, accuracy=self._scores[name, epoch])
                for (name, epoch), ruling in self._rulings.items()
                if name == training and not ruling.done()
            ),
            None,
        )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
