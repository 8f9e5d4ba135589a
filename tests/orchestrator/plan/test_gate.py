"""The gate never over-commits a node, always drains, and starts nothing that makes the first of the queue wait."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.plan.hardware import Node
from orchestrator.plan.schedule import Grant, Request, Running, bundles, decide, precedence

NODES = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4).map(
    lambda sizes: [Node(id=f"n{i}", cpus=cpus, gpus=gpus) for i, (cpus, gpus) in enumerate(sizes)]
)
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["shared", "evaluate", "train"]),
        st.integers(1, 6),
        st.integers(0, 3),
        st.integers(0, 2),
        st.integers(1, 9),
    ).filter(lambda parts: parts[2] or parts[3]),
    max_size=8,
).map(
    lambda parts: [
        Request(key=f"r{i}", kind=kind, workers=workers, cpus=cpus, gpus=gpus, expected_s=float(expected_s))
        for i, (kind, workers, cpus, gpus, expected_s) in enumerate(parts)
    ]
)


def taken(grants: Sequence[Grant], node: Node) -> tuple[int, int]:
    """CPUs and GPUs that `grants` take of `node`."""
    held = [grant.request for grant in grants for id in grant.nodes if id == node.id]
    return sum(request.cpus for request in held), sum(request.gpus for request in held)


def left(nodes: Sequence[Node], grants: Sequence[Grant]) -> list[Node]:
    """What `grants` leave free."""
    return [
        replace(node, cpus=node.cpus - taken(grants, node)[0], gpus=node.gpus - taken(grants, node)[1])
        for node in nodes
    ]


def fits_empty(nodes: Sequence[Node], request: Request) -> bool:
    """Whether the machines hold the request when nothing else runs, counted worker by worker."""
    free = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(request.workers):
        spot = next((f for f in free if f[0] >= request.cpus and f[1] >= request.gpus), None)
        if spot is None:
            return False
        spot[0] -= request.cpus
        spot[1] -= request.gpus
    return True


@given(nodes=NODES, request=REQUESTS.filter(bool).map(lambda requests: requests[0]))
def test_a_request_alone_starts_exactly_where_it_fits(nodes: list[Node], request: Request):
    assert bool(decide(nodes, [request])) == fits_empty(nodes, request)


@given(nodes=NODES, waiting=REQUESTS, ends=st.lists(st.integers(0, 9), min_size=8, max_size=8))
def test_nothing_that_starts_makes_the_first_that_waits_wait_longer(
    nodes: list[Node], waiting: list[Request], ends: list[int]
):
    """If all that runs ends when expected, the first in the queue starts no later than with nobody behind it."""
    waiting = [request for request in waiting if fits_empty(nodes, request)]
    before = [
        Running(grant=grant, until_s=float(end))
        for grant, end in zip(decide(nodes, waiting[:4]), ends, strict=False)
    ]
    free = left(nodes, [item.grant for item in before])
    queue = sorted(waiting[4:], key=precedence)
    grants = decide(free, queue, before)
    started = {grant.request.id for grant in grants}
    held_back = [request for request in queue if request.id not in started]
    if not held_back:
        return
    first = held_back[0]
    ahead = [grant for grant in grants if queue.index(grant.request) < queue.index(first)]
    assert start_of(first, nodes, before, grants) <= start_of(first, nodes, before, ahead)


def start_of(
    request: Request, nodes: Sequence[Node], before: Sequence[Running], grants: Sequence[Grant]
) -> float:
    """When the request fits at the earliest, if these run as long as expected."""
    running = [*before, *(Running(grant=grant, until_s=grant.request.expected_s) for grant in grants)]
    for moment in sorted({0.0, *(item.until_s for item in running)}):
        busy = [item for item in running if item.until_s > moment]
        if decide(left(nodes, [item.grant for item in busy]), [request], busy):
            return moment
    raise AssertionError("it fits nowhere")


@given(nodes=NODES, waiting=REQUESTS, data=st.data())
@settings(max_examples=150)
def test_a_queue_drains_whatever_arrives_and_ends_in_whatever_order(
    nodes: list[Node], waiting: list[Request], data: st.DataObject
):
    """Requests arrive one by one or many at once, grants end in any order: all are granted in the end."""
    to_come = [request for request in waiting if fits_empty(nodes, request)]
    assume(to_come)
    everything = len(to_come)
    queue: list[Request] = []
    running: list[Grant] = []
    done = 0
    while to_come or queue or running:
        arriving = data.draw(st.integers(0, len(to_come)), label="arriving")
        queue += [to_come.pop(0) for _ in range(arriving)]
        busy = [Running(grant=grant, until_s=grant.request.expected_s) for grant in running]
        grants = decide(left(nodes, running), queue, busy, float(done))
        started = {grant.request.id for grant in grants}
        assert len(started) == len(grants)
        assert all(len(grant.nodes) == grant.request.workers and grant.request in queue for grant in grants)
        queue = [request for request in queue if request.id not in started]
        running += grants
        assert running or not queue, f"deadlock: nothing runs, and these wait: {queue}"
        for node in left(nodes, running):
            assert min(node.cpus, node.gpus) >= 0
        if running:
            running.pop(data.draw(st.integers(0, len(running) - 1), label="ends"))
            done += 1
    assert done == everything


def training(id: str, workers: int = 1, expected_s: float = 10.0) -> Request:
    return Request(key=id, kind="train", workers=workers, expected_s=expected_s)


def until(seconds: float, *grants: Grant) -> list[Running]:
    return [Running(grant=grant, until_s=seconds) for grant in grants]


def ids(grants: Sequence[Grant]) -> list[str]:
    return [grant.request.key for grant in grants]


def test_behind_a_wide_training_only_what_ends_before_its_turn_is_started():
    nodes = [Node(id="a", cpus=4)]
    first = decide(nodes, [training("first")])
    wide, long, short = training("wide", 4), training("long", 1, 8.0), training("short", 1, 5.0)
    for now_s, started in ((0.0, ["short"]), (1.0, ["short"]), (2.0, []), (100.0, [])):
        # What runs longer than expected, that is than 6 s, counts as about to end.
        queue = [long, short, wide]
        assert ids(decide(left(nodes, first), queue, until(6.0, *first), now_s)) == started
    assert ids(decide(nodes, queue)) == ["wide"]


def test_beside_the_place_of_a_wide_training_anything_is_started():
    nodes = [Node(id="a", cpus=4), Node(id="b", cpus=2)]
    first = decide(nodes, [training("first", 3)])
    assert set(first[0].nodes) == {"a"}
    endless = training("endless", expected_s=1e6)
    wide = replace(training("wide", 4), rank=-1)
    (grant,) = decide(left(nodes, first), [endless, wide], until(6.0, *first))
    assert (grant.request.key, grant.nodes) == ("endless", ("b",))


def test_shared_stages_and_evaluations_come_first_then_trainings_by_length_and_width():
    nodes = [Node(id="a", cpus=6)]
    evaluation, shared = Request(key="e", kind="evaluate"), Request(key="s", kind="shared")
    queue = [training("short", expected_s=1.0), training("long"), evaluation, training("wide", 2), shared]
    assert ids(decide(nodes, queue)) == ["e", "s", "wide", "long", "short"]
    # A rank goes before length and width.
    turns = [replace(request, rank=rank) for rank, request in enumerate(queue)]
    assert ids(decide(nodes, turns[::-1])) == ["s", "e", "short", "long", "wide"]


def test_a_gang_stays_on_the_fullest_node_that_holds_it_and_spreads_only_where_none_does():
    nodes = [Node(id="a", cpus=3), Node(id="b", cpus=4), Node(id="c", cpus=8)]
    assert decide(nodes, [training("gang", 4)])[0].nodes == ("b",) * 4
    (grant,) = decide([Node(id="a", cpus=1), Node(id="b", cpus=3)], [training("gang", 4)])
    assert sorted(grant.nodes) == ["a", "b", "b", "b"]
    # It waits for a node that would hold it, if that were idle.
    nodes = [Node(id="a", cpus=4), Node(id="b", cpus=4)]
    apart = [Grant(request=training(id), nodes=(id,)) for id in "ab"]
    assert decide(left(nodes, apart), [training("gang", 4)], until(5.0, *apart)) == []
    (grant,) = decide(left(nodes, apart), [training("gang", 6)], until(5.0, *apart))
    assert grant.nodes == ("a",) * 3 + ("b",) * 3


def test_absent_nodes_are_used_only_where_the_others_do_not_do():
    nodes = [Node(id="a", cpus=8), Node(id="soon", cpus=2)]
    (near,) = decide(nodes, [training("gang", 2)], absent={"soon"})
    assert near.nodes == ("a", "a")
    (far,) = decide([replace(nodes[0], cpus=1), nodes[1]], [training("gang", 2)], absent={"soon"})
    assert far.nodes == ("soon", "soon")


def test_the_autoscaler_hears_of_each_gang_node_by_node():
    gang = Request(key="g", kind="train", workers=3, cpus=1, gpus=2)
    narrow = Grant(request=Request(key="n", kind="evaluate"), nodes=("b",))
    assert bundles([Grant(request=gang, nodes=("a", "a", "b")), narrow]) == [
        {"CPU": 2.0, "GPU": 4.0},
        {"CPU": 1.0, "GPU": 2.0},
        {"CPU": 1.0},
    ]
