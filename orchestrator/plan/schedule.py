"""The gate: which waiting requests start now, on which nodes; and the schedule of a whole sweep. No Ray.

There is one queue: shared stages and evaluations first, then trainings by rank, then the longest and widest. The first
request that does not fit reserves a place at the time when it is expected to fit. Requests behind it start now only if
that place stays free (EASY backfilling; Lifka 1995, "The ANL/IBM SP scheduling system"). A request that runs longer than
expected counts as about to end, so a reserved place is given to nobody else, and no request starves.

A run calls `decide`; a plan, and the search for a good order of the trainings, call `simulate`.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.plan.hardware import Node
from trainers.specs import Placement

# Expected seconds of a request of unknown duration: rather too short, since overdue work only holds others back.
UNKNOWN_S = 60.0
# The search for an order stops at a schedule within this factor of the lower bound.
CLOSE = 1.03
# Up to this many requests, for which rules of thumb may be far off, the search also swaps turns one by one.
FEW = 12

RequestKind = Literal["shared", "evaluate", "train"]
# Free CPUs and GPUs of each node.
Room = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestId:
    """The identity of a request: its kind, and the key of its trial or shared stage."""

    kind: RequestKind
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`workers` processes of `cpus` and `gpus` each, wanted by one stage of one trial for about `expected_s` seconds.

    The training of lower `rank` comes first; at equal ranks the longer and wider one.
    """

    kind: RequestKind
    key: str
    workers: int = 1
    cpus: int = 1
    gpus: int = 0
    expected_s: float = UNKNOWN_S
    rank: int = 0

    @classmethod
    def of(
        cls, kind: RequestKind, key: str, placement: Placement, expected_s: float = UNKNOWN_S, rank: int = 0
    ) -> "Request":
        """Return a trial's request under a placement: a process for each rank of a training, one for anything else."""
        return cls(
            kind=kind,
            key=key,
            workers=placement.world_size if kind == "train" else 1,
            gpus=1 if placement.device == "cuda" else 0,
            expected_s=expected_s,
            rank=rank,
        )

    @property
    def id(self) -> RequestId:
        return RequestId(kind=self.kind, key=self.key)

    @property
    def width(self) -> int:
        """The GPUs that it occupies, or its CPUs if it asks for no GPU."""
        return self.workers * (self.gpus or self.cpus)

    @property
    def weight(self) -> float:
        """How early it should start: long work ends late, and wide work fits only while much is free."""
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


Fit = Callable[[Room, Request], Grant | None]


def precedence(request: Request) -> tuple[bool, int, float]:
    """Return the sort key of the queue; ties are served in order of arrival."""
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
    """Return which waiting requests (given in order of arrival) start now on what is free.

    `absent` names the nodes of `free` that have not joined yet; they are used only if the others do not suffice.
    """
    return _decide({node.id: (node.cpus, node.gpus) for node in free}, waiting, running, now_s, absent)


def _decide(
    free: Room,
    waiting: Iterable[Request],
    running: Sequence[Running] = (),
    now_s: float = 0.0,
    absent: Collection[str] = (),
) -> list[Grant]:
    room, total = dict(free), dict(free)
    for item in running:
        _give_back(total, item.grant)
    fit = functools.partial(_fit, total=total, absent=absent)
    queue = deque(sorted(waiting, key=precedence))
    grants: list[Grant] = []
    while queue and (grant := fit(room, queue[0])) is not None:
        _take(room, grant)
        grants.append(grant)
        queue.popleft()
    if len(queue) > 1:
        started = [Running(grant=item, until_s=now_s + item.request.expected_s) for item in grants]
        grants += _backfill(room, queue, [*running, *started], now_s, fit)
    return grants


def _backfill(
    room: Room, queue: Iterable[Request], running: Sequence[Running], now_s: float, fit: Fit
) -> list[Grant]:
    """Return which requests behind the first of `queue` start now without delaying it."""
    first, *rest = queue
    kept = _kept_place(room, first, running, now_s, fit)
    if kept is None:
        return []
    first_at_s, later = kept
    beside = {id: _least(room[id], later[id]) for id in room}
    grants: list[Grant] = []
    # A shape that does not fit beside it now does not fit after more is granted.
    too_large: set[tuple[int, int, int]] = set()
    for request in rest:
        shape = (request.workers, request.cpus, request.gpus)
        grant = None if shape in too_large else fit(beside, request)
        if grant is not None:
            _take(later, grant)
        else:
            too_large.add(shape)
            ends_in_time = now_s + request.expected_s <= first_at_s
            grant = fit(room, request) if ends_in_time else None
            if grant is None:
                continue
        _take(room, grant)
        beside |= {id: _least(room[id], later[id]) for id in grant.nodes}
        grants.append(grant)
    return grants


def _kept_place(
    room: Room, request: Request, running: Sequence[Running], now_s: float, fit: Fit
) -> tuple[float, Room] | None:
    """Return when the request is expected to fit, and what is free beside it then; None if it will not fit."""
    later = dict(room)
    for item in sorted(running, key=lambda item: item.until_s):
        _give_back(later, item.grant)
        grant = fit(later, request)
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
        # The node may be gone.
        if id in room:
            cpus, gpus = room[id]
            room[id] = (cpus + grant.request.cpus, gpus + grant.request.gpus)


def _fit(room: Room, request: Request, total: Room, absent: Collection[str]) -> Grant | None:
    """Place all workers on the fullest node that holds them; spread them only where no node is large enough.

    `total` is the room of the idle nodes: a gang is slow across nodes, so it waits if one node can hold it.
    """
    slots = {id: _slots(free, request) for id, free in room.items()}
    whole = [id for id, count in slots.items() if count >= request.workers]
    if whole:
        best = min(whole, key=lambda id: (id in absent, slots[id], id))
        return Grant(request=request, nodes=(best,) * request.workers)
    if sum(slots.values()) < request.workers:
        return None
    if any(_slots(all_of, request) >= request.workers for all_of in total.values()):
        return None
    chosen: list[str] = []
    for id in sorted(slots, key=lambda id: (id in absent, -slots[id], id)):
        chosen += [id] * min(slots[id], request.workers - len(chosen))
    return Grant(request=request, nodes=tuple(chosen))


def _slots(free: tuple[int, int], request: Request) -> int:
    """Return how many of the request's workers fit; all of them if it asks for neither CPUs nor GPUs."""
    count = free[0] // request.cpus if request.cpus else request.workers
    if request.gpus:
        count = min(count, free[1] // request.gpus)
    return max(0, count)


def bundles(grants: Iterable[Grant]) -> list[dict[str, float]]:
    """Return what the grants hold on each of their nodes, in the form of Ray's autoscaler."""
    held: list[dict[str, float]] = []
    for grant in grants:
        for id in dict.fromkeys(grant.nodes):
            workers = grant.nodes.count(id)
            sizes = {"CPU": float(workers * grant.request.cpus), "GPU": float(workers * grant.request.gpus)}
            held.append({name: size for name, size in sizes.items() if size})
    return held


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work to simulate: its request, and how long it really takes.

    It asks after all of `after` have ended, and not before its `trial`, if it has one, is under way.
    """

    request: Request
    takes_s: float
    after: tuple[RequestId, ...] = ()
    trial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """The seconds at which a simulated job asked, started and ended, and the node of each of its workers."""

    asked_s: float
    started_s: float
    ended_s: float
    nodes: tuple[str, ...]


def simulate(jobs: Sequence[Job], nodes: Sequence[Node], at_once: int | None = None) -> dict[RequestId, Ran]:
    """Play the gate through, at most `at_once` trials under way at a time; return what ran, by the requests' ids.

    Jobs that fit nowhere, and those that come after them, are left out.
    """
    room: Room = {node.id: (node.cpus, node.gpus) for node in nodes}
    out = {job.request.id for job in jobs if not _decide(room, [job.request])}
    while more := {job.request.id for job in jobs if not out.isdisjoint(job.after)} - out:
        out |= more
    unfinished = {job.request.id: job for job in jobs if job.request.id not in out}
    to_come = list(unfinished.values())
    trials = dict.fromkeys(job.trial for job in to_come if job.trial)
    under_way: set[str] = set()
    waiting: dict[RequestId, tuple[Request, float]] = {}
    running: dict[RequestId, Running] = {}
    ran: dict[RequestId, Ran] = {}
    now_s = 0.0

    def start() -> None:
        requests = [request for request, _ in waiting.values()]
        for grant in _decide(room, requests, list(running.values()), now_s):
            request, asked_s = waiting.pop(grant.request.id)
            _take(room, grant)
            running[request.id] = Running(grant=grant, until_s=now_s + request.expected_s)
            ends_s = now_s + unfinished[request.id].takes_s
            ran[request.id] = Ran(asked_s=asked_s, started_s=now_s, ended_s=ends_s, nodes=grant.nodes)

    while unfinished:
        ended = [id for id in running if ran[id].ended_s <= now_s]
        for id in ended:
            _give_back(room, running.pop(id).grant)
            del unfinished[id]
        if ended:
            # Others may take the room before the next job asks for it.
            start()
        if to_come:
            left = {job.trial for job in unfinished.values()}
            under_way = set([trial for trial in trials if trial in left][:at_once])
        free = [job for job in to_come if unfinished.keys().isdisjoint(job.after)]
        if asking := [job for job in free if job.trial in under_way or not job.trial]:
            waiting |= {job.request.id: (job.request, now_s) for job in asking}
            to_come = [job for job in to_come if job.request.id not in waiting]
            start()
        if unfinished:
            now_s = min(ran[id].ended_s for id in running)
    return ran


def ranked(requests: Sequence[Request], nodes: Sequence[Node]) -> list[Request]:
    """Return the trainings in an order that ends soon, their `rank` set to it.

    It simulates a few rules of thumb, and takes the order that ends first.
    """
    enough = CLOSE * lower_bound_s(list(map(_job, requests)), nodes)
    best_s, best = math.inf, list[Request]()

    def play(order: Iterable[Request]) -> bool:
        """Take the order if it ends sooner than the best one so far."""
        nonlocal best_s, best
        tried = [replace(request, rank=rank) for rank, request in enumerate(order)]
        took_s = makespan_s(simulate(list(map(_job, tried)), nodes))
        if sooner := took_s < best_s:
            best_s, best = took_s, tried
        return sooner

    rules: tuple[Callable[[Request], float], ...] = (
        lambda request: request.weight,
        lambda request: request.expected_s,
        lambda request: request.expected_s * request.width,
    )
    for rule in rules:
        play(sorted(requests, key=rule, reverse=True))
        if best_s <= enough:
            return best
    better = len(best) <= FEW
    while better:
        better = False
        for left, right in itertools.combinations(range(len(best)), 2):
            swapped = list(best)
            swapped[left], swapped[right] = best[right], best[left]
            better |= play(swapped)
    return best


def _job(request: Request) -> Job:
    return Job(request=request, takes_s=request.expected_s)


def makespan_s(ran: dict[RequestId, Ran]) -> float:
    """When the last job ends."""
    return max((item.ended_s for item in ran.values()), default=0.0)


def lower_bound_s(jobs: Sequence[Job], nodes: Sequence[Node]) -> float:
    """Seconds that no schedule beats: all the work over all the GPUs or over all the CPUs, and the longest chain."""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    gpu_s = sum(job.takes_s * job.request.workers * job.request.gpus for job in jobs)
    cpu_s = sum(job.takes_s * job.request.workers * job.request.cpus for job in jobs)
    by_id = {job.request.id: job for job in jobs}

    @functools.cache
    def ends_s(id: RequestId) -> float:
        return by_id[id].takes_s + max(map(ends_s, by_id[id].after), default=0.0)

    return max(
        gpu_s / gpus if gpus else 0.0, cpu_s / cpus if cpus else 0.0, max(map(ends_s, by_id), default=0.0)
    )


def window(slots: int) -> int:
    """Trials under way at once: those that run, and some that get ready. Each is a process, so few on a laptop."""
    return slots + max(1, min(8, slots // 2))
