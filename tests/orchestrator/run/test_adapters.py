"""A sweep whose trials train adapters: they are scored on the sweep's own base model, and are other trainings."""

import json
from dataclasses import replace

import pytest

from orchestrator.spec import catalog
from orchestrator.spec.stages import ConvertStage
from orchestrator.store.artifacts import Store
from tests.conftest import save_tiny_llama
from tests.orchestrator.sweep_samples import plan, trial
from tests.sweep_runs import SMALL, run_sweep, trial_rows
from trainers.errors import SpecError
from trainers.models.tiny import build_tokenizer
from trainers.specs import LoraSpec, OptimSpec


def adapted(chosen):
    return chosen.sweep([replace(found, lora=LoraSpec(rank=2)) for found in chosen.trials()])


def test_an_adapter_is_trained_and_scored(tmp_path):
    save_tiny_llama(tmp_path / "tiny", build_tokenizer(), seed=0, tied=True)
    words = ("--models", str(tmp_path / "tiny"), *SMALL, "--lr", "1e-2")
    profiles = {**catalog.PROFILES, "laptop": catalog.ONE_MODEL}
    assert run_sweep("adapted", adapted, profiles, tmp_path / "store", *words) == 0
    rows = trial_rows(tmp_path / "store", "adapted")
    assert {(row["reward"], row["evaluated"]) for row in rows} == {("ex_rm", True), ("im_rm", True)}
    for key in {row["key"] for row in rows}:
        model = Store(tmp_path / "store").read("weights", key) / "model"
        assert not (model / "config.json").exists()
        assert json.loads((model / "adapter_config.json").read_text())["r"] == 2


def test_an_adapter_is_another_training_and_needs_its_base_model():
    whole, lora = trial(), LoraSpec(rank=2)
    assert plan(whole).key == plan(replace(whole, lora=None)).key
    assert len({plan(replace(whole, lora=item)).key for item in (None, lora, LoraSpec(rank=3))}) == 3
    origin = ConvertStage(file="tiny.gguf", digest="digest", name="tiny")
    needs = [plan(replace(whole, lora=item), origin=origin).evaluations[0].needs for item in (None, lora)]
    assert [origin in found for found in needs] == [False, True]


def test_an_adapter_beside_frozen_parts_is_refused_in_a_trial():
    with pytest.raises(SpecError, match="--freeze backbone and --lora-rank 2"):
        trial(lora=LoraSpec(rank=2), optim=OptimSpec(freeze=("backbone",)))
