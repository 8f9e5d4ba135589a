"""sweeps/best_of_n.py at its smallest: answers are drawn once, every reward model picks among them, a judge says what picks are worth."""

import json
import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from orchestrator import open_sweep
from orchestrator.spec.datasets import pairs_of
from orchestrator.store.artifacts import WEIGHTS, Store
from sweeps import best_of_n
from tests.sweep_runs import artifacts, run_analysis, trial_rows
from trainers.evaluate.sampling import read_answers
from trainers.evaluate.scores import read_pair_scores

EX_RM = "small · ex_rm · tiny_world · s0"
SMALL = (
    *("--train-sets", "tiny_world", "--eval-sets", "tiny_world_candidates", "--max-prompts", "5"),
    *("--max-train-pairs", "16", "--max-eval-pairs", "8", "--seeds", "0", "--lr", "1e-3", "--epochs", "20"),
    *("--profile", "laptop", "--backend", "inline"),
)


def run(storage: Path, model: Path, *words: str, name="best_of_n", samples=6, tokens=3) -> int:
    common = ("--models", f"small={model}", *SMALL, "--samples", str(samples))
    common = (*common, "--max-new-tokens", str(tokens), "--name", name)
    return run_analysis(best_of_n, storage, *words, *common, draws=False)


@pytest.fixture
def copy(storage, tmp_path) -> Path:
    """A copy of the storage, to be changed."""
    return shutil.copytree(storage, tmp_path / "store")


def trials_of(storage: Path) -> dict[str, dict]:
    declared = json.loads((storage / "sweeps/best_of_n/sweep.json").read_text())["trials"]
    return {item["name"]: item for item in declared}


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best_of_n") / "store"
    assert run(folder, tiny_model) == 0
    return folder


def test_a_plan_counts_the_hours_of_drawing_until_it_is_done(storage, tiny_model, capsys):
    hours = []
    for folder, tokens in ((storage.parent / "new", 3), (storage.parent / "new", 30003), (storage, 3)):
        capsys.readouterr()
        assert run(folder, tiny_model, "plan", "--json", tokens=tokens) == 0
        hours.append(json.loads(capsys.readouterr().out)["device_hours"])
    short, long, done = hours
    # Each token takes 10 ms and more, in one batch.
    assert long - short > 30000 * 0.01 / 3600
    assert done == 0


def the_sample(store: Store) -> str:
    (manifest,) = (store.root / "artifacts" / "sample").glob("*/manifest.json")
    return manifest.parent.name


def by_text(store: Store, sample: str, trial: str) -> dict:
    """The rewards that a trial gives to answers, by prompt and text."""
    (scored,) = trials_of(store.root)[trial]["answers"]
    scores = read_pair_scores(store.read("evaluate", scored) / "scores.parquet")
    known, pairs = {}, pairs_of(store, sample)
    for row, high, low in zip(scores.index, scores.chosen, scores.rejected, strict=True):
        known[pairs[row].prompt, pairs[row].chosen] = high
        known[pairs[row].prompt, pairs[row].rejected] = low
    return known


def test_the_curve_is_that_of_every_subset_of_the_answers(copy, tiny_model):
    store, key = Store(copy), the_sample(Store(copy))
    assert run(copy, tiny_model, "--gold", EX_RM, name="gold") == 0
    answers = read_answers(store.read("sample", key) / "answers.jsonl")
    assert [len(item.texts) for item in answers] == [6] * 5
    rows = open_sweep(copy, "gold").best_of_n()
    rows = rows[rows["evaluation_set"] == "answers of small to tiny_world_candidates"]
    # A trial that is gold is no proxy of itself.
    assert set(rows["reward"]) == {"IM-RM"}
    assert rows["n"].to_list() == [1, 2, 4, 6]
    gold, proxy = by_text(store, key, EX_RM), by_text(store, key, EX_RM.replace("ex_rm", "im_rm"))
    every = np.array([gold[item.prompt, text] for item in answers for text in item.texts])
    for n, row in zip((1, 2, 4, 6), rows.to_dict("records"), strict=True):
        picks = []
        for item in answers:
            for drawn in combinations(item.texts, n):
                best = max(proxy[item.prompt, text] for text in drawn)
                tied = [gold[item.prompt, text] for text in drawn if proxy[item.prompt, text] == best]
                picks.append(np.mean(tied))
        assert row["quality"] == pytest.approx((np.mean(picks) - every.mean()) / every.std(), abs=1e-6)
        assert row["kl"] == pytest.approx(np.log(n) - (n - 1) / n)


def test_the_report_has_the_curves_and_no_accuracy_of_answers(storage):
    (folder,) = (storage / "sweeps" / "best_of_n" / "report" / "analyses").iterdir()
    said = (folder / "summary.md").read_text()
    assert "RL is out of scope" in said
    assert "arXiv 2401.01879" in said
    assert "Reward margins and reward variance" in said
    assert (folder / "variance.parquet").is_file()
    assert (folder / "figures" / "best_of_n.png").stat().st_size > 1000
    sets = {row["evaluation_set"] for row in trial_rows(storage, "best_of_n")}
    assert sets == {"tiny_world_candidates"}


def test_what_reads_the_sweep_needs_none_of_its_flags(storage, capsys):
    for command in ("status", "report", "gc"):
        assert run_analysis(best_of_n, storage, command, draws=False) == 0
    said = capsys.readouterr().out
    assert "artifacts/" not in said
    assert "Best of n by each reward" in said


def test_again_nothing_is_computed_and_what_was_lost_is_drawn_again_as_it_was(storage, copy, tiny_model):
    store = Store(copy)
    key = the_sample(store)
    before = {
        name: (store.read("sample", key) / name).read_bytes() for name in ("answers.jsonl", "pairs.jsonl")
    }
    assert run(copy, tiny_model) == 0
    assert artifacts(copy).keys() == artifacts(storage).keys()
    assert len(list(copy.glob("artifacts/train/*"))) == 2
    # Without the answers and what was made of them.
    for kind in ("sample", "analyse", "prepare", "evaluate"):
        shutil.rmtree(copy / "artifacts" / kind)
    assert run(copy, tiny_model) == 0
    store = Store(copy)
    assert {name: (store.read("sample", key) / name).read_bytes() for name in before} == before
    assert not list((copy / "checkpoints").glob("*"))


def test_a_lost_score_of_the_answers_is_a_hole_that_the_next_run_mends(copy, tiny_model):
    (scored,) = trials_of(copy)[EX_RM]["answers"]
    shutil.rmtree(copy / "artifacts" / "evaluate" / scored)
    assert list(open_sweep(copy, "best_of_n").failed()) == [EX_RM]
    assert run(copy, tiny_model) == 0
    assert open_sweep(copy, "best_of_n").failed() == {}


def test_a_gold_reward_model_from_its_folder_agrees_with_the_trial_that_made_it(copy, tiny_model):
    folder = Store(copy).read(WEIGHTS, trials_of(copy)[EX_RM]["key"]) / "model"
    assert run(copy, tiny_model, "--gold", f"gold={folder}", name="gold") == 0
    assert len(list(copy.glob("artifacts/sample/*"))) == 1
    rows = open_sweep(copy, "gold").best_of_n()
    rows = rows[rows["evaluation_set"].str.startswith("answers")]
    assert rows[rows["n"] == 1]["quality"].to_list() == pytest.approx([0.0, 0.0], abs=1e-6)
    itself = rows[rows["reward"] == "EX-RM"]
    assert itself["quality"].to_list() == pytest.approx(itself["best"].to_list(), abs=1e-6)
    assert itself["quality"].is_monotonic_increasing


@pytest.mark.slow
def test_a_real_model_answers_sums_and_both_its_reward_models_pick(smollm2, smollm2_storage, tmp_path):
    storage, file = tmp_path / "store", tmp_path / "sums.jsonl"
    shutil.copytree(smollm2_storage, storage, copy_function=os.link)
    rows = [
        {"prompt": f"What is {n} + 9?", "chosen": f"{n} + 9 = {n + 9}", "rejected": f"{n} + 9 = {n}"}
        for n in range(10, 22)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--models", f"smollm2={smollm2}", "--train-sets", str(file), "--eval-sets", str(file)]
    words += ["--test-share", "0.3", "--verifier", "arithmetic", "--max-prompts", "2", "--samples", "8"]
    words += ["--max-new-tokens", "12", "--epochs", "3", "--lr", "5e-5", "--effective-batch", "4"]
    assert run_analysis(best_of_n, storage, *words, "--seeds", "0", "--backend", "inline", draws=False) == 0
    answers = read_answers(Store(storage).read("sample", the_sample(Store(storage))) / "answers.jsonl")
    assert [len(item.texts) for item in answers] == [8, 8]
    assert any("+ 9 = " in text for item in answers for text in item.texts)
    found = open_sweep(storage, "best_of_n").best_of_n()
    found = found[found["evaluation_set"] == "answers of smollm2 to sums"]
    assert [*found["n"]] == [1, 2, 4, 8] * 2
    assert (found["quality"] <= found["best"] + 1e-9).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--verifier", "hamiltonian"), "does not know 240 prompts of tiny_world_candidates"),
        (("--verifier", "hamiltonain"), "did you mean hamiltonian?"),
        (("--best-of", "2", "32"), "give --samples 32"),
        (("--samples", "1"), "--samples 1: at least 2, to choose among."),
        (("--gold", "small · ex_rm · tiny_world · s9"), "did you mean small · ex_rm · tiny_world · s0 or"),
        (("--gold", "MODEL"), "is of no sequence classifier"),
        (("--verifier", "tiny_world", "--gold", "MODEL"), "give one of them"),
        (("--policy", "MUTE"), "GenerationConfig(eos_token_id=N).save_pretrained"),
        (("--prompts", "ultrafeedback"), "give --gold with a reward model"),
        (("--engine", "vllm"), "vllm is not installed here"),
        (("--engine", "vllm", "--temperature", "3"), "vLLM takes 2 at most"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_before_anything_starts(tiny_model, tmp_path, capsys, words, said):
    shutil.copytree(tiny_model, tmp_path / "mute", ignore=shutil.ignore_patterns("generation_config.json"))
    places = {"MODEL": str(tiny_model), "MUTE": str(tmp_path / "mute")}
    samples = 1 if "--samples" in words else 6
    words = [places.get(word, word) for word in words if samples > 1]
    assert run(tmp_path / "store", tiny_model, *words, samples=samples) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("store/artifacts/train/*"))
