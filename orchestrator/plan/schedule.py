"""The gate: which waiting requests start now, and on which nodes. Pure functions, no Ray.

One queue: what others wait for and evaluations first, then trainings by rank (packing.py), the longest and widest
first. The first request that does not fit keeps a place at the time when it is expected to, and what is behind it
starts now only where that place stays free (EASY backfilling; Lifka 1995, "The ANL/IBM SP scheduling system"). What
runs longer than expected counts as about to end, so that a place, once kept, is given to nobody else: none starves.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.plan.capacity import Node

# What is expected of a request that says nothing: rather too short, since overdue work only holds others back.
UNKNOWN_S = 60.0

RequestKind = Literal["shared", "evaluate", "train"]
# Free CPUs and GPUs of each node.
Room = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`workers` processes of `cpus` and `gpus` each, wanted by one stage of one trial for about `expected_s` seconds.

    Of two trainings that of the lower `rank` comes first; of equal ranks the longer and wider one.
    """

    id: str
    kind: RequestKind
    workers: int = 1
    cpus: int = 1
    gpus: int = 0
    expected_s: float = UNKNOWN_S
    rank: int = 0

    @property
    def width(self) -> int:
        """What it occupies: GPUs where it asks for any, else CPUs."""
        return self.workers * (self.gpus or self.cpus)

    @property
    def weight(self) -> float:
        """How early it should start: long work makes a late end, wide work finds a place only while much is free."""
        return self.expected_s * math.sqrt(self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The node of each worker of a request."""

    request: Request
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A grant in use, and when it is expected to end, in seconds on the clock of `decide`'s `now_s`."""

    grant: Grant
    until_s: float


def precedence(request: Request) -> tuple[bool, int, float]:
    """The order of the queue; of equals, first come, first served."""
    if request.kind != "train":
        return (False, 0, 0.0)
    return (True, request.rank, -request.weight)


def decide(
    free: Sequence[Node],
    waiting: Sequence[Request],
    running: Sequence[Running] = (),
    now_s: float = 0.0,
    absent: Collection[str] = (),
) -> list[Grant]:
    """Which waiting requests (in order of arrival) start now on what is free.

    `absent` names the nodes of `free` that are yet to come; they are used where the others do not do.
    """
    room: Room = {node.id: (node.cpus, node.gpus) for node in free}
    total = dict(room)
    for item in running:
        _give_back(total, item.grant)
    cluster = _Cluster(total=total, absent=absent)
    queue = sorted(waiting, key=precedence)
    grants: list[Grant] = []
    for position, request in enumerate(queue):
        grant = _fit(room, request, cluster)
        if grant is None:
            started = [Running(grant=item, until_s=now_s + item.request.expected_s) for item in grants]
            return grants + _backfill(room, queue[position:], [*running, *started], now_s, cluster)
        _take(room, grant)
        grants.append(grant)
    return grants


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    """What the nodes hold when nothing runs, and which of them are yet to come."""

    total: Room
    absent: Collection[str]

    def keeps_together(self, request: Request) -> bool:
        """Whether some node holds all workers: between nodes a gang is slow, so it waits for one of these."""
        return any(_slots(all_of, request) >= request.workers for all_of in self.total.values())


def _backfill(
    room: Room, queue: Sequence[Request], running: Sequence[Running], now_s: float, cluster: _Cluster
) -> list[Grant]:
    """What starts now of those behind the first of `queue`, without making it wait longer than it has to."""
    first, *rest = queue
    kept = _kept_place(room, first, running, now_s, cluster)
    if kept is None:
        return []
    first_at_s, later = kept
    beside = {id: _least(room[id], later[id]) for id in room}
    grants: list[Grant] = []
    # What does not fit now does not fit after more was granted.
    none_beside: set[tuple[int, int, int]] = set()
    none_at_all: set[tuple[int, int, int]] = set()
    for request in rest:
        shape = (request.workers, request.cpus, request.gpus)
        grant = None if shape in none_beside else _fit(beside, request, cluster)
        if grant is not None:
            _take(later, grant)
        else:
            none_beside.add(shape)
            if now_s + request.expected_s > first_at_s or shape in none_at_all:
                continue
            grant = _fit(room, request, cluster)
            if grant is None:
                none_at_all.add(shape)
                continue
        _take(room, grant)
        beside |= {id: _least(room[id], later[id]) for id in grant.nodes}
        grants.append(grant)
    return grants


def _kept_place(
    room: Room, request: Request, running: Sequence[Running], now_s: float, cluster: _Cluster
) -> tuple[float, Room] | None:
    """When the request is expected to fit, and what is free then beside it; None where no end of running work does."""
    later = dict(room)
    for item in sorted(running, key=lambda item: item.until_s):
        _give_back(later, item.grant)
        grant = _fit(later, request, cluster)
        if grant is not None:
            _take(later, grant)
            return max(now_s, item.until_s), later
    return None


def _least(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return (min(left[0], right[0]), min(left[1], right[1]))


def _take(room: Room, grant: Grant) -> None:
    for id in grant.nodes:
        cpus, gpus = room[id]
        room[id] = (cpus - grant.request.cpus, gpus - grant.request.gpus)


def _give_back(room: Room, grant: Grant) -> None:
    for id in grant.nodes:
        # A node that is gone took what it had with it.
        if id in room:
            cpus, gpus = room[id]
            room[id] = (cpus + grant.request.cpus, gpus + grant.request.gpus)


def _fit(room: Room, request: Request, cluster: _Cluster) -> Grant | None:
    """All workers on the fullest node that holds them; spread over few nodes only where none is large enough."""
    slots = {id: _slots(free, request) for id, free in room.items()}
    whole = [id for id, count in slots.items() if count >= request.workers]
    if whole:
        best = min(whole, key=lambda id: (id in cluster.absent, slots[id], id))
        return Grant(request=request, nodes=(best,) * request.workers)
    if sum(slots.values()) < request.workers or cluster.keeps_together(request):
        return None
    chosen: list[str] = []
    for id in sorted(slots, key=lambda id: (id in cluster.absent, -slots[id], id)):
        chosen += [id] * min(slots[id], request.workers - len(chosen))
    return Grant(request=request, nodes=tuple(chosen))


def _slots(free: tuple[int, int], request: Request) -> int:
    """How many of the request's workers fit; the whole number where a resource is not asked for."""
    count = free[0] // request.cpus if request.cpus else request.workers
    if request.gpus:
        count = min(count, free[1] // request.gpus)
    return max(0, count)


def bundles(grants: Iterable[Grant]) -> list[dict[str, float]]:
    """What the grants hold on each of their nodes, as Ray's autoscaler wants to be told."""
    held: list[dict[str, float]] = []
    for grant in grants:
        for id in dict.fromkeys(grant.nodes):
            workers = grant.nodes.count(id)
            sizes = {"CPU": float(workers * grant.request.cpus), "GPU": float(workers * grant.request.gpus)}
            held.append({name: size for name, size in sizes.items() if size})
    return held
