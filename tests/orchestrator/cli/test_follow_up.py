"""Which analyses follow a sweep at once, and which wait for what they read. Nothing is trained."""

import dataclasses

import pytest

from orchestrator.cli.analyses import run_follow_up, with_analyses
from orchestrator.spec.declaration import declare
from orchestrator.spec.resolve import resolve
from orchestrator.spec.stages import AnalyseStage
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import evict_weights
from orchestrator.store.records import SweepState, TrialNote, write_state
from tests.orchestrator.cli.test_inspect import session
from tests.orchestrator.sweep_samples import trial


@dataclasses.dataclass(frozen=True)
class Parameters:
    """None."""


def compute(stage, inputs, attempt) -> None:
    (attempt.directory / "summary.md").write_text(inputs.name)


def follow(store: Store, *, loads_weights: bool = False, seeds: tuple[int, ...] = (0,)) -> bool:
    """Whether the analysis of the trials' trainings was computed."""
    resolved = resolve(Sweep(name="demo", trials=tuple(trial(seed=seed) for seed in seeds)), store)

    def analyses(plans) -> list[AnalyseStage]:
        reads = tuple(plan.train for plan in plans)
        more = {"compute": compute, "parameters": Parameters(), "loads_weights": loads_weights}
        return [AnalyseStage(analysis="how far", version=1, reads=reads, **more)]

    asked = dataclasses.replace(session(store)[0], follow_up=analyses)
    declaration = with_analyses(declare(resolved), asked, resolved.plans)
    computed = run_follow_up(asked, declaration, resolved.plans)
    (stage,) = analyses(resolved.plans)
    assert store.complete("analyse", stage.key) == computed
    return computed


@pytest.fixture
def training(store: Store) -> str:
    """Key of the trial's training."""
    return resolve(Sweep(name="demo", trials=(trial(),)), store).plans[0].train.key


def train(store: Store, key: str) -> None:
    with store.write("train", key), store.write("weights", key) as attempt:
        (attempt.directory / "model").mkdir()
        (attempt.directory / "model" / "model.safetensors").write_bytes(b"weights")


def test_an_analysis_waits_for_what_it_reads_and_weights_may_be_that(store: Store, training: str):
    assert not follow(store)
    train(store, training)
    assert evict_weights(store, "demo", [training]) > 0
    assert not follow(store, loads_weights=True)
    assert follow(store)


def test_an_analysis_goes_on_without_a_training_that_failed_for_good(store: Store, training: str):
    note = TrialNote(state="failed", cause="OutOfMemory")
    write_state("demo", store, SweepState(trials={training: note}))
    assert not follow(store)
    write_state("demo", store, SweepState(trials={training: dataclasses.replace(note, cause="Diverged")}))
    # Without any training there is nothing to analyse.
    assert not follow(store)
    other = resolve(Sweep(name="demo", trials=(trial(seed=1),)), store).plans[0].train.key
    assert not follow(store, seeds=(0, 1))
    train(store, other)
    assert follow(store, seeds=(0, 1))
