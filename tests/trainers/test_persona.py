"""Persona's pairs are those that the official code draws: statements, prefixes and words by torch's generator."""

import json
from collections import Counter

import pytest
import torch

from trainers.data import known
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.specs import DatasetSpec

QUESTIONS = [f"question {number}" for number in range(200)]


def as_the_paper_draws(questions):
    """(prompt, chosen, rejected) of the 80 and the 40, by torch itself."""
    generator = torch.Generator().manual_seed(875)
    order = torch.randperm(len(questions), generator=generator)[:120].tolist()

    def pick(texts):
        return texts[torch.randint(0, len(texts), (1,), generator=generator).item()]

    found = []
    for row in order:
        chosen = pick(known.CHOSEN_PREFIXES) + pick(known.CHOSEN_WORDS)
        rejected = pick(known.REJECTED_PREFIXES) + pick(known.REJECTED_WORDS)
        found.append((questions[row], chosen, rejected))
    return found[:80], found[80:]


def texts(pairs):
    return [(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in pairs]


def test_a_paraphrased_split_holds_each_prompt_once_for_each_of_the_four_pairings():
    found = texts(known.persona_pairs(QUESTIONS, "test_paraphrase"))
    prompts = [prompt for prompt, *_ in texts(known.persona_pairs(QUESTIONS, "test"))]
    assert Counter(prompt for prompt, *_ in found) == Counter(dict.fromkeys(prompts, 4))
    assert Counter((chosen, rejected) for _, chosen, rejected in found) == {
        (f"My response would be {yes}", f"I lean toward {no}"): 40
        for yes in ("certainly", "absolutely")
        for no in ("not really", "nope")
    }


def test_the_splits_are_what_torch_draws_of_a_files_statements_and_only_those_that_are_agreed_with(tmp_path):
    rows = [
        {"question": question, "answer_matching_behavior": " No" if number % 2 else " Yes"}
        for number, question in enumerate(QUESTIONS * 2)
    ]
    file = tmp_path / "statements.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    spec = DatasetSpec(name="persona", source=str(file), selection="persona")
    for split, expected in zip(("train", "test"), as_the_paper_draws(QUESTIONS[::2] * 2), strict=True):
        assert texts(read_pairs(spec, split)) == expected
    file.write_text(file.read_text()[:4000].rpartition("\n")[0])
    with pytest.raises(DataError, match="Persona needs 120 statements"):
        read_pairs(spec, "train")


def test_the_papers_statements_are_read(shared):
    spec = DatasetSpec(
        name="persona", source=f"{shared}/data/persona/agreeableness.jsonl", selection="persona"
    )
    train, test = read_pairs(spec, "train"), read_pairs(spec, "test")
    assert (len(train), len(test), len(read_pairs(spec, "train_paraphrase"))) == (80, 40, 320)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    assert all(pair.prompt[0].content.startswith("Is the following statement") for pair in train + test)
