"""Losses of a pair, against their definitions in plain Python; where a margin comes from, and how its lack is told."""

import itertools
import json
import math
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.stages import plan_trial
from orchestrator.store.artifacts import Store
from tests.orchestrator.sweep_samples import base_model, trial
from tests.trainers.architectures import SPECS, load_architecture, random_pairs, save_architecture
from trainers.command import command
from trainers.data.records import content_digest, read_written_pairs, write_pairs
from trainers.data.sources import dataset_spec, own_split, read_pairs
from trainers.errors import DataError, SpecError
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import collate
from trainers.pairs.tokens import read_tokens, write_tokens
from trainers.rewards import RewardSpec
from trainers.rewards.losses import pair_loss
from trainers.specs import LossSpec
from trainers.train.__main__ import Train, run

KINDS = ("bradley_terry", "hinge", "ipo")
CHOSEN, REJECTED, MARGINS = (2.0, -1.0, 0.25, 30.0), (1.5, 3.0, 0.25, -31.0), (0.5, 2.0, 0.0, 1.0)


def by_definition(spec, chosen, rejected, margin):
    def of(delta):
        if spec.kind == "bradley_terry":
            # −ln σ(Δ), without overflow.
            return math.log1p(math.exp(-abs(delta))) + max(-delta, 0)
        return max(0, 1 - delta) if spec.kind == "hinge" else (delta - 0.5) ** 2

    delta = chosen - rejected - spec.margin * margin
    smoothed = (1 - spec.label_smoothing) * of(delta) + spec.label_smoothing * of(-delta)
    return smoothed + spec.centring * (chosen + rejected) ** 2


@pytest.mark.parametrize(
    "spec",
    [
        LossSpec(kind=kind, margin=margin, label_smoothing=smoothing, centring=centring)
        for kind, margin, smoothing, centring in itertools.product(KINDS, (0.0, 0.7), (0.0, 0.1), (0.0, 0.3))
    ],
    ids=str,
)
def test_a_loss_is_its_definition_in_float64(spec):
    values = [torch.tensor(side, dtype=torch.float64) for side in (CHOSEN, REJECTED, MARGINS)]
    expected = [by_definition(spec, *row) for row in zip(CHOSEN, REJECTED, MARGINS, strict=True)]
    assert pair_loss(values[0], values[1], spec, values[2]).tolist() == pytest.approx(expected, abs=1e-9)


def test_the_loss_is_applied_to_the_rewards_of_a_type_with_the_margins_of_its_pairs(tmp_path):
    save_architecture("llama", tmp_path)
    spec = LossSpec(margin=0.7, label_smoothing=0.1, centring=0.3)
    pairs = [replace(pair, margin=margin) for pair, margin in zip(random_pairs(), MARGINS, strict=True)]
    model, reward = load_architecture(tmp_path, "head"), SPECS["ex_rm"]
    with torch.no_grad():
        found = RewardModule(model, reward, spec)(collate(pairs))
        plain = RewardModule(model, reward)(collate(pairs))
    assert found.chosen_P.tolist() == plain.chosen_P.tolist()
    rows = zip(found.chosen_P.tolist(), found.rejected_P.tolist(), MARGINS, strict=True)
    assert found.loss_P.tolist() == pytest.approx([by_definition(spec, *row) for row in rows], abs=1e-6)


def rows(tmp_path, columns):
    file = tmp_path / "pairs.jsonl"
    made = [
        {"prompt": f"p{n}", "chosen": "good", "rejected": "bad", **column} for n, column in enumerate(columns)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def test_a_margin_is_read_written_and_prepared(tmp_path):
    file = rows(
        tmp_path,
        [
            {"margin": 1.5},
            {"score_chosen": 3, "score_rejected": 1},
            {"margin": "large"},
            {"margin": float("nan")},
        ],
    )
    spec = dataset_spec(str(file))
    pairs = read_pairs(spec, own_split(spec, "train"))
    assert [pair.margin for pair in pairs] == [1.5, 2.0, None, None]
    write_pairs(pairs, tmp_path / "written")
    assert [*read_written_pairs(tmp_path / "written")] == pairs
    assert content_digest(pairs) != content_digest([replace(pair, margin=None) for pair in pairs])
    tokens = [replace(pair, margin=margin) for pair, margin in zip(random_pairs(), MARGINS, strict=True)]
    write_tokens([*tokens, replace(tokens[0], margin=None)], tmp_path / "tokens")
    assert [pair.margin for pair in read_tokens(tmp_path / "tokens")] == [*MARGINS, None]
    assert collate(tokens).margin_P.tolist() == [*MARGINS]
    assert collate([*tokens, replace(tokens[0], margin=None)]).margin_P is None


def test_rows_without_a_margin_are_counted_before_a_sweep_starts(tmp_path):
    file = rows(tmp_path, [{"margin": 1.5}, {}, {}])
    found = DatasetReader(Store(tmp_path / "store")).split(dataset_spec(str(file)), "train")
    spec, base = trial(loss=LossSpec(margin=0.5), eval_sets=()), base_model()
    with pytest.raises(
        DataError, match=r"data set pairs: 2 of 3 rows have no margin, which --margin 0\.5 needs"
    ):
        plan_trial(spec, base, found, ())
    whole = plan_trial(spec, base, replace(found, without_margin=0), ())
    assert whole.train.loss == LossSpec(margin=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ex_rm", "--margin", "0.5"], "data set pairs: 2 of 3 rows have no margin"),
        (["ex_grm", "--loss", "hinge"], "ex_grm has a loss of its own"),
        (["ex_rm", "--label-smoothing", "0.5"], "--label-smoothing 0.5 is not in"),
    ],
)
def test_a_loss_that_cannot_be_is_told_before_a_training(tmp_path, capsys, words, message):
    file = rows(tmp_path, [{"margin": 1.5}, {}, {}])
    command_line = [
        "train",
        "--model",
        "none",
        "--data",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--reward",
        *words,
    ]
    with mock.patch.object(sys, "argv", command_line), pytest.raises(SystemExit) as ended:
        command(Train, run, "trainers.train", models=False)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_trial_whose_reward_type_has_a_loss_of_its_own_takes_no_other():
    with pytest.raises(SpecError, match="ex_grm has a loss of its own"):
        trial(reward=RewardSpec(kind="ex_grm"), loss=LossSpec(kind="hinge"))
