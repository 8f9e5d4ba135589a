"""In what order the trainings of a sweep should start, so that it ends soon. Pure functions, no Ray.

A few rules are played through with the gate's own decision, and the order that ends first is taken.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.gate import Request, Running, decide
from orchestrator.plan import Node
from orchestrator.trial_plan import TrialPlan
from trainers.specs import BUILTIN, Placement

# A schedule this close to the lower bound is good enough to look no further.
CLOSE = 1.03
# Up to so many requests, where rules of thumb may be far off, turns are exchanged one by one.
FEW = 12
# Floating-point operations per second that a device does, and the tokens of a pair: rough, only their ratios matter.
GPU_RATE, CPU_RATE = 1.5e14, 5e10
PAIR_TOKENS = 1000
UNKNOWN_PAIRS = 2000
UNKNOWN_PARAMETERS, TINY_PARAMETERS = 1_000_000_000, 200_000
# Seconds that a stage takes besides its arithmetic: processes, imports, loading.
SET_UP_S = 15.0

Rule = Callable[[Request], float]
RULES: tuple[Rule, ...] = (
    lambda request: request.weight,
    lambda request: request.expected_s,
    lambda request: request.expected_s * request.width,
)


def expected_s(plan: TrialPlan, kind: Literal["train", "evaluate"], placement: Placement) -> float:
    """About how many seconds a trial's training or its evaluation takes, from model size × pairs × epochs."""
    model = plan.spec.model
    tiny = model.source.startswith(BUILTIN)
    parameters = model.parameters or (TINY_PARAMETERS if tiny else UNKNOWN_PARAMETERS)
    trains = kind == "train"
    stages = [plan.train] if trains else plan.evaluations
    draws = [(stage.prepared.split.rows or UNKNOWN_PAIRS, stage.prepared.draw.max_pairs) for stage in stages]
    pairs = sum(rows if most is None else min(rows, most) for rows, most in draws)
    return SET_UP_S + (
        trains_s(parameters, pairs * plan.train.optim.epochs, placement)
        if trains
        else 2 * parameters * PAIR_TOKENS * pairs / _rate(placement)
    )


def trains_s(parameters: int, pairs: int, placement: Placement) -> float:
    """About how many seconds it takes to train on so many pairs, each epoch's counted: 6 operations a weight and token."""
    return 6 * parameters * PAIR_TOKENS * pairs / (_rate(placement) * placement.world_size)


def _rate(placement: Placement) -> float:
    return GPU_RATE if placement.device == "cuda" else CPU_RATE


def ranked(requests: Sequence[Request], nodes: Sequence[Node]) -> list[Request]:
    """The requests in the order in which they should start, their `rank` set to it."""
    enough = CLOSE * lower_bound_s(requests, nodes)
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


def lower_bound_s(requests: Sequence[Request], nodes: Sequence[Node]) -> float:
    """No schedule is shorter: the work divided by the devices, and the longest request (in seconds)."""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    on_gpus = sum(request.expected_s * request.workers * request.gpus for request in requests)
    on_cpus = sum(request.expected_s * request.workers * request.cpus for request in requests)
    longest = max((request.expected_s for request in requests), default=0.0)
    return max(longest, on_gpus / gpus if gpus else 0.0, on_cpus / cpus if cpus else 0.0)


def window(slots: int) -> int:
    """Trials under way at once: those that run, and some that get ready. Each is a process, so few on a laptop."""
    return slots + max(1, min(8, slots // 2))
