"""The paper's filters and draws (paper §2), against its indices, its counts, the shipped samples and torch's generator."""

import json
from collections import Counter

import pytest
import torch

from trainers.data import known
from trainers.data.files import Located
from trainers.data.known import (
    DATASETS,
    PAPER_DRAWS,
    PERSONA,
    draw,
    generator,
    named_set,
    paper_draw,
    permutation,
)
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.evaluate.suites import SUITES
from trainers.pairs.tokens import draw_order
from trainers.specs import DatasetSpec


@pytest.fixture
def any_length(monkeypatch):
    monkeypatch.setattr(known, "short_enough", lambda texts: [True] * len(texts))


def numbers(rows):
    return [row.number for row in rows]


def test_the_draw_of_ultrafeedback_begins_with_the_indices_of_the_paper():
    source = generator(known.SEED)
    train, test = draw(range(35936), 2000, source), draw(range(1145), 200, source)
    assert train[:5] == [20514, 13766, 32987, 4016, 7941]
    assert test[:5] == [87, 557, 805, 174, 843]
    assert (len(train), len(test)) == (2000, 200)


def test_the_shipped_rewritings_are_of_the_rows_that_the_papers_subset_draw_gives(shared):
    from pyarrow import parquet

    folder = shared / "data" / "ultrafeedback_french"
    assert parquet.read_table(folder / "train.parquet")["orig_index"].to_pylist() == sorted(
        permutation(2000, generator(517))[:200]
    )
    assert parquet.read_table(folder / "test.parquet")["orig_index"].to_pylist() == list(range(200))


def test_the_shipped_pairs_of_ultrafeedback_pass_the_translation_filter(shared, any_length):
    pairs = read_pairs(DatasetSpec(name="a", source=str(shared / "data" / "ultrafeedback")), "train")
    rows = [scored(n, pair.prompt[0].content, pair.chosen, pair.rejected) for n, pair in enumerate(pairs)]
    assert len(paper_draw(PAPER_DRAWS["ultrafeedback"], lambda split: iter(rows))["train"]) == 200


def scored(number, prompt, chosen, rejected, scores=(2.0, 1.0)):
    talk = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for text in (chosen, rejected)
    ]
    row = {"prompt": prompt, "chosen": talk[0], "rejected": talk[1]}
    return Located("hub", number, {**row, "score_chosen": scores[0], "score_rejected": scores[1]})


def test_ties_long_texts_and_translations_are_left_out_before_the_draw(monkeypatch):
    monkeypatch.setattr(known, "short_enough", lambda texts: [len(text) <= 512 for text in texts])
    rows = [
        scored(0, "a", "good", "bad"),
        scored(1, "b", "good", "bad", scores=(1.0, 1.0)),
        scored(2, "c", "good", "bad", scores=(1.0, 2.0)),
        scored(3, "Please TRANSLATE this", "good", "bad"),
        scored(4, "a translation", "good", "bad"),
        scored(5, "x" * 600, "good", "bad"),
        scored(6, "d", "good", "x" * 513),
        scored(7, "e", "good", "x" * 512),
    ]
    drawn = paper_draw(PAPER_DRAWS["ultrafeedback"], lambda split: iter(rows))
    assert {*numbers(drawn["train"])} == {*numbers(drawn["test"])} == {0, 7}


def test_a_set_of_one_split_is_divided_first_and_drawn_from_the_same_generator(any_length):
    rows = [
        Located("hub", n, {"prompt": f"p{n}", "chosen": "a", "rejected": "b", "subset": subset})
        for n, subset in enumerate(["alpacaeval"] * 5 + ["math-prm"] * 447)
    ]
    drawn = paper_draw(PAPER_DRAWS["rewardbench_math"], lambda split: iter(rows))
    source = generator(982)
    order = permutation(447, source)
    train, test = order[:47], order[47:]
    assert numbers(drawn["train"]) == [5 + train[place] for place in permutation(47, source)]
    assert numbers(drawn["test"]) == [5 + test[place] for place in permutation(400, source)[:200]]
    with pytest.raises(DataError, match=r"3 rows are left, of which 400 are for testing"):
        paper_draw(PAPER_DRAWS["rewardbench_math"], lambda split: iter(rows[-3:]))


def test_the_pairs_of_rewardmath_that_are_trained_on_are_those_of_the_paper(shared):
    spec = named_set("rewardmath")
    taken = draw_order(2000, spec.train_draw)[: spec.train_draw.max_pairs]
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(517))
    assert taken == order[:1000].tolist()
    copy = DatasetSpec(name="a", source=str(shared / "data" / "rewardmath"))
    pairs = read_pairs(copy, "train")
    seen = {pairs[row].prompt for row in taken}
    # Reference §6: of the 200 test prompts 179 stand in the 1000 used, where 198 stand in the 2000.
    assert sum(pair.prompt in seen for pair in read_pairs(copy, "test")) == 179


def test_rewardmath_joins_steps_and_takes_the_side_that_is_chosen(tmp_path, any_length):
    rows = [
        {
            "problem": f"p{n}",
            "eval_solution_A": [f"a{n}", "then"],
            "eval_solution_B": [f"b{n}"],
            "chosen_position": "AB"[n % 2],
        }
        for n in range(1003)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DatasetSpec(name="rewardmath", source=str(tmp_path), selection="rewardmath")
    train, test = read_pairs(spec, "train"), read_pairs(spec, "test")
    assert (len(train), len(test)) == (3, 200)
    for pair in (*train, *test):
        number = int(pair.prompt[0].content[1:])
        solutions = (f"a{number} then", f"b{number}")
        assert (pair.chosen, pair.rejected) == (solutions if number % 2 == 0 else solutions[::-1])
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "p"}))
    with pytest.raises(DataError, match=r"rewardmath: a row of .* is not as expected"):
        read_pairs(spec, "train")


def test_named_sets_are_known_with_their_facts_and_only_the_references_revisions_are_pinned():
    pinned = {spec.name: spec.revision for spec in DATASETS if spec.revision}
    assert set(pinned) == {
        "ultrafeedback",
        *(f"ultrafeedback_{kind}" for kind in ("paraphrase", "french", "spanish")),
    }
    assert pinned["ultrafeedback"] == "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"
    assert pinned["ultrafeedback_french"].startswith("58357b5")
    assert {spec.selection for spec in DATASETS if spec.selection} == {*PAPER_DRAWS, *SUITES, PERSONA}
    assert named_set("nothing") is None


def test_the_length_filter_counts_the_begin_token_or_says_that_its_tokenizer_lacks(
    monkeypatch, tiny_model, tmp_path
):
    monkeypatch.setenv(known.LENGTH_TOKENIZER_VARIABLE, str(tiny_model))
    whole = known._load_length_tokenizer(str(tiny_model))("yes " * 511)["input_ids"]
    begins = len(whole) - 511
    assert known.short_enough(["yes " * (512 - begins), "yes " * (513 - begins)]) == [True, False]
    monkeypatch.setenv(known.LENGTH_TOKENIZER_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"length filter needs the tokenizer .* RMSWEEP_LENGTH_TOKENIZER"):
        known.short_enough(["a"])


# Persona: statements, prefixes and words as the official code draws them.

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
