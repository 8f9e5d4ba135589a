"""In what order the trainings of a sweep should start, so that it ends soon. Pure functions, no Ray.

A few rules are played through with the gate's own decision, and the order that ends first is taken.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.plan.capacity import Node
from orchestrator.plan.estimate import Job, lower_bound_s
from orchestrator.plan.schedule import Request, Running, decide

# A schedule this close to the lower bound is good enough to look no further.
CLOSE = 1.03
# Up to so many requests, where rules of thumb may be far off, turns are exchanged one by one.
FEW = 12

Rule = Callable[[Request], float]
RULES: tuple[Rule, ...] = (
    lambda request: request.weight,
    lambda request: request.expected_s,
    lambda request: request.expected_s * request.width,
)


def ranked(requests: Sequence[Request], nodes: Sequence[Node]) -> list[Request]:
    """The requests in the order in which they should start, their `rank` set to it."""
    enough = CLOSE * _bound_s(requests, nodes)
    best: list[Request] = []
    best_s = math.inf
    for rule in RULES:
        tried = _in_order(sorted(requests, key=lambda request: -rule(request)))
        took_s = predicted_s(tried, nodes)
        if took_s < best_s:
            best, best_s = tried, took_s
        if best_s <= enough:
            break
    if len(best) > FEW or best_s <= enough:
        return best
    return _exchanged(best, best_s, nodes)


def _exchanged(order: list[Request], takes_s: float, nodes: Sequence[Node]) -> list[Request]:
    """An order that no single exchange of two turns makes end sooner."""
    better = True
    while better:
        better = False
        for left, right in itertools.combinations(range(len(order)), 2):
            swapped = list(order)
            swapped[left], swapped[right] = order[right], order[left]
            tried = _in_order(swapped)
            took_s = predicted_s(tried, nodes)
            if took_s < takes_s:
                order, takes_s, better = tried, took_s, True
    return order


def _in_order(requests: Sequence[Request]) -> list[Request]:
    return [replace(request, rank=rank) for rank, request in enumerate(requests)]


def predicted_s(requests: Sequence[Request], nodes: Sequence[Node]) -> float:
    """Seconds until all requests have run, if each takes as long as expected and is asked for at once.

    What never fits is left out.
    """
    free = {node.id: node for node in nodes}
    waiting = [request for request in requests if decide(nodes, [request])]
    ends: list[tuple[float, int, Running]] = []
    now_s = 0.0
    started = 0
    while True:
        grants = decide(list(free.values()), waiting, [item for *_, item in ends], now_s)
        for grant in grants:
            running = Running(grant=grant, until_s=now_s + grant.request.expected_s)
            started += 1
            heapq.heappush(ends, (running.until_s, started, running))
            _change(free, running, -1)
        granted = {grant.request.id for grant in grants}
        waiting = [request for request in waiting if request.id not in granted]
        if not ends:
            return now_s
        now_s, _, ended = heapq.heappop(ends)
        _change(free, ended, +1)
        while ends and ends[0][0] == now_s:
            _change(free, heapq.heappop(ends)[2], +1)


def _change(free: dict[str, Node], running: Running, sign: int) -> None:
    request = running.grant.request
    for id in running.grant.nodes:
        node = free[id]
        free[id] = replace(node, cpus=node.cpus + sign * request.cpus, gpus=node.gpus + sign * request.gpus)


def _bound_s(requests: Sequence[Request], nodes: Sequence[Node]) -> float:
    """What no order beats: the bound of the GPUs' work, and that of the CPUs'."""
    gpus = [Job(id=item.id, width=item.workers * item.gpus, seconds=item.expected_s) for item in requests]
    cpus = [Job(id=item.id, width=item.workers * item.cpus, seconds=item.expected_s) for item in requests]
    devices = [(gpus, sum(node.gpus for node in nodes)), (cpus, sum(node.cpus for node in nodes))]
    return max((lower_bound_s(jobs, count) for jobs, count in devices if count), default=0.0)


def window(slots: int) -> int:
    """Trials under way at once: those that run, and some that get ready. Each is a process, so few on a laptop."""
    return slots + max(1, min(8, slots // 2))
