"""Hamiltonian-cycle pairs: what is chosen is a cycle of its graph, what is rejected is not."""

import pytest

from trainers.data import worlds
from trainers.data.known import paper_hamiltonian_pairs
from trainers.data.worlds import HamiltonianSpec, graph_of, hamiltonian_pairs, is_correct, is_cycle

SMALLEST = HamiltonianSpec(vertices=4, edge_probability=0.9, train_pairs=40, test_pairs=20, seed=0)
SPECS = {"laptop": worlds.LAPTOP_GRAPHS, "paper": worlds.PAPER_GRAPHS, "smallest": SMALLEST}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SPECS)
def test_chosen_is_a_cycle_of_its_graph_and_rejected_is_not(name: str, split: str) -> None:
    spec = SPECS[name]
    pairs = hamiltonian_pairs(split, spec)
    assert len(pairs) == (spec.train_pairs if split == "train" else spec.test_pairs)
    for pair in pairs:
        vertices, edges = graph_of(pair.prompt[0].content)
        chosen = [int(word) for word in pair.chosen.split()]
        rejected = [int(word) for word in pair.rejected.split()]
        assert vertices == spec.vertices
        assert sorted(chosen) == sorted(rejected) == list(range(vertices))
        assert is_cycle(chosen, vertices, edges)
        assert not is_cycle(rejected, vertices, edges)
    prompts = [pair.prompt for split in ("train", "test") for pair in hamiltonian_pairs(split, spec)]
    assert len(set(prompts)) == len(prompts)


def test_an_answer_is_judged_exactly() -> None:
    prompt = worlds.prompt_text(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
    assert is_correct("0 1 2 3", prompt)
    assert is_correct(" 1 0 3 2 ", prompt)
    for wrong in (
        "0 2 1 3",
        "0 1 2",
        "0 1 2 2",
        "0 1 2 3 0",
        "0 1 2 3 yes",
        "",
        "0 1 2 03",
        "+0 1 2 3",
        "0, 1, 2, 3",
        "٠ 1 2 3",
    ):
        assert not is_correct(wrong, prompt), wrong
    assert not is_correct("0 1 2 3", worlds.prompt_text(4, [(0, 1), (1, 2), (2, 3)])), (
        "the last edge is missing"
    )


def test_the_papers_own_pairs_are_judged_as_what_they_are() -> None:
    for pair in paper_hamiltonian_pairs("test"):
        prompt = pair.prompt[0].content
        assert is_correct(pair.chosen, prompt)
        assert not is_correct(pair.rejected, prompt)
        assert not is_correct(pair.chosen.replace("<sep>", " "), prompt)
