"""Which inputs enter which key, and what is missing of a trial."""

from typing import Any

import pytest

from orchestrator.spec.stages import Stage
from orchestrator.store.artifacts import WEIGHTS, Store
from tests.orchestrator.sweep_samples import (
    EX_RM,
    HAMILTONIAN,
    IM_RM,
    PARAPHRASE,
    QWEN,
    TINY_WORLD,
    plan,
    pretrained_plan,
    trial,
)
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, OptimSpec


def commit(store: Store, stage: Stage) -> None:
    for kind in (WEIGHTS, "train") if stage.kind == "train" else (stage.kind,):
        with store.write(kind, stage.key) as attempt:
            (attempt.directory / "empty").touch()


def labels(stages: list[Stage]) -> list[str]:
    return [stage.label for stage in stages]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"eval_sets": (PARAPHRASE,)}, True),
        ({"eval_draw": DrawSpec(max_pairs=5)}, True),
        ({"model": QWEN}, True),
        ({"seed": 1}, False),
        ({"reward": EX_RM}, False),
        ({"train_set": HAMILTONIAN}, False),
    ],
    ids=str,
)
def test_a_training_key_has_what_changes_the_training(changes: dict[str, Any], same: bool):
    """The axes do, too (test_axes.py)."""
    assert (plan(trial(**changes)).key == plan(trial()).key) == same


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"key": "other"}, False),
        ({"precision": "bf16"}, False),
        ({"tokenizer_key": "other"}, False),
        ({"location": "/elsewhere", "name": "mine"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("reward", [EX_RM, IM_RM], ids=lambda reward: reward.kind)
def test_a_model_is_in_the_keys_and_its_place_and_name_are_not(
    changes: dict[str, Any], reward: RewardSpec, same: bool
):
    spec = trial(reward=reward)
    moved, here = plan(spec, **changes), plan(spec)
    for stage, other in zip((moved.train, *moved.evaluations), (here.train, *here.evaluations), strict=True):
        assert (stage.key == other.key) == same


def test_models_with_one_tokenizer_share_prepared_pairs_and_nothing_further():
    left, right = plan(trial(), key="left"), plan(trial(), key="right")
    assert left.train.prepared.key == right.train.prepared.key
    assert left.train.reference.key != right.train.reference.key
    assert plan(trial(), tokenizer_key="other").train.prepared.key != left.train.prepared.key


def test_seeds_betas_and_learning_rates_share_one_reference():
    plans = [
        plan(trial(**changes))
        for changes in (
            {},
            {"seed": 1},
            {"optim": OptimSpec(lr=1e-3)},
            {"reward": RewardSpec(kind="im_rm", beta=1.0)},
        )
    ]
    assert len({item.key for item in plans}) == 4
    assert len({item.train.reference.key for item in plans}) == 1
    assert len({stage.reference.key for item in plans for stage in item.evaluations}) == 2


@pytest.mark.parametrize(
    ("reward", "references"), [(EX_RM, {}), (IM_RM, {"reference": 3})], ids=["ex_rm", "im_rm"]
)
def test_missing_of_a_new_trial_is_all_of_its_stages_every_need_before_what_needs_it(
    store: Store, reward: RewardSpec, references: dict[str, int]
):
    missing = pretrained_plan(reward=reward).missing(store)
    kinds = [stage.kind for stage in missing]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counts == {"pretrain": 1, "prepare": 3, **references, "train": 1, "evaluate": 2}
    for position, stage in enumerate(missing):
        assert {need.key for need in stage.needs} <= {item.key for item in missing[:position]}


def test_missing_shrinks_by_each_stage_that_is_committed_until_nothing_is_left(store: Store):
    item = pretrained_plan(reward=IM_RM)
    missing = item.missing(store)
    for position, stage in enumerate(missing):
        assert not item.complete(store)
        commit(store, stage)
        assert labels(item.missing(store)) == labels(missing[position + 1 :])
    assert item.complete(store)


def test_an_evaluation_set_more_costs_only_its_own_stages(store: Store):
    for stage in pretrained_plan(reward=EX_RM).missing(store):
        commit(store, stage)
    wider = pretrained_plan(reward=EX_RM, eval_sets=(TINY_WORLD, HAMILTONIAN, PARAPHRASE))
    assert labels(wider.missing(store)) == [
        "prepare tiny_world_paraphrase/test",
        "evaluate on tiny_world_paraphrase",
    ]


def test_inputs_of_a_finished_training_are_not_asked_for_again(store: Store):
    item = pretrained_plan(reward=EX_RM)
    commit(store, item.train)
    assert "prepare tiny_world/train" not in labels(item.missing(store))
