"""Hamiltonian-cycle verification: is this order of the vertices a cycle of this graph? (paper §2)

A graph has a planted random cycle and every other edge with probability p, its edges shuffled.
Chosen: the planted cycle. Rejected: an order of the vertices that uses at least one non-edge.
Checking an answer is easy and finding one is hard: a reward model need not be a generator.

    prompt    vertices 0 1 2 3 4 edges 3 - 1 , 0 - 4 , …      chosen    3 1 4 0 2
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from trainers.data.records import Pair, user_prompt
from trainers.errors import SpecError

MIN_VERTICES = 4
MAX_VERTICES = 16
WORDS = ("vertices", "edges", "-", ",", *(str(vertex) for vertex in range(MAX_VERTICES)))

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HamiltonianSpec:
    """A generated set: `train_pairs` are drawn first and `test_pairs` after them, from one seed.

    Raises SpecError where no order of the vertices could be wrong, or a vertex has no word.
    """

    vertices: int
    edge_probability: float
    train_pairs: int
    test_pairs: int
    seed: int

    def __post_init__(self) -> None:
        if not MIN_VERTICES <= self.vertices <= MAX_VERTICES:
            raise SpecError(
                f"HamiltonianSpec.vertices is {self.vertices}: give {MIN_VERTICES} to {MAX_VERTICES}"
            )
        if not 0 <= self.edge_probability < 1:
            raise SpecError(
                f"HamiltonianSpec.edge_probability is {self.edge_probability}: "
                "give at least 0 and less than 1, or every order is a cycle"
            )


PAPER = HamiltonianSpec(vertices=10, edge_probability=0.2, train_pairs=1000, test_pairs=200, seed=982)
LAPTOP = HamiltonianSpec(vertices=5, edge_probability=0.2, train_pairs=32, test_pairs=32, seed=982)
# Enough graphs for a tiny model to learn to verify.
VERIFICATION = HamiltonianSpec(vertices=5, edge_probability=0.2, train_pairs=1000, test_pairs=200, seed=982)


def pairs(split: str, spec: HamiltonianSpec = LAPTOP) -> list[Pair]:
    """The pairs of `split`, "train" or "test"; no prompt stands in both. Raises SpecError."""
    if split not in ("train", "test"):
        raise SpecError(f'split is "{split}": give "train" or "test"')
    drawn = _distinct_pairs(spec)
    train = [next(drawn) for _ in range(spec.train_pairs)]
    if split == "train":
        return train
    return [next(drawn) for _ in range(spec.test_pairs)]


def random_graph(spec: HamiltonianSpec, rng: random.Random) -> tuple[list[Edge], list[int]]:
    """Shuffled edges of a graph that is not complete, and its planted cycle."""
    every_edge = list(combinations(range(spec.vertices), 2))
    while True:
        cycle = rng.sample(range(spec.vertices), spec.vertices)
        planted = {_sorted_edge(edge) for edge in steps(cycle)}
        edges = [e for e in every_edge if e in planted or rng.random() < spec.edge_probability]
        if len(edges) == len(every_edge):
            continue
        rng.shuffle(edges)
        # Either end may come first, so that the order of the ends tells nothing.
        return [edge if rng.random() < 0.5 else edge[::-1] for edge in edges], cycle


def random_non_cycle(vertices: int, edges: Sequence[Edge], rng: random.Random) -> list[int]:
    """A random order of the vertices with at least one step that is not an edge."""
    while True:
        order = rng.sample(range(vertices), vertices)
        if not is_cycle(order, vertices, edges):
            return order


def is_cycle(order: Sequence[int], vertices: int, edges: Sequence[Edge]) -> bool:
    """Whether `order` visits every vertex once and every step, the closing one too, is an edge."""
    if sorted(order) != list(range(vertices)):
        return False
    known = {_sorted_edge(edge) for edge in edges}
    return all(_sorted_edge(step) in known for step in steps(order))


def steps(order: Sequence[int]) -> list[Edge]:
    """The steps of a closed walk, the one back to the start last."""
    return list(zip(order, [*order[1:], order[0]], strict=True))


def prompt_text(vertices: int, edges: Sequence[Edge]) -> str:
    """The graph in words, one token each."""
    names = " ".join(str(vertex) for vertex in range(vertices))
    return f"vertices {names} edges {' , '.join(f'{u} - {v}' for u, v in edges)}"


def answer_text(order: Sequence[int]) -> str:
    """The order in words, one token each."""
    return " ".join(str(vertex) for vertex in order)


def parse_prompt(text: str) -> tuple[int, list[Edge]]:
    """Number of vertices and the edges that `prompt_text` wrote."""
    names, edges = text.removeprefix("vertices ").split(" edges ")
    ends = [edge.split(" - ") for edge in edges.split(" , ")]
    return len(names.split()), [(int(u), int(v)) for u, v in ends]


def parse_answer(text: str) -> list[int]:
    """The order that `answer_text` wrote. Raises ValueError on anything but numbers."""
    return [int(word) for word in text.split()]


def cycle_share(vertices: int, edges: Sequence[Edge]) -> float:
    """The share of all orders of the vertices that are cycles of the graph: what guessing an order is worth."""
    neighbours = [set[int]() for _ in range(vertices)]
    for u, v in edges:
        neighbours[u].add(v)
        neighbours[v].add(u)
    # Paths from vertex 0 by (visited, last), each counted once: there are (n − 1)! orders that begin with 0.
    paths = {(1, 0): 1}
    for _ in range(vertices - 1):
        longer: dict[tuple[int, int], int] = {}
        for (visited, last), count in paths.items():
            for vertex in neighbours[last]:
                if not visited >> vertex & 1:
                    state = (visited | 1 << vertex, vertex)
                    longer[state] = longer.get(state, 0) + count
        paths = longer
    closed = sum(count for (_, last), count in paths.items() if 0 in neighbours[last])
    return closed / math.factorial(vertices - 1)


def _distinct_pairs(spec: HamiltonianSpec) -> Iterator[Pair]:
    rng = random.Random(f"hamiltonian pairs {spec.seed}")
    seen: set[str] = set()
    while True:
        edges, cycle = random_graph(spec, rng)
        prompt = prompt_text(spec.vertices, edges)
        if prompt in seen:
            continue
        seen.add(prompt)
        rejected = random_non_cycle(spec.vertices, edges, rng)
        yield Pair(
            prompt=user_prompt(prompt),
            chosen=answer_text(cycle),
            rejected=answer_text(rejected),
        )


def _sorted_edge(edge: Edge) -> Edge:
    return (min(edge), max(edge))
