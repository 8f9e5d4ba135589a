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
    "changes",
    [
        {"seed": 1},
        {"reward": EX_RM},
        {"train_set": HAMILTONIAN},
    ],
    ids=str,
)
def test_what_changes_the_training_changes_its_key(changes: dict[str, Any]):
    """The axes do, too (test_axes.py)."""
    assert plan(trial(**changes)).key != plan(trial()).key


@pytest.mark.parametrize(
    "changes", [{"key": "other"}, {"precision": "bf16"}, {"tokenizer_key": "other"}], ids=str
)
@pytest.mark.parametrize("reward", [EX_RM, IM_RM], ids=lambda reward: reward.kind)
def test_the_model_its_precision_and_its_tokenizer_are_in_the_training_key(
    changes: dict[str, Any], reward: RewardSpec
):
    spec = trial(reward=reward)
    assert plan(spec, **changes).key != plan(spec).key


@pytest.mark.parametrize(
    "changes", [{"eval_sets": (PARAPHRASE,)}, {"eval_draw": DrawSpec(max_pairs=5)}, {"model": QWEN}], ids=str
)
def test_evaluation_sets_and_names_are_not_in_the_training_key(changes: dict[str, Any]):
    assert plan(trial(**changes)).key == plan(trial()).key


def test_where_a_model_lies_and_what_it_is_called_is_in_no_key():
    moved = plan(trial(), location="/elsewhere", name="mine")
    assert [stage.key for stage in (moved.train, *moved.evaluations)] == [
        stage.key for stage in (plan(trial()).train, *plan(trial()).evaluations)
    ]


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


def test_ex_rm_needs_no_reference():
    explicit = plan(trial(reward=EX_RM))
    assert explicit.train.reference is None
    assert [stage.reference for stage in explicit.evaluations] == [None, None]
    assert plan(trial(reward=IM_RM)).train.reference is not None


def test_an_evaluation_key_depends_on_training_set_and_draw():
    keys = {
        stage.key
        for item in (plan(trial()), plan(trial(seed=1)), plan(trial(eval_draw=DrawSpec(max_pairs=5))))
        for stage in item.evaluations
    }
    assert len(keys) == 6


def test_training_and_evaluation_pairs_of_one_set_are_prepared_apart():
    item = plan(trial())
    assert item.train.prepared.key != item.evaluations[0].prepared.key


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


def test_a_seed_more_costs_no_shared_stage(store: Store):
    for stage in pretrained_plan(reward=IM_RM).missing(store):
        commit(store, stage)
    kinds = [stage.kind for stage in pretrained_plan(reward=IM_RM, seed=1).missing(store)]
    assert kinds == ["train", "evaluate", "evaluate"]


def test_inputs_of_a_finished_training_are_not_asked_for_again(store: Store):
    item = pretrained_plan(reward=EX_RM)
    commit(store, item.train)
    assert "prepare tiny_world/train" not in labels(item.missing(store))
