"""The gate, driven by simulated trials on simulated nodes: it ends soon, starves nobody and never locks up."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.hardware import Node
from orchestrator.plan.schedule import (
    Job,
    Ran,
    Request,
    RequestId,
    lower_bound_s,
    makespan_s,
    ranked,
    simulate,
    window,
)

GRIDS = 200
GPUS = 32
WIDTHS = (1, 2, 4, 8)


def nodes_of(*sizes: int) -> list[Node]:
    return [Node(id=f"n{number}", cpus=4 * size, gpus=size) for number, size in enumerate(sizes)]


CLUSTER = nodes_of(8, 8, 8, 8)


def training(id: str, width: int, takes_s: float, **changes: float) -> Job:
    request = Request(
        key=id, kind="train", workers=width, gpus=1, expected_s=changes.pop("expected_s", takes_s)
    )
    return Job(request=request, takes_s=takes_s, trial=id, **changes)  # type: ignore[arg-type]


def evaluation(of: Job, takes_s: float) -> Job:
    request = Request(key=of.trial, kind="evaluate", gpus=1, expected_s=takes_s)
    return Job(request=request, takes_s=takes_s, trial=of.trial, after=(of.request.id,))


def random_job(rng: random.Random, id: str, widths: Sequence[int]) -> Job:
    takes_s = 10 ** rng.random()
    return training(id, rng.choice(widths), takes_s)


def area(job: Job) -> float:
    return job.request.width * job.takes_s


def random_grid(rng: random.Random) -> list[Job]:
    """60 to 200 jobs, durations log-uniform from 1 to 10, none more than a tenth of the area."""
    while True:
        count = rng.randint(60, 200)
        jobs = [random_job(rng, f"j{number}", WIDTHS) for number in range(count)]
        if max(map(area, jobs)) <= 0.1 * sum(map(area, jobs)):
            return jobs


def misjudged(jobs: Sequence[Job], rng: random.Random, factor: float = 3.0) -> list[Job]:
    """The same jobs, expected to take up to `factor` times as long, or as short."""
    expected = [job.takes_s * factor ** rng.uniform(-1, 1) for job in jobs]
    return [
        replace(job, request=replace(job.request, expected_s=expected_s))
        for job, expected_s in zip(jobs, expected, strict=True)
    ]


def in_turn(jobs: Sequence[Job], nodes: Sequence[Node]) -> list[Job]:
    """The trainings in the order of `ranked`, each before what comes after it."""
    by_id = {job.request.id: job for job in jobs if job.request.kind == "train"}
    turns = [
        replace(by_id[request.id], request=request)
        for request in ranked([job.request for job in by_id.values()], nodes)
    ]
    return [*turns, *(job for job in jobs if job.request.kind != "train")]


def run(jobs: Sequence[Job], nodes: Sequence[Node], at_once: int | None = None) -> dict[RequestId, Ran]:
    """Simulate; fails where something never ran, or where a device was given twice, counted worker by worker."""
    ran = simulate(jobs, nodes, at_once)
    requests = {job.request.id: job.request for job in jobs}
    assert ran.keys() == requests.keys(), f"deadlock: these wait for good: {requests.keys() - ran.keys()}"
    left = {node.id: [node.cpus, node.gpus] for node in nodes}
    # Of one moment, ends come first.
    moments = [(item.ended_s, 0, +1, id) for id, item in ran.items()]
    moments += [(item.started_s, 1, -1, id) for id, item in ran.items()]
    for *_, sign, id in sorted(moments, key=lambda moment: moment[:2]):
        for node in ran[id].nodes:
            left[node][0] += sign * requests[id].cpus
            left[node][1] += sign * requests[id].gpus
            assert min(left[node]) >= 0, f"some device is given twice: {id} on {node}"
    return ran


def ratios(
    change: Callable[[list[Job], random.Random], Sequence[Job]], count: int, at_once: int | None = None
) -> list[float]:
    """Makespan over lower bound of random grids, each as `change` makes it."""
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        jobs = in_turn(change(random_grid(rng), rng), CLUSTER)
        found.append(makespan_s(run(jobs, CLUSTER, at_once)) / lower_bound_s(jobs, CLUSTER))
    return found


def test_two_hundred_grids_end_close_to_the_lower_bound():
    found = ratios(lambda jobs, rng: jobs, GRIDS)
    assert statistics.median(found) <= 1.05
    assert max(found) <= 1.15


def test_wrong_expectations_cost_little():
    found = ratios(misjudged, 25)
    assert statistics.median(found) <= 1.15
    assert max(found) <= 1.5


def test_evaluations_and_a_window_of_trials_cost_little_and_lock_nothing_up():
    found = ratios(
        lambda jobs, rng: [*jobs, *(evaluation(job, job.takes_s / 10) for job in jobs)],
        20,
        at_once=window(GPUS),
    )
    assert statistics.median(found) <= 1.15
    assert max(found) <= 1.5


def test_no_more_trials_are_under_way_than_asked_for_and_a_trial_is_its_training_and_evaluation():
    jobs = in_turn(random_grid(random.Random(3)), CLUSTER)
    ran = run([*jobs, *(evaluation(job, 0.5) for job in jobs)], CLUSTER, at_once=5)
    spans = [(ran[job.request.id].asked_s, ran[evaluation(job, 0.5).request.id].ended_s) for job in jobs]
    under_way = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(under_way) == 5


def small_grids(count: int) -> list[tuple[tuple[int, ...], list[Job]]]:
    found = []
    for seed in range(count):
        rng = random.Random(1000 + seed)
        sizes = rng.choice([(4,), (8,), (4, 4), (4, 2), (2, 2, 2)])
        widths = [width for width in WIDTHS if width <= max(sizes)]
        found.append((sizes, [random_job(rng, f"j{n}", widths) for n in range(rng.randint(3, 7))]))
    return found


def test_small_grids_end_within_a_tenth_of_the_optimum():
    for sizes, jobs in small_grids(50):
        ours = makespan_s(run(in_turn(jobs, nodes_of(*sizes)), nodes_of(*sizes)))
        assert not shorter_exists(jobs, sizes, ours / 1.10), (sizes, jobs, ours)


def shorter_exists(jobs: Sequence[Job], sizes: Sequence[int], limit: float) -> bool:
    """Whether some schedule on nodes of these many GPUs ends before `limit`, by branch and bound.

    An optimum is among the schedules that start jobs one after another, each on some node as early as it can.
    """
    work = sum(map(area, jobs))
    placed: list[list[tuple[float, float, int]]] = [[] for _ in sizes]

    def search(left: Sequence[Job], last: float) -> bool:
        if not left:
            return True
        tried: set[tuple[int, float, int, tuple[tuple[float, float, int], ...]]] = set()
        for job in left:
            width = job.request.width
            for node, size in enumerate(sizes):
                key = (width, job.takes_s, size, tuple(placed[node]))
                if key in tried or width > size:
                    continue
                tried.add(key)
                start = earliest(placed[node], size, job)
                # What is idle before the latest start stays idle.
                done = sum((min(e, start) - min(s, start)) * w for on in placed for s, e, w in on)
                hopeless = start + (work - done) / sum(sizes) >= limit
                if start < last or start + job.takes_s >= limit or hopeless:
                    continue
                placed[node].append((start, start + job.takes_s, width))
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
            sum(width for begin, end, width in placed if begin <= moment < end) + job.request.width <= size
            for moment in moments
        ):
            return start
    raise AssertionError("wider than the node")


def test_the_optimum_is_one():
    """Of the solver: known optima, with a node that has to stay idle for a while in the second."""
    jobs = [training(f"{n}", 1, takes) for n, takes in enumerate((3, 3, 2, 2, 2))]
    assert shorter_exists(jobs, (2,), 6.001)
    assert not shorter_exists(jobs, (2,), 6.0)
    wide = [training("w", 2, 1), training("n", 1, 4)]
    assert shorter_exists(wide, (2,), 5.001)
    assert not shorter_exists(wide, (2,), 5.0)


def tick(number: int) -> Job:
    """The next 0.4 s of a clock, which holds nothing."""
    after = (RequestId(kind="shared", key=f"t{number - 1}"),) if number else ()
    return Job(request=Request(kind="shared", key=f"t{number}", cpus=0), takes_s=0.4, after=after)


def test_a_wide_training_starts_though_narrow_ones_never_stop_coming():
    """Narrow work arrives faster than it can be done; whatever is expected of it, the wide training has its turn."""
    for seed in range(8):
        rng = random.Random(seed)
        narrow = misjudged([random_job(rng, f"n{n}", (1, 2)) for n in range(120)], rng)
        clock = [tick(n) for n in range(len(narrow))]
        stream = [replace(job, after=(at.request.id,)) for at, job in zip(clock, narrow, strict=True)]
        wide = replace(training("wide", 4, 5.0, expected_s=30.0), after=(clock[24].request.id,))
        ran = run([*clock, *stream, wide], nodes_of(4, 4))[wide.request.id]
        # What ran when it was asked for, twice over: one round of work that was expected to be over, and its own turn.
        assert ran.started_s - ran.asked_s <= 20.0


def test_no_evaluation_waits_behind_a_training_that_starts_after_it_asks():
    jobs = in_turn(random_grid(random.Random(7)), CLUSTER)
    ran = run([*jobs, *(evaluation(job, 0.5) for job in jobs)], CLUSTER)
    starts = [item.started_s for id, item in ran.items() if id.kind == "train"]
    for item in (item for id, item in ran.items() if id.kind == "evaluate"):
        assert not [at for at in starts if item.asked_s < at < item.started_s]


JOBS = st.lists(
    st.tuples(st.sampled_from(WIDTHS), st.floats(1, 10), st.booleans()), min_size=1, max_size=40
).map(
    lambda parts: [
        replace(
            training(str(i), width, takes_s),
            trial="",
            after=(RequestId(kind="train", key=str(i - 1)),) if chained and i else (),
        )
        for i, (width, takes_s, chained) in enumerate(parts)
    ]
)


@given(jobs=JOBS, gpus=st.integers(8, 24))
def test_a_schedule_lies_between_its_bound_and_one_job_after_the_other(jobs: list[Job], gpus: int):
    ended_s = makespan_s(run(jobs, nodes_of(gpus)))
    assert lower_bound_s(jobs, nodes_of(gpus)) - 1e-9 <= ended_s <= sum(job.takes_s for job in jobs) + 1e-9


def test_a_chain_and_a_wide_job_are_scheduled_by_hand():
    wide, a, b = training("wide", 2, 3), training("a", 1, 4), training("b", 1, 1)
    jobs = [wide, a, b, replace(training("after a", 1, 2), after=(a.request.id,))]
    # wide 0–3 · a 3–7 beside b 3–4 · after a 7–9
    assert makespan_s(run(jobs, nodes_of(2))) == 9
    assert lower_bound_s(jobs, nodes_of(2)) == pytest.approx(max((6 + 4 + 1 + 2) / 2, 4 + 2))
    assert makespan_s(run([], nodes_of(2))) == lower_bound_s([], nodes_of(2)) == 0


def test_a_rank_is_a_turn_and_the_longest_and_widest_have_the_first():
    jobs = [training("short", 1, 1.0), training("long", 1, 9.0), training("wide", 8, 9.0)]
    order = ranked([job.request for job in jobs], CLUSTER)
    assert [(item.key, item.rank) for item in order] == [
        ("wide", 0),
        ("long", 1),
        ("short", 2),
    ]


def test_the_prediction_is_that_of_a_schedule_done_by_hand():
    nodes = nodes_of(2)
    jobs = [training("a", 1, 4.0), training("b", 1, 3.0), training("c", 2, 2.0)]
    # c first on both GPUs, then a beside b; or a beside b, then c: six seconds either way.
    assert makespan_s(run(in_turn(jobs, nodes), nodes)) == pytest.approx(6.0)


def test_what_fits_nowhere_and_what_comes_after_it_are_left_out_of_a_prediction():
    giant, small = training("giant", 64, 5.0), training("a", 1, 2.0)
    assert makespan_s(simulate([giant, small], CLUSTER)) == 2.0
    ran = simulate([giant, evaluation(giant, 1.0), small], CLUSTER, at_once=1)
    assert ran.keys() == {small.request.id}
