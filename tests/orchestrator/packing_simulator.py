"""A cluster of numbers: events drive the gate's decision as trials do, and every device is counted worker by worker.

Also the optimum of small grids, by branch and bound.
"""

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.plan import estimate
from orchestrator.plan.capacity import Node
from orchestrator.plan.packing import ranked
from orchestrator.plan.schedule import Grant, Request, Running, decide

WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training that takes `takes_s` on `width` GPUs, then an evaluation on one, if it has any."""

    id: str
    width: int
    takes_s: float
    expected_s: float
    evaluates_s: float = 0.0

    @property
    def request(self) -> Request:
        return Request(
            id=f"train {self.id}", kind="train", workers=self.width, gpus=1, expected_s=self.expected_s
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """When requests were asked for, started and ended, by id."""

    asked: dict[str, float] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    @property
    def makespan_s(self) -> float:
        return max(self.ended.values())


def random_grid(rng: random.Random, gpus: int) -> list[Job]:
    """60 to 200 jobs, durations log-uniform from 1 to 10, none more than a tenth of the area."""
    while True:
        count = rng.randint(60, 200)
        jobs = [random_job(rng, f"j{number}", WIDTHS) for number in range(count)]
        if max(map(area, jobs)) <= 0.1 * sum(map(area, jobs)):
            return jobs


def random_job(rng: random.Random, id: str, widths: Sequence[int]) -> Job:
    takes_s = 10 ** rng.random()
    return Job(id=id, width=rng.choice(widths), takes_s=takes_s, expected_s=takes_s)


def area(job: Job) -> float:
    return job.width * job.takes_s + job.evaluates_s


def lower_bound(jobs: Sequence[Job], nodes: Sequence[Node]) -> float:
    """Of any schedule: all work on all GPUs, and the longest chain."""
    chains = [
        (
            estimate.Job(id=job.id, width=job.width, seconds=job.takes_s),
            estimate.Job(id=f"evaluate {job.id}", width=1, seconds=job.evaluates_s, after=(job.id,)),
        )
        for job in jobs
    ]
    return estimate.lower_bound_s(
        [part for chain in chains for part in chain], sum(node.gpus for node in nodes)
    )


def misjudged(jobs: Sequence[Job], rng: random.Random, factor: float) -> list[Job]:
    """The same jobs, expected to take up to `factor` times as long, or as short."""
    return [replace(job, expected_s=job.takes_s * factor ** rng.uniform(-1, 1)) for job in jobs]


def simulate(
    jobs: Sequence[Job],
    nodes: Sequence[Node],
    window: int | None = None,
    later: Sequence[tuple[float, Job]] = (),
) -> Outcome:
    """Run the jobs in the order of packing.ranked, at most `window` trials at once; those of `later` come when said.

    Fails where a device is given twice, or where requests wait and nothing runs.
    """
    by_id = {job.request.id: job for job in (*jobs, *(job for _, job in later))}
    to_come = ranked([job.request for job in jobs], nodes)
    tick = itertools.count()
    events: list[tuple[float, int, object]] = [(at, next(tick), job.request) for at, job in later]
    heapq.heapify(events)
    waiting: list[Request] = []
    running: dict[str, Running] = {}
    outcome = Outcome()
    alive = 0
    now = 0.0

    def ask(request: Request) -> None:
        waiting.append(request)
        outcome.asked[request.id] = now

    def step() -> None:
        for grant in decide(free_of(nodes, running), waiting, list(running.values()), now):
            request = grant.request
            waiting.remove(request)
            running[request.id] = Running(grant=grant, until_s=now + request.expected_s)
            outcome.started[request.id] = now
            job = by_id[request.id.replace("evaluate", "train")]
            takes_s = job.takes_s if request.kind == "train" else job.evaluates_s
            heapq.heappush(events, (now + takes_s, next(tick), grant))

    while to_come or waiting or events:
        while to_come and (window is None or alive < window):
            ask(to_come.pop(0))
            alive += 1
        step()
        assert running or not waiting or events, f"deadlock: nothing runs, and these wait: {waiting}"
        now, _, event = heapq.heappop(events)
        if isinstance(event, Request):
            ask(event)
            alive += 1
            continue
        assert isinstance(event, Grant)
        request = event.request
        del running[request.id]
        outcome.ended[request.id] = now
        # The gang's GPUs are given back, and may go to others, before its evaluation asks.
        step()
        job = by_id[request.id.replace("evaluate", "train")]
        if request.kind == "train" and job.evaluates_s:
            ask(Request(id=f"evaluate {job.id}", kind="evaluate", gpus=1, expected_s=job.evaluates_s))
        else:
            alive -= 1
    return outcome


def free_of(nodes: Sequence[Node], running: dict[str, Running]) -> list[Node]:
    """What is left of the nodes, counted anew; fails where more is used than there is."""
    left = {node.id: [node.cpus, node.gpus] for node in nodes}
    for item in running.values():
        for id in item.grant.nodes:
            left[id][0] -= item.grant.request.cpus
            left[id][1] -= item.grant.request.gpus
    assert min(map(min, left.values())) >= 0, f"some device is given twice: {left}"
    return [Node(id=id, cpus=cpus, gpus=gpus) for id, (cpus, gpus) in left.items()]


def shorter_exists(jobs: Sequence[Job], sizes: Sequence[int], limit: float) -> bool:
    """Whether some schedule on nodes of these many GPUs ends before `limit`.

    An optimum is among the schedules that start jobs one after another, each on some node as early as it can.
    """
    work = sum(job.width * job.takes_s for job in jobs)
    placed: list[list[tuple[float, float, int]]] = [[] for _ in sizes]

    def search(left: Sequence[Job], last: float) -> bool:
        if not left:
            return True
        tried: set[tuple[int, float, int, tuple[tuple[float, float, int], ...]]] = set()
        for job in left:
            for node, size in enumerate(sizes):
                key = (job.width, job.takes_s, size, tuple(placed[node]))
                if key in tried or job.width > size:
                    continue
                tried.add(key)
                start = earliest(placed[node], size, job)
                # What is idle before the latest start stays idle.
                done = sum((min(e, start) - min(s, start)) * w for on in placed for s, e, w in on)
                hopeless = start + (work - done) / sum(sizes) >= limit
                if start < last or start + job.takes_s >= limit or hopeless:
                    continue
                placed[node].append((start, start + job.takes_s, job.width))
                if search([other for other in left if other is not job], start):
                    return True
                placed[node].pop()
        return False

    return search(jobs, 0.0)


def earliest(placed: Sequence[tuple[float, float, int]], size: int, job: Job) -> float:
    """When the job fits on a node of `size` GPUs beside what is placed there."""
    for start in sorted({0.0, *(end for _, end, _ in placed)}):
        moments = [start, *(begin for begin, _, _ in placed if start < begin < start + job.takes_s)]
        if all(
            sum(width for begin, end, width in placed if begin <= moment < end) + job.width <= size
            for moment in moments
        ):
            return start
    raise AssertionError("wider than the node")
