"""Rewriting against a server that speaks the protocol and misbehaves: nothing lost, nothing paid twice."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.trainers.chat_endpoint import Endpoint, original, rows, translated
from tests.trainers.command_line import said as outcome
from trainers.data import rewriting
from trainers.data.rewriting import Journal, Rewrite, Rewriter, Spending
from trainers.data.sources import read_pairs
from trainers.specs import DatasetSpec


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def rewrite(endpoint, tmp_path, capsys):
    """Run the command on `count` pairs: its exit code and all it said."""

    def run_it(*words: object, count: int = 6) -> tuple[object, str]:
        data = tmp_path / "test.jsonl"
        data.write_text("\n".join(map(json.dumps, rows(count))))
        usual = {
            "--into": "french",
            "--endpoint": endpoint.url,
            "--model": "m",
            "--out": tmp_path / "out.jsonl",
            "--timeout-s": "3",
        }
        pairs = [word for flag, value in usual.items() if flag not in words for word in (flag, value)]
        code, out, error = outcome(["rewrite", data, *pairs, *words], capsys)
        return code, out + error

    return run_it


def written(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_every_response_of_the_papers_sample_is_rewritten_and_paid_once(rewrite, endpoint, tmp_path):
    code, said = rewrite("--sample", "3")
    assert code == 0, said
    found = written(tmp_path)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(517)).tolist()
    assert [row["orig_index"] for row in found] == sorted(order[:3])
    for row in found:
        n = row["orig_index"]
        assert row["chosen"] == translated(original(n, "chosen"))
        assert row["orig_rejected"] == original(n, "rejected")
    assert set(endpoint.paid.values()) == {1}
    assert "times as long" in said
    hygienic = [json.loads(line) for line in (tmp_path / "out.jsonl.hygiene.jsonl").read_text().splitlines()]
    assert [(line["row"], line["side"], line["language"]) for line in hygienic] == [
        (row["orig_index"], side, "fr") for row in found for side in ("chosen", "rejected")
    ]
    assert all(line["overlap"] < line["self_overlap"] and line["chrf"] < 90 for line in hygienic)
    pairs = read_pairs(DatasetSpec(name="a", source=str(tmp_path / "out.jsonl")), "test")
    assert pairs[0].original_chosen == found[0]["orig_chosen"]
    assert rewrite()[0] == 0
    assert set(endpoint.paid.values()) == {1}
    assert endpoint.requests.total() == 12


PASSING = ("429", "500", "time out", "broken off")
# An act of the endpoint, and what is noted of the answer.
UNUSABLE = {
    "refusal": "refused",
    "cut": "cut off",
    "english": "in en, not fr",
    "empty": "empty",
    "another's": "the answer to another request",
    "truncated": "cannot be read",
    "no choices": "cannot be read",
}


def test_faults_that_pass_are_asked_again_and_paid_once(rewrite, endpoint, tmp_path):
    for number, act in enumerate(PASSING):
        endpoint.acts[original(number, "rejected")] = [act]
    code, said = rewrite("--concurrency", "3")
    assert code == 0, said
    assert len(written(tmp_path)) == 6
    assert [endpoint.requests[original(n, "rejected")] for n in range(6)] == [2] * 4 + [1] * 2
    assert set(endpoint.paid.values()) == {1}
    assert endpoint.most_busy <= 4  # the one that timed out is still served


def test_answers_that_are_no_rewritings_are_asked_for_anew(rewrite, endpoint, tmp_path):
    for number, act in enumerate(UNUSABLE, start=1):
        endpoint.acts[original(number, "chosen")] = [act]
    code, said = rewrite("--concurrency", "1", count=8)
    assert code == 0, said
    assert [row["chosen"] for row in written(tmp_path)] == [
        translated(original(n, "chosen")) for n in range(8)
    ]
    journal = Journal(tmp_path / "out.jsonl.journal.jsonl")
    faults = [answers[0].fault for answers in journal.values() if len(answers) == 2]
    assert all(noted in fault for noted, fault in zip(UNUSABLE.values(), faults, strict=True))
    assert endpoint.requests.total() == 16 + len(UNUSABLE)


TRAIN = "The train to Rome leaves at nine, I think."


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("I’m sorry, but that is not possible.", "refused"),
        ("I can’t help with that request, sorry.", "refused"),
        (TRAIN.replace("I think", "I thinks"), "unchanged"),
        ("At nine.", "0.19 times as long"),
        ("Around nine, a train goes to the city of Rome.", None),
    ],
)
def test_what_is_no_rewriting_is_told(said, why):
    assert str(rewriting.fault(TRAIN, said, wanted=None)).startswith(str(why))


def test_a_prompt_may_be_ones_own(rewrite, endpoint, tmp_path):
    prompt = tmp_path / "own.txt"
    prompt.write_text("In French, please")
    words = ("--prompt", prompt, "--language", "fr", "--sample", "1")
    assert "has no {response}, where the text to rewrite goes" in rewrite(*words)[1]
    prompt.write_text("In French, please. Text:\n{response}")
    assert rewrite(*words)[0] == 0
    assert endpoint.requests.total() == 2


def test_what_never_comes_right_is_listed_and_the_rest_is_kept(rewrite, endpoint, tmp_path):
    endpoint.acts[original(2, "chosen")] = ["refusal"] * 9
    endpoint.acts[original(4, "rejected")] = ["400"] * 9
    code, said = rewrite("--attempts", "2")
    assert code == 3
    assert "2 responses have no usable rewriting (row 2, chosen: refused; row 4, rejected: http" in said
    assert [row["orig_index"] for row in written(tmp_path)] == [0, 1, 3, 5]
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.failures.jsonl").read_text().splitlines()]
    assert [(item["row"], item["side"]) for item in listed] == [(2, "chosen"), (4, "rejected")]
    assert endpoint.requests[original(2, "chosen")] == 2
    before = endpoint.paid.total()
    assert rewrite("--attempts", "2")[0] == 3
    assert endpoint.paid.total() == before
    endpoint.acts.clear()
    assert rewrite("--attempts", "3")[0] == 0
    assert endpoint.paid.total() == before + 2
    assert not (tmp_path / "out.jsonl.failures.jsonl").exists()
    assert len(written(tmp_path)) == 6


def test_a_run_that_was_killed_goes_on_from_its_journal(rewrite, endpoint, tmp_path):
    rewrite()
    journal = tmp_path / "out.jsonl.journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    # The first line is empty.
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    endpoint.requests.clear()
    assert rewrite()[0] == 0
    assert endpoint.requests.total() == 7
    assert {len(answers) for answers in Journal(journal).values()} == {1}
    assert len(Journal(journal)) == 12


def test_an_answer_that_was_lost_on_the_way_is_not_paid_again_by_the_next_command(
    rewrite, endpoint, monkeypatch
):
    monkeypatch.setattr(rewriting, "_TRIES", 1)
    endpoint.acts[original(1, "chosen")] = ["time out"]
    code, said = rewrite(count=2)
    assert code == 3
    assert "row 1, chosen: Request timed out" in said
    assert rewrite(count=2)[0] == 0
    assert endpoint.requests[original(1, "chosen")] == 2
    assert set(endpoint.paid.values()) == {1}


def test_a_wrong_key_ends_it_at_once(rewrite, endpoint):
    for n in range(6):
        endpoint.acts[original(n, "chosen")] = endpoint.acts[original(n, "rejected")] = ["401"] * 9
    code, said = rewrite("--concurrency", "2")
    assert code == 2
    assert "answered 401" in said
    assert "Traceback" not in said
    assert endpoint.requests.total() <= 2


# A hundred tokens cost 1.
PRICES = ("--input-price", "10000", "--output-price", "10000")


def test_an_estimate_over_the_cap_starts_nothing(rewrite, endpoint):
    code, said = rewrite(*PRICES, "--max-cost", "5")
    assert code == 2
    assert "is needed and 0.00 was paid before, over --max-cost 5.00" in said
    assert rewrite("--estimate")[0] == 0
    assert endpoint.requests.total() == 0


def test_an_estimate_counts_prompts_and_answers_up_to_their_limit(tmp_path):
    asking = Rewrite(
        data="d", out=tmp_path / "o", model="m", max_tokens=50, input_price=1e6, output_price=2e6
    )
    journal = Journal(tmp_path / "journal")
    rewriter = Rewriter(prompt="x" * 25 + "{response}", wanted=None, asking=asking, journal=journal)
    assert rewriter.estimate(["y" * 35, "y" * 3500]) == Spending(
        prompt_tokens=10 + 10 + 10 + 1000, completion_tokens=12 + 50, cost=pytest.approx(1030 + 2 * 62)
    )


def test_a_cap_is_never_passed_and_a_higher_one_goes_on(rewrite, endpoint, tmp_path):
    words = ("--concurrency", "4", "--max-tokens", "60", *PRICES)
    code, said = rewrite(*words, "--max-cost", "20")
    assert code == 3
    assert "chosen: the next request could pass --max-cost 20.00" in said
    paid = 250 * endpoint.paid.total()
    assert 600 < paid <= 2000
    code, said = rewrite(*words, "--max-cost", "1000")
    assert code == 0
    assert "\npaid: 2,400 + 600 tokens, cost 30.00\n" in said
    assert set(endpoint.paid.values()) == {1}
    assert len(written(tmp_path)) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--into", "klingon"], "--into klingon is not one of paraphrase, french"),
        (["--out", "a.txt"], "name a .jsonl file"),
        (["--prompt", "gone.txt"], "there is no such file"),
        (["--sample", "0"], "--sample 0"),
        (["--attempts", "0"], "--attempts 0"),
        (["--max-cost", "1", "--input-price", "1"], "needs --input-price and --output-price"),
        (["--language", "French"], "--language French: give a code of two letters"),
        (["--out", "test.jsonl"], "--out test.jsonl is there, and no rewriting"),
    ],
)
def test_what_cannot_be_meant_is_refused(rewrite, endpoint, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, said = rewrite(*words)
    assert code == 2
    assert message in said
    assert endpoint.requests.total() == 0


def test_the_papers_own_rewritings_are_mostly_clean(shared):
    spec = DatasetSpec(name="a", source=str(shared / "data" / "ultrafeedback_french"))
    faults = Counter(
        rewriting.fault(pair.original_chosen or "", pair.chosen, wanted="fr")
        for pair in read_pairs(spec, "test")[:60]
    )
    assert faults[None] > 30
    assert faults["cut off"] >= 1
    assert not any("unchanged" in (name or "") for name in faults)
