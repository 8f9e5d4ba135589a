"""sweeps/rewrite.py: rules in seconds, a tiny model, what is asked again, and a run that is cut off goes on."""

import json
from collections import Counter

import pytest

from orchestrator.spec.datasets import DatasetReader
from orchestrator.store.artifacts import Store
from sweeps import rewrite
from tests.sweep_runs import artifacts, run_analysis
from trainers.data import hygiene, local_rewriting
from trainers.data.journal import Journal
from trainers.data.sources import read_pairs
from trainers.errors import OutOfMemory
from trainers.specs import DatasetSpec

PAIRS = 6
LONG = "and it is longer than what can be said in six tokens."
ROWS = [
    {"prompt": f"p{n}", "chosen": f"Answer {n} is good, {LONG}", "rejected": f"Answer {n} is bad, {LONG}"}
    for n in range(PAIRS)
]


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch):
    """Seconds a store, and what it shows is tested with the other analyses."""
    monkeypatch.setattr("orchestrator.cli.analyses._show_in_mlflow", lambda *_: None)


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture
def asked(monkeypatch):
    """How often each answer was generated, by the name of its draw; answers are taken as they come."""
    names: Counter[int] = Counter()
    generate = local_rewriting.generate

    def counting(model, prompts, **more):
        answers = generate(model, prompts, **more)
        names.update(more["names"])
        return [[answer or [5]] for (answer,) in answers]

    monkeypatch.setattr(local_rewriting, "generate", counting)
    monkeypatch.setattr(local_rewriting, "_BATCH_CPU", 4)
    monkeypatch.setattr(hygiene, "fault", lambda original, answer, **more: None if answer else "empty")
    return names


@pytest.fixture
def words(mine, tiny_model):
    return "--data", str(mine), "--model", f"tiny={tiny_model}", "--max-tokens", "6"


def test_the_tiny_world_is_rewritten_by_rule_and_only_once(tmp_path, capfd):
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage) == 0
    report = storage / "sweeps" / "rewrite" / "report"
    pairs = read_pairs(DatasetSpec(name="a", source=str(report)), "test")
    originals = read_pairs(DatasetSpec(name="a", source="builtin:tiny_world"), "test")
    assert [pair.original_chosen for pair in pairs] == [pair.chosen for pair in originals]
    assert json.loads((report / "results.json").read_text())["overlap"] < 0.1
    before = artifacts(storage)
    capfd.readouterr()
    assert run_analysis(rewrite, storage) == 0
    assert "1 analyses, 1 complete" in capfd.readouterr().out
    assert artifacts(storage) == before


def test_a_model_writes_a_set_for_each_rewriting_that_is_a_shift_of_the_original(
    tmp_path, mine, asked, words
):
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage, *words, "--rewriting", "paraphrase", "french") == 0
    assert asked.total() == 2 * 2 * PAIRS
    reader = DatasetReader(Store(storage))
    original = DatasetSpec(name="mine", source=str(mine))
    texts = set()
    for name in ("paraphrase", "french"):
        folder = storage / "sweeps" / "rewrite" / "report" / f"tiny-{name}"
        spec = DatasetSpec(name=name, source=str(folder))
        assert reader.split(spec, "test").rows == PAIRS
        assert reader.rewrites(spec, original)
        texts.add(tuple(pair.chosen for pair in read_pairs(spec, "test")))
        hygienic = (folder / "hygiene.jsonl").read_text().splitlines()
        assert len(hygienic) == 2 * PAIRS
    assert len(texts) == 2


def test_an_interrupted_run_goes_on_and_generates_nothing_twice(tmp_path, asked, words, monkeypatch):
    counting = local_rewriting.generate
    batches = 0

    def cut_off(model, prompts, **more):
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return counting(model, prompts, **more)

    storage = tmp_path / "store"
    monkeypatch.setattr(local_rewriting, "generate", cut_off)
    assert run_analysis(rewrite, storage, *words) == 130
    assert (asked.total(), artifacts(storage)) == (8, {})
    (journal,) = (storage / "rewritings").glob("*.jsonl")
    assert len(Journal(journal).all()) == 8
    # As a process leaves it that is killed while it writes.
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole) + whole[0][:30])
    assert run_analysis(rewrite, storage, *words) == 0
    assert set(asked.values()) == {1}
    assert asked.total() == 2 * PAIRS
    (interrupted,) = artifacts(storage).values()
    assert run_analysis(rewrite, tmp_path / "other", *words) == 0
    (through,) = artifacts(tmp_path / "other").values()
    assert (interrupted / "hygiene.jsonl").read_text() == (through / "hygiene.jsonl").read_text()


def test_what_is_no_rewriting_is_asked_for_again_then_listed_and_more_attempts_go_on(
    tmp_path, asked, words, monkeypatch, capfd
):
    def fault(original, answer, **more):
        return "unchanged" if original == ROWS[3]["chosen"] else None

    monkeypatch.setattr(hygiene, "fault", fault)
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage, *words, "--attempts", "2") == 3
    assert asked.total() == 2 * PAIRS + 1
    said = capfd.readouterr().out
    assert "5 of 6 pairs are rewritten" in said
    assert "1 responses have no usable rewriting (row 3, chosen: unchanged)" in said
    report = storage / "sweeps" / "rewrite" / "report"
    listed = [json.loads(line) for line in (report / "failures.jsonl").read_text().splitlines()]
    assert listed == [{"row": 3, "side": "chosen", "why": "unchanged"}]
    assert len(read_pairs(DatasetSpec(name="a", source=str(report)), "test")) == 5
    monkeypatch.setattr(hygiene, "fault", lambda *texts, **more: None)
    assert run_analysis(rewrite, storage, *words, "--attempts", "3") == 0
    assert asked.total() == 2 * PAIRS + 2
    assert set(asked.values()) == {1}


def test_a_model_of_random_weights_rewrites_nothing_and_the_command_says_so(tmp_path, words, capfd):
    storage = tmp_path / "store"
    assert run_analysis(rewrite, storage, *words, "--attempts", "2") == 3
    assert "0 of 6 pairs are rewritten." in capfd.readouterr().out
    ((_, folder),) = artifacts(storage).items()
    assert not (folder / "test.parquet").exists()
    assert len((folder / "failures.jsonl").read_text().splitlines()) == 2 * PAIRS


def test_batches_that_do_not_fit_are_halved(tmp_path, asked, words, monkeypatch):
    counting, sizes = local_rewriting.generate, []

    def small(model, prompts, **more):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise OutOfMemory("too many at once")
        return counting(model, prompts, **more)

    monkeypatch.setattr(local_rewriting, "generate", small)
    assert run_analysis(rewrite, tmp_path / "store", *words, "--sample", "2") == 0
    assert sizes == [4, 2, 1, 1, 1, 1]


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
        (("--rewriting", "klingon"), "--rewriting klingon is not one of paraphrase, french"),
        (("--rewriting", "french", "french"), "each once"),
        (("--temperature", "0"), "gives the same answer each of 3 times"),
        (("--temperature", "nan"), "give 0 or a positive number"),
        (("--sample", "0"), "--sample 0"),
        (("--attempts", "0"), "--attempts 0"),
        (("--model", "rules:tiny_world", "--rewriting", "french"), "rules paraphrase only"),
        (("--model", "rules:klingon"), "the rules klingon are not one of english"),
        (("--model", "./gone"), "no such file or folder"),
        (("--columns", "prompt"), "write MEANING=COLUMN"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(tmp_path, words, capfd, flags, said):
    pairs = zip(words[::2], words[1::2], strict=True)
    usual = [word for flag, value in pairs if flag not in flags for word in (flag, value)]
    assert run_analysis(rewrite, tmp_path / "store", *usual, *flags) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "store").exists()
