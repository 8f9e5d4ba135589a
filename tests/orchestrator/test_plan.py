"""The gate never over-commits and always drains."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.plan import Grant, Node, Request, decide, local_capacity


def test_the_local_machine_has_at_least_one_cpu():
    (node,) = local_capacity()
    assert node.cpus >= 1


NODES = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4).map(
    lambda sizes: [Node(id=f"n{i}", cpus=cpus, gpus=gpus) for i, (cpus, gpus) in enumerate(sizes)]
)
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["shared", "evaluate", "train"]),
        st.integers(1, 6),
        st.integers(0, 3),
        st.integers(0, 2),
    ).filter(lambda parts: parts[2] or parts[3]),
    max_size=8,
).map(
    lambda parts: [
        Request(id=f"r{i}", kind=kind, workers=workers, cpus=cpus, gpus=gpus)
        for i, (kind, workers, cpus, gpus) in enumerate(parts)
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


@given(nodes=NODES, waiting=REQUESTS)
def test_the_gate_never_over_commits_a_node(nodes: list[Node], waiting: list[Request]):
    grants = decide(nodes, waiting)
    for node in left(nodes, grants):
        assert node.cpus >= 0
        assert node.gpus >= 0


@given(nodes=NODES, waiting=REQUESTS)
def test_a_grant_names_a_known_node_for_every_worker_and_is_given_once(
    nodes: list[Node], waiting: list[Request]
):
    grants = decide(nodes, waiting)
    for grant in grants:
        assert len(grant.nodes) == grant.request.workers
        assert set(grant.nodes) <= {node.id for node in nodes}
        assert grant.request in waiting
    assert len({grant.request.id for grant in grants}) == len(grants)


@given(nodes=NODES, request=REQUESTS.filter(bool).map(lambda requests: requests[0]))
def test_a_request_alone_starts_exactly_where_it_fits(nodes: list[Node], request: Request):
    assert bool(decide(nodes, [request])) == fits_empty(nodes, request)


@given(nodes=NODES, waiting=REQUESTS)
def test_no_training_starts_while_other_work_waits(nodes: list[Node], waiting: list[Request]):
    granted = {grant.request.id: grant.request for grant in decide(nodes, waiting)}
    if any(request.kind == "train" for request in granted.values()):
        assert all(request.id in granted for request in waiting if request.kind != "train")


@given(nodes=NODES, waiting=REQUESTS)
def test_no_training_starts_before_a_wider_one(nodes: list[Node], waiting: list[Request]):
    granted = {grant.request.id for grant in decide(nodes, waiting)}
    widths = [r.width for r in waiting if r.kind == "train" and r.id in granted]
    held_back = [r.width for r in waiting if r.kind == "train" and r.id not in granted]
    assert not widths or not held_back or min(widths) >= max(held_back)


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
        grants = decide(left(nodes, running), queue)
        started = {grant.request.id for grant in grants}
        queue = [request for request in queue if request.id not in started]
        running += grants
        assert running or not queue, f"deadlock: nothing runs, and these wait: {queue}"
        for node in left(nodes, running):
            assert min(node.cpus, node.gpus) >= 0
        if running:
            running.pop(data.draw(st.integers(0, len(running) - 1), label="ends"))
            done += 1
    assert done == everything


def test_a_wide_training_is_not_overtaken_for_ever():
    """Narrow trainings keep coming; the wide one still starts as soon as what runs has ended."""
    nodes = [Node(id="a", cpus=4)]
    running = decide(nodes, [Request(id="first", kind="train")])
    wide = Request(id="wide", kind="train", workers=4)
    narrow = [Request(id=f"narrow{i}", kind="train") for i in range(20)]
    assert decide(left(nodes, running), [*narrow, wide]) == []
    assert [grant.request.id for grant in decide(nodes, [*narrow, wide])] == ["wide"]


def test_a_gang_stays_on_one_node_where_one_holds_it():
    nodes = [Node(id="a", cpus=3), Node(id="b", cpus=4), Node(id="c", cpus=8)]
    (grant,) = decide(nodes, [Request(id="gang", kind="train", workers=4)])
    assert grant.nodes == ("b",) * 4


def test_a_gang_wider_than_a_node_spreads():
    nodes = [Node(id="a", cpus=1), Node(id="b", cpus=3)]
    (grant,) = decide(nodes, [Request(id="gang", kind="train", workers=4)])
    assert sorted(grant.nodes) == ["a", "b", "b", "b"]
