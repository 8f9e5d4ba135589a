"""Losses of a pair, against their definitions in plain Python; where a margin comes from, and how its lack is told."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from orchestrator.spec.datasets import DatasetReader
from orchestrator.spec.stages import plan_trial
from orchestrator.store.artifacts import Store
from tests.orchestrator.sweep_samples import base_model, trial
from tests.trainers import gang, naive
from tests.trainers.architectures import SPECS, load_architecture, random_pairs, save_architecture
from tests.trainers.command_line import said
from tests.trainers.digests import content_digest
from tests.trainers.trainings import load
from trainers.data.records import read_written_pairs, write_pairs
from trainers.data.sources import dataset_spec, own_split, read_pairs
from trainers.errors import DataError, SpecError
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import collate, epoch_order, steps_of_epoch
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenFile, held_out, tokenize_pairs, write_tokens
from trainers.rewards import RewardSpec
from trainers.rewards.losses import pair_loss
from trainers.specs import DrawSpec, LossSpec, OptimSpec, ValidationSpec
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


def test_a_type_is_trained_on_the_loss_of_its_rewards_and_the_margins_of_its_pairs(tmp_path):
    save_architecture("llama", tmp_path)
    spec = LossSpec(margin=0.7, centring=0.3)
    pairs = [replace(pair, margin=margin) for pair, margin in zip(random_pairs(), MARGINS, strict=True)]
    with torch.no_grad():
        found = RewardModule(load_architecture(tmp_path, "head"), SPECS["ex_rm"], spec)(collate(pairs))
    rows = zip(found.chosen_P.tolist(), found.rejected_P.tolist(), MARGINS, strict=True)
    assert found.loss_P.tolist() == pytest.approx([by_definition(spec, *row) for row in rows], abs=1e-6)


CONSISTENT = LossSpec(consistency=0.7, label_smoothing=0.1)
TRAINED = {
    "ex_rm": RewardSpec(kind="ex_rm"),
    "im_rm": RewardSpec(kind="im_rm", beta=0.1),
    "im_rm_hybrid": RewardSpec(kind="im_rm_hybrid", beta=0.1),
}
# What is added to a loss does not ask of which type the rewards are.
STAGES = {"ex_rm": (0, 2), "im_rm": (1, 3), "im_rm_hybrid": (0, 1, 2, 3)}
OPTIM = OptimSpec(lr=1e-3, epochs=2, effective_batch=4)
COUNT = 9


def trained_naively(folder, reward):
    """Losses of AdamW on pairs of which every third is a tie, by definition, one pair and its rewriting at a time."""
    pairs = gang.pairs_for(folder, COUNT, ties=True)
    loaded = load(folder, reward.type.output, head_seed=gang.SEED)
    model, losses = naive.plain(loaded), []
    with_others = [one for pair in pairs for one in (pair, pair.rewriting)]
    reference = naive.reference(model, with_others) if reward.uses_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=0)
    for epoch in range(OPTIM.epochs):
        for step in steps_of_epoch(epoch_order(COUNT, gang.SEED, epoch), OPTIM.effective_batch):
            optimizer.zero_grad()
            total = 0.0
            for pair in (pairs[position] for position in step):
                one, other = (
                    torch.stack(naive.rewards(model, reward, [here], reference)[:2])
                    for here in (pair, pair.rewriting)
                )
                delta, wrong = one[0] - one[1], 0.5 if pair.tie else CONSISTENT.label_smoothing
                loss = -(1 - wrong) * logsigmoid(delta) - wrong * logsigmoid(-delta)
                loss = (loss + CONSISTENT.consistency * (one - other).square().sum()).sum() / len(step)
                loss.backward()
                total += loss.item()
            optimizer.step()
            losses.append(total)
    return losses, dict(model.named_parameters())


def test_rewritings_and_ties_train_alike_on_every_placement_and_what_is_saved_loads(tiny_model, tmp_path):
    jobs = [
        gang.Job(
            name=f"{kind}-{zero}",
            model=str(tiny_model),
            out=str(tmp_path / f"{kind}-{zero}"),
            reward={"kind": kind, "beta": reward.beta},
            placement={"zero_stage": zero, "world_size": 2, "forward_tokens": (1, 300, 600, 300)[zero]},
            optim={"lr": OPTIM.lr, "epochs": OPTIM.epochs, "effective_batch": OPTIM.effective_batch},
            pairs=COUNT,
            partitions_all=zero == 3,
            loss={"consistency": CONSISTENT.consistency, "label_smoothing": CONSISTENT.label_smoothing},
            ties=True,
        )
        for kind, reward in TRAINED.items()
        for zero in STAGES[kind]
    ]
    found = gang.launch(jobs, tmp_path / "gang", 2)
    for kind, reward in TRAINED.items():
        losses, weights = trained_naively(tiny_model, reward)
        for zero in STAGES[kind]:
            name = f"{kind}-{zero}"
            assert [row["loss"] for row in found[name]["log"]] == pytest.approx(losses, abs=1e-5), name
            assert {row["pairs"] for row in found[name]["log"]} == {4.0, 1.0}
            saved = dict(load(tmp_path / name / "model", reward.type.output).named_parameters())
            assert saved.keys() == weights.keys()
            for key, weight in weights.items():
                assert (saved[key] - weight).norm() <= 1e-4 * weight.norm(), (name, key)


def rows(tmp_path, columns):
    file = tmp_path / "pairs.jsonl"
    made = [
        {"prompt": f"p{n}", "chosen": "good", "rejected": "bad", **column} for n, column in enumerate(columns)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def test_rewritings_and_ties_are_read_written_and_prepared(tmp_path):
    other = {"rewritten_chosen": "fine", "rewritten_rejected": "poor"}
    file = rows(tmp_path, [other, {}, {**other, "rewritten_rejected": None}, {**other, "margin": 0.0}])
    spec = dataset_spec(str(file))
    pairs = read_pairs(spec, own_split(spec, "train"))
    assert [pair.rewritten for pair in pairs] == [("fine", "poor"), None, None, ("fine", "poor")]
    kept = [*pairs, replace(pairs[1], tie=True)]
    write_pairs(kept, tmp_path / "written")
    assert [*read_written_pairs(tmp_path / "written")] == kept
    assert (
        len({content_digest([pair]) for pair in (pairs[0], kept[-1], replace(pairs[0], rewritten=None))}) == 3
    )
    save_architecture("llama", tmp_path)
    one, two, *_ = made = list(tokenize_pairs(kept, load_tokenizer(str(tmp_path)), DrawSpec())[0])
    assert one.rewriting == replace(two, index=-1, prompt=one.prompt)
    write_tokens([*made, replace(one, index=7)], tmp_path / "tokens")
    assert [*TokenFile(tmp_path / "tokens")] == [*made, replace(one, index=7)]
    assert made[-1].tie
    trained, validated = held_out([*made, *made], ValidationSpec(share=0.5))
    assert [pair.tie for pair in validated] == [False] * 4
    assert len(trained) == 6


def test_a_margin_is_read_written_and_prepared(tmp_path):
    columns = [{"margin": 1.5}, {"score_chosen": 3, "score_rejected": 1}, {"margin": "large"}]
    spec = dataset_spec(str(rows(tmp_path, [*columns, {"margin": float("nan")}])))
    pairs = read_pairs(spec, own_split(spec, "train"))
    assert [pair.margin for pair in pairs] == [1.5, 2.0, None, None]
    write_pairs(pairs, tmp_path / "written")
    assert [*read_written_pairs(tmp_path / "written")] == pairs
    assert content_digest(pairs) != content_digest([replace(pair, margin=None) for pair in pairs])
    tokens = [replace(pair, margin=margin) for pair, margin in zip(random_pairs(), MARGINS, strict=True)]
    without = [*tokens, replace(tokens[0], margin=None)]
    write_tokens(without, tmp_path / "tokens")
    assert [*TokenFile(tmp_path / "tokens")] == without
    assert collate(tokens).margin_P.tolist() == [*MARGINS]
    assert collate(without).margin_P is None


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
    assert found.without_rewriting == 3
    with pytest.raises(DataError, match="3 of 3 rows have no rewriting"):
        plan_trial(replace(spec, loss=LossSpec(consistency=0.5)), base, found, ())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ex_rm --margin 0.5", "data set pairs: 2 of 3 rows have no margin"),
        ("ex_rm --consistency 0.5", "data set pairs: 3 of 3 rows have no rewriting, which --consistency 0.5"),
        ("ex_grm --loss hinge", "ex_grm has a loss of its own"),
        ("ex_rm --ties --loss ipo", "--ties and --loss ipo"),
        ("ex_rm --columns margin=gap", "no column 'gap'"),
        ("ex_rm --label-smoothing 0.5", "--label-smoothing 0.5 is not in"),
    ],
)
def test_a_loss_that_cannot_be_is_told_before_a_training(tmp_path, capsys, words, message):
    file = rows(tmp_path, [{"margin": 1.5}, {}, {}])
    given = ["--model", "none", "--data", file, "--out", tmp_path / "out", "--reward", *words.split()]
    code, _, error = said(given, capsys, (Train, run, "trainers.train"))
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("reward", "loss", "ties", "message"),
    [
        ("ex_grm", LossSpec(), True, "ex_grm has a loss of its own"),
        ("ex_rm", LossSpec(margin=0.5), True, r"--ties and --margin 0\.5"),
    ],
)
def test_a_trial_takes_no_loss_that_it_cannot_have(reward, loss, ties, message):
    train_set = replace(trial().train_set, ties=ties)
    with pytest.raises(SpecError, match=message):
        trial(reward=RewardSpec(kind=reward), loss=loss, train_set=train_set)
    mixture = replace(train_set, ties=False, mixture=((train_set, 0.5), (trial().train_set, 0.5)))
    with pytest.raises(SpecError, match=message):
        trial(reward=RewardSpec(kind=reward), loss=loss, train_set=mixture)
