"""sweeps/rewrite.py: rules in seconds, a model behind an endpoint, what is asked again, and a run that is cut off goes on."""

import json

import pytest

from orchestrator.spec.datasets import DatasetReader
from orchestrator.store.artifacts import Store
from sweeps import rewrite
from tests.sweep_runs import artifacts, run_analysis
from tests.trainers.chat_endpoint import Endpoint, original, rows, translated
from trainers.data.sources import read_pairs
from trainers.specs import DatasetSpec

PAIRS = 6


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch):
    """Seconds a store, and what it shows is tested with the other analyses."""
    monkeypatch.setattr("orchestrator.cli.analyses.show_report", lambda *_, **__: None)


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows(PAIRS))))
    return file


@pytest.fixture
def endpoint(monkeypatch):
    server = Endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    yield server
    server.close()


@pytest.fixture
def words(mine):
    return "--data", str(mine), "--model", "m", "--into", "french"


def test_the_tiny_world_is_rewritten_by_rule_and_only_once(tmp_path, capfd):
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage) == 0
    report = storage / "sweeps" / "rewrite" / "report"
    pairs = read_pairs(DatasetSpec(name="a", source=str(report)), "test")
    originals = read_pairs(DatasetSpec(name="a", source="builtin:tiny_world"), "test")
    assert [pair.original_chosen for pair in pairs] == [pair.chosen for pair in originals]
    # Of the three tokens of each text only the begin token is the same.
    assert json.loads((report / "results.json").read_text())["overlap"] == pytest.approx(1 / 9)
    before = artifacts(storage)
    capfd.readouterr()
    assert run_analysis(rewrite, storage) == 0
    assert "1 analyses, 1 complete" in capfd.readouterr().out
    assert artifacts(storage) == before


def test_a_model_writes_a_set_for_each_rewriting_that_is_a_shift_of_the_original(
    tmp_path, mine, endpoint, words
):
    storage = tmp_path / "store"
    prompt = tmp_path / "own.txt"
    prompt.write_text("Text:\n{response}")
    own = ("--prompt", str(prompt), "--language", "fr")
    assert run_analysis(rewrite, storage, *words, "other", *own) == 0
    assert endpoint.requests.total() == 2 * PAIRS
    reader = DatasetReader(Store(storage))
    for name in ("french", "other"):
        spec = DatasetSpec(name=name, source=str(storage / "sweeps" / "rewrite" / "report" / name))
        assert reader.split(spec, "test").rows == PAIRS
        assert reader.rewrites(spec, DatasetSpec(name="mine", source=str(mine)))
        assert read_pairs(spec, "test")[1].chosen == translated(original(1, "chosen"))


def test_what_is_no_rewriting_is_listed_and_more_attempts_go_on(tmp_path, endpoint, words, capfd):
    endpoint.acts[original(3, "chosen")] = ["english"] * 2
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage, *words, "--attempts", "2") == 3
    assert endpoint.requests.total() == 2 * PAIRS + 1
    said = capfd.readouterr().out
    assert "5 of 6 pairs are rewritten" in said
    assert "1 responses have no usable rewriting (row 3, chosen: in en, not fr)" in said
    report = storage / "sweeps" / "rewrite" / "report"
    listed = [json.loads(line) for line in (report / "failures.jsonl").read_text().splitlines()]
    assert listed == [{"row": 3, "side": "chosen", "why": "in en, not fr"}]
    assert len(read_pairs(DatasetSpec(name="a", source=str(report)), "test")) == 5
    assert run_analysis(rewrite, storage, *words, "--attempts", "3") == 0
    assert endpoint.requests.total() == 2 * PAIRS + 2
    assert len(read_pairs(DatasetSpec(name="a", source=str(report)), "test")) == 6


def test_a_run_that_an_endpoint_refuses_goes_on_from_its_journal(tmp_path, endpoint, words, capfd):
    endpoint.acts[original(5, "rejected")] = ["401"]
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage, *words) == 2
    assert "answered 401" in capfd.readouterr().err
    assert artifacts(storage) == {}
    paid = endpoint.paid.total()
    assert run_analysis(rewrite, storage, *words) == 0
    assert paid > 0
    assert set(endpoint.paid.values()) == {1}
    assert endpoint.paid.total() == 2 * PAIRS


def test_bad_rows_are_left_out_and_listed(tmp_path, mine, capfd):
    mine.write_text(mine.read_text() + '\n{"prompt": "p"}\n')
    words = ("--data", str(mine), "--model", "rules:english")
    assert run_analysis(rewrite, tmp_path / "store", *words) == 2
    assert "mine.jsonl, row 6: no column" in capfd.readouterr().err
    assert run_analysis(rewrite, tmp_path / "store", *words, "--skip-bad-rows") == 0
    said = capfd.readouterr().out
    assert f"1 bad rows left out: {mine}, row 6: no column" in said
    assert "6 of 6 pairs are rewritten" in said
    assert run_analysis(rewrite, tmp_path / "store", "plan", *words, "--skip-bad-rows", "--json") == 0
    (planned,) = json.loads(capfd.readouterr().out)
    assert planned["missing"] == []


def test_responses_of_several_turns_are_refused_before_anything_starts(tmp_path, capfd):
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    file = tmp_path / "turns.jsonl"
    file.write_text(json.dumps({"prompt": "why?", "chosen": [answer], "rejected": "no"}))
    words = ("--data", str(file), "--split", "train", "--model", "rules:english")
    assert run_analysis(rewrite, tmp_path / "store", *words) == 2
    assert "pair 0: a response has several turns" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--into", "klingon"), "--into klingon is not one of paraphrase, french"),
        (("--into", "french", "french"), "each once"),
        (("--sample", "0"), "--sample 0"),
        (("--attempts", "0"), "--attempts 0"),
        (("--model", "rules:tiny_world", "--into", "french"), "rules paraphrase only"),
        (("--model", "rules:klingon", "--into", "paraphrase"), "the rules klingon are not one of english"),
        (("--columns", "prompt"), "write MEANING=COLUMN"),
        ((), "set OPENAI_BASE_URL"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(
    tmp_path, words, endpoint, monkeypatch, capfd, flags, said
):
    if not flags:
        monkeypatch.delenv("OPENAI_BASE_URL")
    pairs = zip(words[::2], words[1::2], strict=True)
    usual = [word for flag, value in pairs if flag not in flags for word in (flag, value)]
    assert run_analysis(rewrite, tmp_path / "store", *usual, *flags) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "store").exists()
