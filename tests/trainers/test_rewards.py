"""Properties of rewards, reference sums, saved reward models, and metrics."""

import dataclasses
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers import naive
from tests.trainers.architectures import (
    NO,
    SPECS,
    YES,
    load_architecture,
    load_untrained,
    random_pairs,
    save_architecture,
)
from tests.trainers.trainings import load
from trainers import rewards
from trainers.errors import SpecError
from trainers.evaluate import metrics, scoring
from trainers.evaluate.scoring import compute_reference, read_reference, score_pairs, write_reference
from trainers.models.layouts import layout_of
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import collate, scoring_groups
from trainers.rewards import RewardSpec

NAMES = ("llama-tied", "gemma2", "gpt_neox")
MARGINS = tuple(name for name in SPECS if name != "ex_grm")
BF16 = 0.05


def silent(row):
    """Report nothing."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        save_architecture(name, folder)
    return made


@pytest.fixture(scope="module")
def models(folders):
    """(architecture, output, layout) → model."""
    found = {}
    for name, folder in folders.items():
        for output in ("head", "unembedding", "both"):
            found[name, output, "packed"] = load_architecture(folder, output)
            found[name, output, "rows"] = naive.plain(found[name, output, "packed"])
    return found


def rewards_of(models, name, spec, groups, *, layout="packed", pad_id=0, reference=None):
    """Index of each pair → (chosen, rejected, loss), one forward a group."""
    module = RewardModule(models[name, spec.type.output, layout], spec)
    found = {}
    for group in groups:
        batch = collate(group, layout=layout, pad_id=pad_id, reference=reference)
        with torch.no_grad():
            scores = module(batch)
        assert [len(values) for values in scores] == [len(group)] * 3
        rows = zip(*(values.tolist() for values in scores), strict=True)
        found |= dict(zip(batch.indices, rows, strict=True))
    return found


def made_up_reference(spec, pairs):
    if not spec.uses_reference:
        return None
    return {pair.index: (-20.0 - pair.index, -21.0 - pair.index / 3) for pair in pairs}


def assert_same_rewards(found, expected):
    assert found.keys() == expected.keys()
    largest = max(1.0, *(abs(value) for row in expected.values() for value in row))
    for index, row in found.items():
        assert row == pytest.approx(expected[index], abs=1e-5 * largest)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES), spec=st.sampled_from(list(SPECS.values())))
def test_a_reward_does_not_depend_on_batch_mates_order_padding_or_layout(models, data, name, spec):
    pairs = random_pairs(spec.kind, count=6)
    reference = made_up_reference(spec, pairs)
    expected = rewards_of(models, name, spec, [[pair] for pair in pairs], reference=reference)
    mates = data.draw(st.permutations(pairs))
    per_forward = data.draw(st.integers(1, len(pairs)))
    found = rewards_of(
        models,
        name,
        spec,
        [mates[start : start + per_forward] for start in range(0, len(mates), per_forward)],
        layout=data.draw(st.sampled_from(["packed", "rows"])),
        pad_id=data.draw(st.integers(0, 63)),
        reference=reference,
    )
    assert_same_rewards(found, expected)


def twice(kind, count):
    """Pairs whose two responses are the same tokens; of a question that is asked twice only its answers are left."""
    answers = ([YES], [NO]) if kind == "ex_grm" else ([], [])
    return [
        dataclasses.replace(pair, chosen=answers[0] or pair.chosen, rejected=answers[1] or pair.chosen)
        for pair in random_pairs(kind, count=count)
    ]


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", MARGINS)
def test_a_pair_of_the_same_tokens_twice_is_a_tie_and_trains_nothing(folders, kind, precision, layout):
    spec = SPECS[kind]
    model = load_untrained(folders["llama-tied"], spec.type.output, precision)
    if layout == "rows":
        model = naive.plain(model)
    pairs = [*twice(kind, 101), dataclasses.replace(random_pairs(kind)[0], index=1)]
    # The sums of a reference model have their own last bits.
    reference = {pair.index: (-20.0, -20.0 - 1e-6) for pair in pairs} if spec.uses_reference else None
    reward = RewardModule(model, spec)
    chosen, rejected = score_pairs(reward, pairs, reference=reference, report=silent)
    assert chosen[:-1].tolist() == rejected[:-1].tolist()
    assert chosen[-1] != rejected[-1]
    loss_P = reward(collate(pairs[:-1], layout=layout_of(model), reference=reference)).loss_P
    assert loss_P.tolist() == pytest.approx([math.log(2)] * 101, abs=1e-7)
    loss_P.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["ex_rm", "ex_grm"])
def test_whatever_a_type_computes_the_same_tokens_are_a_tie(kind):
    def noisy(model, batch, spec):
        right_P = torch.ones(len(batch.indices))
        return rewards.BatchScores(right_P, right_P - 1e-7, right_P)

    known = dataclasses.replace(SPECS[kind].type, score=noisy, own_loss=True)
    pairs = [*twice(kind, 3), random_pairs(kind)[0]]
    scores = RewardModule(None, SimpleNamespace(type=known))(collate(pairs))
    assert (scores.chosen_P == scores.rejected_P).tolist() == [True, True, True, False]


def test_scores_are_in_the_order_of_the_pairs(models, monkeypatch):
    monkeypatch.setattr(scoring, "scoring_groups", lambda pairs: scoring_groups(pairs, tokens=40))
    pairs = random_pairs(count=9)
    random.Random(1).shuffle(pairs)
    spec, rows = SPECS["ex_rm"], []
    module = RewardModule(models["llama-tied", "head", "packed"], spec)
    chosen, rejected = score_pairs(module, pairs, reference=None, report=rows.append)
    expected = rewards_of(models, "llama-tied", spec, [pairs])
    assert chosen.dtype == rejected.dtype == np.float64
    assert chosen.tolist() == pytest.approx([expected[pair.index][0] for pair in pairs], abs=1e-5)
    assert rejected.tolist() == pytest.approx([expected[pair.index][1] for pair in pairs], abs=1e-5)
    assert len(rows) > 1
    assert rows[-1] == {"done": 9, "total": 9}


@pytest.mark.parametrize("kind", ["ex_rm", "im_rm", "ex_grm"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_rewards_are_near_those_of_fp32(folders, models, name, kind):
    spec = SPECS[kind]
    wide = models[name, spec.type.output, "packed"]
    half = load_untrained(folders[name], spec.type.output, "bf16")
    if spec.type.output != "unembedding":
        half.score.weight.data.copy_(wide.score.weight)
    assert layout_of(half) == "packed"
    batch = collate(random_pairs(kind), reference=made_up_reference(spec, random_pairs()))
    with torch.no_grad():
        found, expected = RewardModule(half, spec)(batch), RewardModule(wide, spec)(batch)
    largest = float(torch.cat([expected.chosen_P, expected.rejected_P]).abs().max())
    for side in (0, 1):
        assert found[side].dtype == expected[side].dtype
        assert float((found[side] - expected[side]).abs().max()) <= BF16 * largest


def test_the_head_is_drawn_from_the_seed(tiny_model):
    heads = [load(tiny_model, "head", head_seed=seed).score.weight.detach() for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(0.02, rel=0.5)


def test_a_reference_with_a_hole_names_the_missing_pairs(tmp_path):
    pairs = random_pairs()
    reference = {pair.index: (-1.0, -2.5) for pair in pairs}
    write_reference(reference, tmp_path / "whole.parquet")
    assert read_reference(tmp_path / "whole.parquet", pairs) == reference
    reference.pop(gone := pairs[2].index)
    write_reference(reference, tmp_path / "r.parquet")
    with pytest.raises(Exception, match=rf"pairs \[{gone}\]"):
        read_reference(tmp_path / "r.parquet", pairs)


def test_planning_imports_no_torch():
    code = (
        "import sys, trainers.rewards as rewards, trainers.specs;"
        "rewards.reward_types(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "length"}, "'length' is not one of ex_grm, ex_rm, im_rm"),
        ({"kind": "im_rm", "beta": math.nan}, "positive beta"),
        ({"kind": "ex_rm", "pooling": "max"}, "'max' is not one of last, mean"),
        ({"kind": "im_rm", "beta": 0.1, "pooling": "mean"}, "im_rm has no pooling"),
        ({"kind": "ex_rm", "reference": False}, "ex_rm has no reference"),
        ({"kind": "ex_grm", "beta": 0.1}, "ex_grm has no beta"),
    ],
)
def test_options_that_a_type_lacks_or_needs_are_told(options, message):
    with pytest.raises(SpecError, match=message):
        RewardSpec(**options)


def test_metrics_by_hand():
    chosen, rejected = (
        torch.tensor([2.0, 1.0, 0.0]).double().numpy(),
        torch.tensor([1.0, 1.0, 3.0]).double().numpy(),
    )
    assert metrics.accuracy(chosen, rejected) == pytest.approx(0.5)
    losses = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(3))]
    assert metrics.loss(chosen, rejected) == pytest.approx(sum(losses) / 3)
    assert metrics.absolute_margin(chosen, rejected) == pytest.approx((4 / 3) / 1.0327955589886444)
    assert metrics.loss(chosen * 1e6, rejected * 1e6) < float("inf")


def swapped(pair, spec):
    if spec.kind == "ex_grm":
        return dataclasses.replace(pair, chosen=[*pair.rejected[:-1], YES], rejected=[*pair.chosen[:-1], NO])
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(NAMES), spec=st.sampled_from(list(SPECS.values())))
def test_swapping_the_responses_flips_the_margin(models, seed, name, spec):
    pairs = random_pairs(spec.kind, seed=seed)
    reference = made_up_reference(spec, pairs)
    other_way = reference and {index: sums[::-1] for index, sums in reference.items()}
    there = rewards_of(models, name, spec, [pairs], reference=reference)
    back = rewards_of(models, name, spec, [[swapped(pair, spec) for pair in pairs]], reference=other_way)
    as_margins = [
        {index: (chosen - rejected,) for index, (chosen, rejected, _) in rows.items()}
        for rows in (there, back)
    ]
    assert_same_rewards({index: (-margin,) for index, (margin,) in as_margins[1].items()}, as_margins[0])


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_im_rm_gives_zero_rewards_and_a_loss_of_ln_2(models, name, layout):
    spec, pairs = SPECS["im_rm"], random_pairs(count=8)
    model = models[name, "unembedding", layout]
    reference = compute_reference(model, pairs, report=silent)
    scores = score_pairs(RewardModule(model, spec), pairs, reference=reference, report=silent)
    largest = max(abs(value) for sums in reference.values() for value in sums)
    assert max(abs(scores[0]).max(), abs(scores[1]).max()) <= spec.beta * 1e-5 * largest
    in_training = rewards_of(models, name, spec, [pairs[:3], pairs[3:]], layout=layout, reference=reference)
    for chosen, rejected, loss in in_training.values():
        assert max(abs(chosen), abs(rejected)) <= spec.beta * 1e-5 * largest
        assert loss == pytest.approx(math.log(2), abs=1e-4)
