"""The rule of a search in one process is Ray Tune's own, and a search is over when each of its trainings is."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator import asha
from orchestrator.artifacts import Store
from orchestrator.searches import Search, goes_on, outcome, ruled_by_store, searched
from tests.orchestrator.sweep_samples import plan
from trainers.specs import ValidationSpec

# Epochs that are no powers of the reduction, as Tune's milestones are.
SPEC = ValidationSpec(rungs=(1, 3), rates=(1e-4, 5e-4, 2e-3, 2e-5))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def commit(store, training, *accuracies, state="complete"):
    with store.write("train", training.key) as attempt:
        attempt.info.update(validation_accuracy=accuracies, state=state)


def trainings(**changes):
    train = plan().train
    return searched(replace(train, optim=replace(train.optim, **changes)), SPEC)


@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_the_rule_is_that_of_tunes_asha(reduction):
    validation = ValidationSpec(rungs=(2, 3, 7), reduction=reduction)
    draw = random.Random(reduction)
    for _ in range(30):
        rule = asha.asha(validation)
        reached: dict[int, list[float]] = {rung: [] for rung in validation.rungs}
        for name in range(8):
            trial = SimpleNamespace(trial_id=str(name))
            rule.on_trial_add(None, trial)
            for rung in validation.rungs:
                accuracy = draw.randrange(9) / 8
                scored = asha.Scored(epoch=rung, accuracy=accuracy)
                said = rule.on_trial_result(None, trial, asha.reported(validation, scored))
                assert goes_on(reached[rung], accuracy, reduction) is (said == TrialScheduler.CONTINUE)
                reached[rung].append(accuracy)
                if said == TrialScheduler.STOP:
                    break


def test_trainings_of_a_search_differ_in_their_rate_only():
    found = trainings()
    assert [stage.optim.lr for stage in found] == list(SPEC.rates)
    assert len({stage.key for stage in found}) == 4
    assert {replace(stage, optim=found[0].optim) for stage in found} == {found[0]}
    assert {stage.validation for stage in found} == {SPEC}


def test_a_search_has_an_outcome_when_every_training_is_in_the_store(store):
    found = trainings()
    for training, some in zip(found[:3], [(0.5,), (0.5, 0.75), ()], strict=True):
        commit(store, training, *some)
        assert outcome(found, store) is None
    commit(store, found[3], 0.5, 0.75)
    assert outcome(found, store) == Search(
        rates=SPEC.rates, accuracies=((0.5,), (0.5, 0.75), None, (0.5, 0.75))
    )


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        (((0.9,), (0.5, 0.6)), 2e-4),
        (((0.5, 0.7), (0.5, 0.6)), 1e-4),
        (((0.5, 0.6), (0.6, 0.6)), 1e-4),
        ((None, (0.5, 0.6)), 2e-4),
        ((None, None), None),
    ],
)
def test_the_best_rate_came_furthest_and_is_the_lowest_of_equals(accuracies, best):
    assert Search(rates=(1e-4, 2e-4), accuracies=accuracies).best == best


def test_in_one_process_a_training_is_compared_with_what_is_in_the_store(store):
    found, said = trainings(), []
    commit(store, found[0], 0.75, 0.75, 0.5, 0.5)
    commit(store, found[1], 0.5, state="stopped")
    rule = ruled_by_store(found[2], store, said.append)
    assert rule(1, 0.7)
    assert rule(2, 0.0)
    assert said == []
    assert not rule(3, 0.4)
    assert said == ["ended by ASHA after epoch 3 of 5: validation accuracy 0.400 is behind"]
    assert ruled_by_store(plan().train, store, said.append) is None


def test_a_training_whose_manifest_is_damaged_is_one_that_is_yet_to_be_done(store):
    found = trainings()
    commit(store, found[0], 0.75, 0.75, 0.5, 0.5)
    (store.root / "artifacts" / "train" / found[0].key / "manifest.json").write_text("{")
    rule = ruled_by_store(found[1], store, str)
    assert rule is not None
    assert rule(1, 0.1)
    # On Ray it would end the whole sweep, again and again.
    scheduler = asha.SearchScheduler(found, store, SimpleNamespace())
    scheduler.on_trial_add(None, SimpleNamespace(trial_id="again", config={"trial": found[0].key}))
