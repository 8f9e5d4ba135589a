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
    precedence,
    simulate,
    window,
)

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


def expecting(job: Job, expected_s: float) -> Job:
    return replace(job, request=replace(job.request, expected_s=expected_s))


def misjudged(jobs: Sequence[Job], rng: random.Random, factor: float = 3.0) -> list[Job]:
    """The same jobs, expected to take up to `factor` times as long, or as short."""
    return [expecting(job, job.takes_s * factor ** rng.uniform(-1, 1)) for job in jobs]


def in_turn(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in the order in which a run begins their trials."""
    return sorted(jobs, key=lambda job: precedence(job.request))


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
        jobs = in_turn(change(random_grid(rng), rng))
        found.append(makespan_s(run(jobs, CLUSTER, at_once)) / lower_bound_s(jobs, CLUSTER))
    return found


def evaluated(jobs: Sequence[Job], rng: random.Random) -> list[Job]:
    return [*in_turn(jobs), *(evaluation(job, job.takes_s / 10) for job in jobs)]


@pytest.mark.parametrize(
    ("change", "count", "at_once", "usual", "most"),
    [
        (lambda jobs, rng: jobs, 60, None, 1.05, 1.15),
        (misjudged, 25, None, 1.15, 1.5),
        (evaluated, 20, window(GPUS), 1.15, 1.5),
    ],
    ids=["as expected", "wrong expectations", "evaluations in a window of trials"],
)
def test_grids_end_close_to_the_lower_bound(change, count: int, at_once: int | None, usual, most):
    found = ratios(change, count, at_once)
    assert statistics.median(found) <= usual
    assert max(found) <= most


def test_no_more_trials_are_under_way_than_asked_for_and_a_trial_is_its_training_and_evaluation():
    jobs = in_turn(random_grid(random.Random(3)))
    ran = run([*jobs, *(evaluation(job, 0.5) for job in jobs)], CLUSTER, at_once=5)
    spans = [(ran[job.request.id].asked_s, ran[evaluation(job, 0.5).request.id].ended_s) for job in jobs]
    under_way = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(under_way) == 5


def test_a_wide_training_starts_though_narrow_ones_never_stop_coming():
    """Narrow work arrives faster than it can be done; whatever is expected of it, the wide training has its turn."""
    for seed in range(8):
        rng = random.Random(seed)
        narrow = misjudged([random_job(rng, f"n{n}", (1, 2)) for n in range(120)], rng)
        stream = [replace(job, at_s=0.4 * n) for n, job in enumerate(narrow)]
        wide = training("wide", 4, 5.0, expected_s=30.0, at_s=10.0)
        ran = run([*stream, wide], nodes_of(4, 4))[wide.request.id]
        # What ran when it was asked for, twice over: one round of work that was expected to be over, and its own turn.
        assert ran.started_s - ran.asked_s <= 20.0


def test_no_evaluation_waits_behind_a_training_that_starts_after_it_asks():
    jobs = in_turn(random_grid(random.Random(7)))
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
    assert lower_bound_s(jobs, nodes_of(2)) == pytest.approx((6 + 4 + 1 + 2) / 2)
    assert lower_bound_s(jobs, nodes_of(8)) == 4
    assert makespan_s(run([], nodes_of(2))) == lower_bound_s([], nodes_of(2)) == 0


def test_what_fits_nowhere_and_what_comes_after_it_are_left_out():
    giant, small = training("giant", 64, 5.0), training("a", 1, 2.0)
    ran = simulate([giant, evaluation(giant, 1.0), small], CLUSTER, at_once=1)
    assert ran.keys() == {small.request.id}
