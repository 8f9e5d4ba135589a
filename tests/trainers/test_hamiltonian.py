"""Hamiltonian-cycle pairs: what is chosen is a cycle of its graph, what is rejected is not."""

import random
from itertools import permutations

import pytest

from trainers.data import hamiltonian, paper_hamiltonian
from trainers.data.cycle_answers import is_correct
from trainers.data.hamiltonian import HamiltonianSpec
from trainers.errors import SpecError

SMALLEST = HamiltonianSpec(vertices=4, edge_probability=0.9, train_pairs=40, test_pairs=20, seed=0)
SPECS = {"laptop": hamiltonian.LAPTOP, "paper": hamiltonian.PAPER, "smallest": SMALLEST}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SPECS)
def test_chosen_is_a_cycle_of_its_graph_and_rejected_is_not(name: str, split: str) -> None:
    spec = SPECS[name]
    pairs = hamiltonian.pairs(split, spec)
    assert len(pairs) == (spec.train_pairs if split == "train" else spec.test_pairs)
    for pair in pairs:
        vertices, edges = hamiltonian.parse_prompt(pair.prompt[0].content)
        chosen = hamiltonian.parse_answer(pair.chosen)
        rejected = hamiltonian.parse_answer(pair.rejected)
        assert vertices == spec.vertices
        assert sorted(chosen) == sorted(rejected) == list(range(vertices))
        assert hamiltonian.is_cycle(chosen, vertices, edges)
        assert not hamiltonian.is_cycle(rejected, vertices, edges)


def test_pairs_are_the_same_every_time_and_splits_share_no_prompt() -> None:
    train, test = hamiltonian.pairs("train"), hamiltonian.pairs("test")
    assert train == hamiltonian.pairs("train")
    assert test == hamiltonian.pairs("test")
    prompts = [pair.prompt for pair in (*train, *test)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 1, 2, 3], True),
        ([2, 1, 0, 3], True),
        ([0, 2, 1, 3], False),
        ([0, 1, 2], False),
        ([0, 1, 2, 2], False),
        ([0, 1, 2, 3, 0], False),
        ([], False),
    ],
)
def test_is_cycle_on_a_square(order: list[int], expected: bool) -> None:
    square = [(1, 0), (1, 2), (2, 3), (0, 3)]
    assert hamiltonian.is_cycle(order, 4, square) is expected


def test_is_cycle_needs_the_closing_edge() -> None:
    path = [(0, 1), (1, 2), (2, 3)]
    assert not hamiltonian.is_cycle([0, 1, 2, 3], 4, path)


def test_edges_appear_with_the_given_probability() -> None:
    spec = HamiltonianSpec(vertices=10, edge_probability=0.2, train_pairs=0, test_pairs=0, seed=0)
    rng = random.Random(0)
    extra = [len(hamiltonian.random_graph(spec, rng)[0]) - 10 for _ in range(500)]
    assert sum(extra) / len(extra) == pytest.approx(35 * 0.2, abs=0.4)


@pytest.mark.parametrize(("vertices", "edge_probability"), [(3, 0.2), (17, 0.2), (6, 1.0), (6, -0.1)])
def test_a_set_that_cannot_be_drawn_is_refused(vertices: int, edge_probability: float) -> None:
    with pytest.raises(SpecError, match="HamiltonianSpec"):
        HamiltonianSpec(
            vertices=vertices,
            edge_probability=edge_probability,
            train_pairs=1,
            test_pairs=1,
            seed=0,
        )


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(SpecError, match="validation"):
        hamiltonian.pairs("validation")


@pytest.mark.parametrize("name", ["laptop", "smallest"])
def test_the_share_of_cycles_is_that_of_all_orders(name: str) -> None:
    for pair in hamiltonian.pairs("test", SPECS[name])[:5]:
        vertices, edges = hamiltonian.parse_prompt(pair.prompt[0].content)
        orders = list(permutations(range(vertices)))
        right = sum(hamiltonian.is_cycle(order, vertices, edges) for order in orders)
        assert hamiltonian.cycle_share(vertices, edges) == pytest.approx(right / len(orders))


def test_an_answer_is_judged_exactly() -> None:
    prompt = hamiltonian.prompt_text(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
    assert is_correct("0 1 2 3", prompt)
    assert is_correct(" 1 0 3 2 ", prompt)
    for wrong in (
        "0 2 1 3",
        "0 1 2",
        "0 1 2 3 0",
        "0 1 2 3 yes",
        "",
        "0 1 2 03",
        "+0 1 2 3",
        "0, 1, 2, 3",
        "٠ 1 2 3",
    ):
        assert not is_correct(wrong, prompt), wrong


def test_the_papers_own_pairs_are_judged_as_what_they_are() -> None:
    for pair in paper_hamiltonian.pairs("test")[:20]:
        prompt = pair.prompt[0].content
        assert is_correct(pair.chosen, prompt)
        assert not is_correct(pair.rejected, prompt)
        assert not is_correct(pair.chosen.replace("<sep>", " "), prompt)
