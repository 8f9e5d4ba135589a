"""Scores of a search that wait for a ruling: every rank hears the same, and nothing is lost with a process."""

import asyncio

import pytest

from orchestrator.rungs import Rungs, Scored
from trainers.errors import Interrupted

HERE = Scored(epoch=2, accuracy=0.5)


def ran(body):
    """What the coroutine of a function returns, within five seconds."""

    async def limited():
        return await asyncio.wait_for(body(Rungs()), 5)

    return asyncio.run(limited())


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ruling", [True, False])
def test_every_rank_waits_for_one_ruling(ruling):
    async def body(rungs):
        ranks = [asyncio.create_task(rungs.goes_on("a", HERE)) for _ in range(2)]
        assert await rungs.undecided("a") == HERE
        assert not any(rank.done() for rank in ranks)
        rungs.rule("a", 2, ruling)
        rungs.rule("a", 2, not ruling)
        # Who is tried again comes there again.
        return [*await asyncio.gather(*ranks), await rungs.goes_on("a", HERE)]

    assert ran(body) == [ruling] * 3


def test_an_open_question_is_asked_again_until_it_is_ruled_on():
    async def body(rungs):
        waiting = asyncio.create_task(rungs.goes_on("a", HERE))
        lost = [await rungs.undecided("a"), await rungs.undecided("a")]
        rungs.rule("a", 2, True)
        assert await waiting
        listening = asyncio.create_task(rungs.undecided("a"))
        other = asyncio.create_task(rungs.goes_on("b", HERE))
        await settled()
        assert not listening.done()
        await rungs.end("a")
        other.cancel()
        return [*lost, await listening]

    assert ran(body) == [HERE, HERE, None]


def test_a_training_that_is_tried_again_is_heard_again():
    async def body(rungs):
        await rungs.end("a")
        assert await rungs.undecided("a") is None
        rungs.begin("a")
        waiting = asyncio.create_task(rungs.goes_on("a", HERE))
        found = await rungs.undecided("a")
        waiting.cancel()
        return found

    assert ran(body) == HERE


def test_nobody_waits_for_a_ruling_when_the_sweep_stops():
    async def body(rungs):
        waiting = asyncio.create_task(rungs.goes_on("a", HERE))
        await rungs.undecided("a")
        rungs.stop()
        await waiting

    with pytest.raises(Interrupted, match="ruling"):
        ran(body)
