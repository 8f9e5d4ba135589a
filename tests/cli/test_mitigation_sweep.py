"""sweeps/mitigation.py at its smallest: copies enter the key by their rows, and every point of the curve is there."""

from dataclasses import replace

import pytest
from pyarrow import parquet

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.spec.resolve import resolve
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from sweeps import mitigation
from tests.sweep_runs import run_sweep, trial_rows
from trainers.data import worlds
from trainers.data.sources import read_pairs
from trainers.specs import Augmentation, DatasetSpec

ORIGINAL = DatasetSpec(name="tiny_world", source="builtin:tiny_world")


def copies(share):
    added = Augmentation(source="builtin:tiny_world_reworded", split="train", share=share)
    return DatasetSpec(name=f"share_{share}", source=ORIGINAL.source, augmentation=added)


def test_copies_are_added_to_the_training_pairs_and_to_no_other():
    original, reworded = worlds.tiny_pairs("train"), worlds.reworded_pairs("train")
    assert read_pairs(copies(1.0), "train") == original + reworded
    quarter, half = (read_pairs(copies(share), "train")[80:] for share in (0.25, 0.5))
    assert (len(quarter), len(half)) == (20, 40)
    assert [pair for pair in half if pair in quarter] == quarter
    assert all(pair in reworded for pair in half)
    assert read_pairs(copies(1.0), "test") == worlds.tiny_pairs("test")


def test_no_word_of_the_other_rewriting_tells_right_from_wrong_in_what_is_trained_on():
    trained = [*worlds.tiny_pairs("train"), *worlds.reworded_pairs("train")]
    known = {word for pair in trained for word in f"{pair.chosen} {pair.rejected}".split()}
    for pair in worlds.other_words_pairs("test"):
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        assert chosen[0] == rejected[0]
        assert not {chosen[1], rejected[1]} & known


def test_a_share_can_be_run_alone():
    chosen = session.select(Options(only=("copies=0.5",)), mitigation.PROFILES["laptop"], "demo")
    made = mitigation.mitigation(chosen).trials
    assert {dict(trial.axes)["copies"] for trial in made} == {0.5}


def test_the_report_has_the_accuracy_of_each_share_on_the_other_rewriting(tiny_model, tmp_path):
    words = ("--models", str(tiny_model), "--epochs", "8", "--lr", "1e-2", "--only", "reward=im_rm")
    draws = ("--seeds", "0", "--max-train-pairs", "8", "--effective-batch", "8", "--max-eval-pairs", "6")
    build, profiles = mitigation.mitigation, mitigation.PROFILES
    assert run_sweep("mitigation", build, profiles, tmp_path / "store", *words, *draws) == 0
    report = tmp_path / "store" / "sweeps" / "mitigation" / "report"
    table = parquet.read_table(report / "tables" / "by_copies.parquet").to_pylist()
    rows = trial_rows(tmp_path / "store", "mitigation")
    other = "tiny_world_other_words"
    shifted = {row["reward"]: row["accuracy"] for row in rows if row["evaluation_set"] == other}
    points = {
        f"im_rm_copies={float(row['copies']):g}": row["accuracy"]
        for row in table
        if row["category"] == "token-level shift"
    }
    assert points == pytest.approx(shifted)
    assert len(points) == len(mitigation.SHARES)
    categories = {(row["evaluation_set"], row["category"]) for row in rows}
    assert categories == {("tiny_world", "in-distribution"), (other, "token-level shift")}


def test_without_copies_the_key_is_that_of_the_plain_set(tiny_model, tmp_path):
    options = Options(models=(str(tiny_model),), seeds=(0,))
    sweep = mitigation.mitigation(session.select(options, mitigation.PROFILES["laptop"], "keys"))
    keys = {plan.spec.name: plan.key for plan in resolve(sweep, Store(tmp_path)).plans}
    assert len(set(keys.values())) == 2 * len(mitigation.SHARES)
    (plain,) = (item for item in sweep.trials if item.train_set == ORIGINAL and item.reward.kind == "im_rm")
    alone = Sweep(name="alone", trials=(replace(plain, eval_sets=(ORIGINAL,), axes=()),))
    assert resolve(alone, Store(tmp_path)).plans[0].key == keys[plain.name]
