"""sweeps/hidden_representations.py at its smallest: the statistics are those of the model's own hidden states."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sweeps import hidden_representations
from tests.sweep_runs import artifacts, run_analysis
from trainers.data import worlds
from trainers.models.tiny import build_tokenizer
from trainers.pairs.tokens import draw_order
from trainers.specs import DrawSpec


def last_states(model, tokenizer, pairs, side):
    """By transformers alone, one whole conversation at a time."""
    rows = []
    for pair in pairs:
        text = worlds.chat_text(pair.prompt[0].content, getattr(pair, side))
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            rows.append(model.model(input_ids=ids).last_hidden_state[0, -1])
    return torch.stack(rows)


def test_the_statistics_are_those_of_the_untrained_models_last_hidden_states(tiny_model, tmp_path):
    words = ("--models", str(tiny_model), "--max-train-pairs", "3", "--eval-sets", "tiny_world")
    assert run_analysis(hidden_representations, tmp_path / "store", *words) == 0
    (folder,) = artifacts(tmp_path / "store").values()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    tokenizer = build_tokenizer()
    train, test = (worlds.tiny_pairs(split) for split in ("train", "test"))
    drawn = [train[row] for row in draw_order(len(train), DrawSpec(max_pairs=3))[:3]]
    seen, unseen = (
        last_states(model, tokenizer, pairs, "chosen") - last_states(model, tokenizer, pairs, "rejected")
        for pairs in (drawn, test)
    )
    products = (seen @ unseen.T).flatten()
    found = json.loads((folder / "results.json").read_text())["tiny_world"]["inner_product"]
    assert found["n"] == 3 * 40
    assert found["mean"] == pytest.approx(float(products.mean()), rel=1e-5)
    assert found["min"] == pytest.approx(float(products.min()), rel=1e-5)
    assert found["share_positive"] == float((products > 0).double().mean())
    assert "cos(w, D_unseen)" in (folder / "summary.md").read_text()


def test_the_flags_of_a_grids_report_are_refused(tmp_path, capsys):
    assert run_analysis(hidden_representations, tmp_path, "report", "--ensemble", "--price", "2") == 2
    assert "--ensemble, --price: an analysis has no trials" in capsys.readouterr().err
