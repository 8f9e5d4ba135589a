"""The tiny world and its tokenizer: determinism, disjoint splits, unseen words, round trips; Hamiltonian cycles."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.digests import content_digest
from trainers.data import worlds
from trainers.data.known import BUILTIN_SETS, paper_hamiltonian_pairs
from trainers.data.records import Pair
from trainers.data.worlds import HamiltonianSpec, graph_of, hamiltonian_pairs, is_correct, is_cycle
from trainers.models import tiny

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer()


def _every_pair() -> list[Pair]:
    sets = (worlds.tiny_pairs, worlds.paraphrased_pairs, worlds.request_pairs, worlds.hamiltonian_pairs)
    return [pair for split in SPLITS for make in sets for pair in make(split)]


# Digests that the sets have had ever since: the seeds of Python's generator are texts, the same in every process.
GOLDEN = {
    "tiny_world train": "b1b3d724d9886181",
    "tiny_world test": "3cf548df4721b317",
    "tiny_world_paraphrase test": "142ea6826c27c055",
    "tiny_world_candidates test": "dcb7f9127d226571",
    "tiny_world_with_rewording train": "c67e6f1d75555e65",
    "tiny_world_other_words test": "45a8794d87f87ebc",
    "tiny_requests train": "b7bf85eb701e74a3",
    "tiny_requests test": "c0e58cfad35b41f0",
    "hamiltonian train": "72cd1e3897fc7294",
    "hamiltonian test": "2414415170eab59c",
    "hamiltonian_verification test": "17715fe29a2aec8f",
    "hamiltonian_paper train": "50a1f0d920a8e5de",
    "hamiltonian_paper test": "c38d570ef5ccfe72",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_generated_pairs_are_what_they_always_were(name: str) -> None:
    made, split = name.split()
    assert content_digest(BUILTIN_SETS[made](split))[:16] == GOLDEN[name]


def test_documents_depend_on_the_seed_alone() -> None:
    first = list(islice(worlds.documents(0), 500))
    assert (
        hashlib.sha256("".join(first).encode()).hexdigest()
        == "0646ff6cce5716d925271a6c525bc2bb722f443edbf94433f44edeb9877d3a5f"
    )
    assert first != list(islice(worlds.documents(1), 500))


@pytest.mark.parametrize("split", SPLITS)
def test_a_paraphrase_keeps_the_prompt_and_uses_unseen_words_only(split: str) -> None:
    seen = {
        word
        for pair in worlds.tiny_pairs("train")
        for response in (pair.chosen, pair.rejected)
        for word in response.split()
    }
    originals = worlds.tiny_pairs(split)
    assert len({pair.prompt for pair in originals}) == {"train": 80, "test": 40}[split]
    for original, pair in zip(originals, worlds.paraphrased_pairs(split), strict=True):
        assert pair.prompt == original.prompt
        assert pair.original_chosen == original.chosen
        assert not seen & {*pair.chosen.split(), *pair.rejected.split()}


def test_every_word_is_in_the_vocabulary(tokenizer: Any) -> None:
    texts = [text for pair in _every_pair() for text in (pair.prompt[0].content, pair.chosen, pair.rejected)]
    texts += islice(worlds.documents(0), 500)
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    assert len(set(worlds.VOCABULARY)) == len(worlds.VOCABULARY)


def test_prompt_tokens_are_a_prefix_of_the_full_tokens(tokenizer: Any) -> None:
    for pair in _every_pair():
        for response in (pair.chosen, pair.rejected):
            asked = [turn.as_dict() for turn in pair.prompt]
            full = [*asked, {"role": "assistant", "content": response}]
            prompt_text = tokenizer.apply_chat_template(full[:-1], tokenize=False, add_generation_prompt=True)
            full_text = tokenizer.apply_chat_template(full, tokenize=False)
            prompt = tokenizer(prompt_text)["input_ids"]
            tokens = tokenizer(full_text)["input_ids"]
            assert full_text.startswith(prompt_text)
            assert tokens[: len(prompt)] == prompt
            assert tokenizer.decode(tokens[len(prompt) :]) == f"{response} {worlds.END}"
            assert tokens[-1] == tokenizer.eos_token_id
            assert full_text == worlds.chat_text(pair.prompt[0].content, response)


def test_pretraining_writes_the_same_folder_twice_and_leaves_the_random_state(
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny.TinyModel(architecture="llama", width=16, steps=3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    rows: list[dict[str, float]] = []
    tiny.pretrain(model, tmp_path / "a", rows.append)
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert [row["step"] for row in rows] == [3]
    torch.rand(7)
    tiny.pretrain(model, tmp_path / "b", rows.append)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.config.hidden_size == 16
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert len(tokenizer) == loaded.config.vocab_size


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
    wrongs = "0 2 1 3|0 1 2|0 1 2 2|0 1 2 3 0|0 1 2 3 yes||0 1 2 03|+0 1 2 3|0, 1, 2, 3|٠ 1 2 3"
    for wrong in wrongs.split("|"):
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
