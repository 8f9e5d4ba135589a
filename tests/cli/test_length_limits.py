"""Two models whose tokenizers differ, and pairs that are too long for one of them: plan, table, summary and trials say so."""

import json
from pathlib import Path

import pytest

from orchestrator.spec import catalog
from sweeps.full_grid import full_grid
from tests.conftest import save_tiny_llama
from tests.orchestrator.sweep_samples import write_jsonl
from tests.sweep_runs import run_sweep, trial_rows
from trainers.models.tiny import build_tokenizer


@pytest.fixture
def words(tmp_path: Path, tiny_model: Path) -> tuple[str, ...]:
    """A sweep of a model of words and one of letters, on 20 + 20 pairs of which 10 + 10 have 60 letters."""
    from tokenizers import Regex, pre_tokenizers

    letters = build_tokenizer()
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    save_tiny_llama(tmp_path / "letters", letters, seed=0, tied=True)
    for split in ("train", "test"):
        rows = [
            {"prompt": f"{split} {number}", "chosen": "good " * (12 if number % 2 else 2), "rejected": "bad"}
            for number in range(20)
        ]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    data = str(tmp_path / "data")
    flags = ["--models", f"words={tiny_model}", f"letters={tmp_path / 'letters'}", "--train-sets", data]
    flags += ["--eval-sets", data, "--seeds", "0", "--epochs", "1", "--rewards", "ex_rm"]
    return (*flags, "--max-response-tokens", "40")


def test_what_is_left_out_for_length_is_said_before_and_after(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    storage = tmp_path / "store"
    for planned in ("before", "after"):
        assert run_sweep("full_grid", full_grid, catalog.PROFILES, storage, "plan", *words) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "or --max-response-tokens 40, left out: 10 of 20 pairs of data/train for letters" in said, (
            planned
        )
        assert "10 of 20 pairs of data/test for letters" in said, planned
        if planned == "before":
            assert run_sweep("full_grid", full_grid, catalog.PROFILES, storage, *words) == 0
            ran = capsys.readouterr().out
    summary = (storage / "sweeps" / "full_grid" / "report" / "summary.md").read_text()
    for text in (ran, summary):
        assert (
            "eft out for length, trained on data: 0 of 20 pairs for words, 10 of 20 pairs for letters" in text
        )
        assert "compared on the 10 pairs that all have (words has 20, letters has 10)" in text
    found = {row["model"]: row for row in trial_rows(storage, "full_grid")}
    assert (found["letters"]["n"], found["letters"]["left_out"], found["words"]["n"]) == (10, 10, 20)
    assert json.loads(found["words"]["parameters"])["max_response_tokens"] == 40
