"""The paper's own Hamiltonian-cycle pairs: its text format, and its draws from one torch generator (paper §2).

hamiltonian.py is the same task in the words of the tiny models. `<sep>` and `<edge_sep>` are plain text here; a
model gets them as tokens of their own where its tokenizer is given them.
"""

import functools
from typing import TYPE_CHECKING

from trainers.data.hamiltonian import PAPER, is_cycle
from trainers.data.records import Pair, user_prompt
from trainers.data.selections import draw, generator, permutation
from trainers.errors import SpecError

if TYPE_CHECKING:
    from torch import Generator

SEPARATOR, EDGE_SEPARATOR = "<sep>", "<edge_sep>"
# The official code generates this many and draws from them.
_GENERATED = {"train": 5000, "test": 200}

Edge = tuple[int, int]


def pairs(split: str) -> list[Pair]:
    """The 1000 training or 200 test pairs. Raises SpecError on another split."""
    if split not in _GENERATED:
        raise SpecError(f'split is "{split}": give "train" or "test"')
    train, test = _both_splits()
    return list(train if split == "train" else test)


@functools.cache
def _both_splits() -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    source = generator(PAPER.seed)
    train, test = ([_pair(source) for _ in range(count)] for count in _GENERATED.values())
    drawn_train = draw(range(len(train)), PAPER.train_pairs, source)
    drawn_test = draw(range(len(test)), PAPER.test_pairs, source)
    return tuple(train[row] for row in drawn_train), tuple(test[row] for row in drawn_test)


def _pair(source: "Generator") -> Pair:
    import torch

    count = PAPER.vertices
    cycle = permutation(count, source)
    planted = [_sorted_edge(cycle[place], cycle[(place + 1) % count]) for place in range(count)]
    others = [(u, v) for u in range(count) for v in range(u + 1, count) if (u, v) not in planted]
    more = [edge for edge in others if torch.rand(1, generator=source).item() < PAPER.edge_probability]
    edges = [*planted, *more]
    edges = [edges[place] for place in permutation(len(edges), source)]
    wrong = permutation(count, source)
    while is_cycle(wrong, count, edges):
        wrong = permutation(count, source)
    return Pair(prompt=user_prompt(_prompt(edges)), chosen=_answer(cycle), rejected=_answer(wrong))


def _prompt(edges: list[Edge]) -> str:
    vertices = "".join(f"{SEPARATOR}{vertex}" for vertex in range(PAPER.vertices))
    joined = "".join(f"{SEPARATOR}{u}{EDGE_SEPARATOR}{v}" for u, v in edges)
    return f"Vertices: {vertices}\nEdges: {joined}"


def _answer(order: list[int]) -> str:
    return SEPARATOR.join(map(str, order))


def _sorted_edge(u: int, v: int) -> Edge:
    return (min(u, v), max(u, v))
