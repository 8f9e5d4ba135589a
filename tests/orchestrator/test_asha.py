"""Tune's scheduler of searches: it rules through the coordinator, and never has Tune end a trial."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator import asha
from orchestrator.artifacts import Store
from orchestrator.searches import searched
from tests.orchestrator.sweep_samples import plan
from trainers.specs import ValidationSpec

SPEC = ValidationSpec(rungs=(1, 3), rates=(1e-4, 5e-4, 2e-3))


class Heard:
    """In the place of the coordinator: what it is told."""

    def __init__(self):
        self.rulings, self.said = [], []
        self.rule = SimpleNamespace(remote=lambda *ruling: self.rulings.append(ruling))
        self.post = SimpleNamespace(remote=self.said.append)


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(asha.ray, "get", lambda answer: answer)
    return Heard()


def trainings(seed=0):
    return searched(replace(plan().train, seed=seed), SPEC)


def trial(training):
    return SimpleNamespace(trial_id=f"tune-{training.key}", config={"trial": training.key})


def come(scheduler, training, epoch, accuracy):
    result = asha.reported(SPEC, asha.Scored(epoch=epoch, accuracy=accuracy))
    return scheduler.on_trial_result(None, trial(training), result)


def started(stages, store, heard):
    scheduler = asha.SearchScheduler(stages, store, heard)
    for stage in stages:
        scheduler.on_trial_add(None, trial(stage))
    return scheduler


def test_who_is_behind_is_told_and_tune_lets_it_go_on(tmp_path, heard):
    first, second, third = trainings()
    scheduler = started([first, second, third], Store(tmp_path), heard)
    said = [come(scheduler, first, 1, 0.5), come(scheduler, second, 1, 0.75), come(scheduler, third, 1, 0.6)]
    assert said == [TrialScheduler.CONTINUE] * 3
    assert heard.rulings == [(first.key, 1, True), (second.key, 1, True), (third.key, 1, False)]
    (event,) = heard.said
    assert event["trial"] == third.key
    assert event["text"] == "ended by ASHA after epoch 1 of 5: validation accuracy 0.600 is behind"
    come(scheduler, first, 3, 0.9)
    come(scheduler, second, 3, 0.8)
    assert heard.rulings[3:] == [(first.key, 3, True), (second.key, 3, False)]


def test_searches_are_not_compared_with_one_another(tmp_path, heard):
    one, other = trainings(seed=0)[0], trainings(seed=1)[0]
    scheduler = started([one, other], Store(tmp_path), heard)
    come(scheduler, one, 1, 0.9)
    come(scheduler, other, 1, 0.1)
    assert [goes_on for _, _, goes_on in heard.rulings] == [True, True]


def test_what_an_earlier_command_trained_has_come_to_its_rungs(tmp_path, heard):
    store, (first, second, third) = Store(tmp_path), trainings()
    for training, accuracies in ((first, (0.8,)), (second, (0.9, 0.9, 0.9, 0.9, 0.9))):
        with store.write("train", training.key) as attempt:
            attempt.info.update(validation_accuracy=accuracies)
    scheduler = started([third], store, heard)
    come(scheduler, third, 1, 0.84)
    assert heard.rulings == [(third.key, 1, False)]


def test_trials_of_no_search_are_not_ruled_on(tmp_path, heard):
    training = plan().train
    scheduler = started([training], Store(tmp_path), heard)
    assert scheduler.on_trial_result(None, trial(training), {"done_stages": 1}) == TrialScheduler.CONTINUE
    assert heard.rulings == []
