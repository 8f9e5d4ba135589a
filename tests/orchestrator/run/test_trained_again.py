"""Weights that are trained again, to other last bits: no row of a report is of the old and the new ones."""

import gc as memory
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.cli.run import say_damage
from orchestrator.report.page import holes_table
from orchestrator.report.results import of_other_weights, sweep_results
from orchestrator.run import compute
from orchestrator.run.compute import TrainCall
from orchestrator.run.failures import set_aside_damage
from orchestrator.run.inline import InlineBackend
from orchestrator.run.trial import Execution, complete_trial
from orchestrator.spec.declaration import declare
from orchestrator.spec.resolve import ResolvedSweep, resolve
from orchestrator.spec.stages import TrainStage, TrialPlan
from orchestrator.spec.trials import RetryPolicy, Sweep
from orchestrator.store import gc
from orchestrator.store.artifacts import WEIGHTS, Store, weights_digest
from orchestrator.store.leases import Leases
from orchestrator.store.records import SweepState, unscored
from tests.orchestrator.sweep_samples import (
    HAMILTONIAN,
    TINY_WORLD,
    commit_scores,
    declaration,
    record,
    trial,
    write_report,
)
from trainers.errors import Damaged
from trainers.evaluate.scores import read_pair_scores
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, ModelSpec, Placement
from trainers.train.stopping import StopRequest

REWARD = RewardSpec(kind="im_rm", beta=0.1, reference=False)


def resolved(store: Store, model: Path, *sets: Any) -> ResolvedSweep:
    spec = trial(
        model=ModelSpec(name="tiny", source=str(model)),
        reward=REWARD,
        train_draw=DrawSpec(max_pairs=2),
        eval_sets=sets,
        eval_draw=DrawSpec(max_pairs=8),
    )
    return resolve(Sweep(name="demo", trials=(spec,)), store)


def fill(folder: Path, model: Path, hardware: int) -> None:
    """The model as if it was trained, in the bits that this hardware gives."""
    shutil.copytree(model, folder / "model")
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] * (1 + hardware * 2**-20)
    save_file(weights, file, metadata={"format": "pt"})


def train_on(hardware: int, first: Callable[[Store, TrainStage], None] = lambda *_: None) -> Any:
    """What trains in the place of DeepSpeed; `first` happens before it commits."""

    def train(stage: TrainStage, call: TrainCall, store: Store, report: Any) -> None:
        with store.write(stage.kind, stage.key) as log, store.write(WEIGHTS, stage.key) as weights:
            log.info.update(pairs=2, train_accuracy=1.0)
            fill(weights.directory, Path(stage.base.location), hardware)
            first(store, stage)

    return train


def complete(plan: TrialPlan, store: Store, train: Any) -> None:
    execution = Execution(
        store=store,
        leases=Leases(store.root, "me"),
        retries=RetryPolicy(),
    )
    backend = InlineBackend(execution, print, StopRequest(0.0))
    with mock.patch.object(compute, "run_train", train):
        complete_trial(plan, Placement(forward_tokens=1), backend, execution)


def test_before_a_gpu_scores_weights_nothing_of_their_training_is_in_its_memory(
    store: Store, tiny_model: Path
):
    class Engine:
        """Refers to itself, as an engine and its model refer to each other."""

        def __init__(self) -> None:
            self.model = self

    (plan,) = resolved(store, tiny_model, TINY_WORLD).plans
    backend = InlineBackend(Execution(store=store, leases=Leases(store.root, "me")), print, StopRequest(0.0))
    held = Engine()
    gone = weakref.ref(held)
    del held
    found: list[Engine | None] = []
    memory.disable()
    try:
        with mock.patch.object(compute, "run_evaluations", side_effect=lambda *_: found.append(gone())):
            backend.evaluate(plan, plan.evaluations, Placement(forward_tokens=1, device="cuda"))
    finally:
        memory.enable()
    assert found == [None]


def scores(plan: TrialPlan, store: Store) -> dict[str, list[float]]:
    return {
        stage.prepared.split.name: read_pair_scores(
            store.read(stage.kind, stage.key) / "scores.parquet"
        ).chosen.tolist()
        for stage in plan.evaluations
    }


def of_now(plan: TrialPlan, store: Store) -> bool:
    """Whether every evaluation is of the weights that the training has."""
    now = weights_digest(store.manifest(WEIGHTS, plan.key))
    noted = [store.manifest(stage.kind, stage.key)["info"]["weights"] for stage in plan.evaluations]
    return noted == [now] * len(noted)


def kinds(plan: TrialPlan, store: Store) -> list[str]:
    return sorted(stage.kind for stage in plan.missing(store))


def test_a_set_that_is_added_after_eviction_takes_the_others_along(store: Store, tiny_model: Path):
    (narrow,) = resolved(store, tiny_model, TINY_WORLD).plans
    complete(narrow, store, train_on(1))
    first = scores(narrow, store)
    assert of_now(narrow, store)
    gc.evict_weights(store, "demo", [narrow.key])
    wide = resolved(store, tiny_model, TINY_WORLD, HAMILTONIAN)
    (plan,) = wide.plans
    assert kinds(plan, store) == ["evaluate", "prepare", "train"]
    complete(plan, store, train_on(2))
    assert plan.missing(store) == narrow.missing(store) == []
    assert of_now(plan, store)
    assert scores(plan, store)["tiny_world"] != first["tiny_world"]
    (result,) = sweep_results(declare(wide), store)
    assert result.complete
    assert result.faults == ()


@pytest.mark.parametrize("again", [1, 2])
def test_what_is_there_is_scored_anew_only_where_its_weights_are_others(
    store: Store, tiny_model: Path, again: int
):
    (plan,) = resolved(store, tiny_model, TINY_WORLD).plans
    complete(plan, store, train_on(1))
    before = store.manifest("evaluate", plan.evaluations[0].key)
    gc.evict_weights(store, "demo", [plan.key])
    train_on(again)(plan.train, None, store, print)
    assert kinds(plan, store) == ([] if again == 1 else ["evaluate"])
    said: list[str] = []
    say_damage(SimpleNamespace(store=store, warn=said.append), [plan])
    assert (of_other_weights(["tiny_world"]) in "\n".join(said)) == (again == 2)
    # Evicted, too, the new weights leave nothing to hold scores of the old ones against.
    gc.evict_weights(store, "demo", [plan.key])
    assert plan.missing(store) == []
    train_on(again)(plan.train, None, store, print)
    complete(plan, store, train_on(3))
    assert of_now(plan, store)
    after = store.manifest("evaluate", plan.evaluations[0].key)
    assert (after == before) == (again == 1)


def test_a_gang_that_lost_the_race_scores_the_weights_of_the_winner(store: Store, tiny_model: Path):
    (plan,) = resolved(store, tiny_model, TINY_WORLD).plans
    complete(plan, store, train_on(1, first=lambda store, stage: train_on(2)(stage, None, store, print)))
    assert of_now(plan, store)
    lost, other = scores(plan, store), Store(store.root.with_name("other"))
    (alone,) = resolved(other, tiny_model, TINY_WORLD).plans
    complete(alone, other, train_on(2))
    assert lost == scores(alone, other)


@pytest.mark.parametrize("mended", [False, True])
def test_damaged_weights_take_their_log_along_unless_there_are_new_ones_by_now(store: Store, mended: bool):
    def train() -> str:
        with store.write("train", "a"), store.write(WEIGHTS, "a") as weights:
            (weights.directory / "model.safetensors").write_text("w")
        return weights.directory.name

    error = Damaged("weights are damaged", WEIGHTS, "a", train())
    if mended:
        store.discard(WEIGHTS, "a")
        train()
    with pytest.raises(Damaged, match="computed anew by the same command"):
        set_aside_damage(error, store)
    assert [store.complete(kind, "a") for kind in ("train", WEIGHTS)] == [mended] * 2


@pytest.mark.parametrize("evicted", [False, True])
def test_a_row_of_old_and_new_weights_is_a_hole_that_says_why(store: Store, evicted: bool):
    item = record()
    with store.write("train", item.key) as log, store.write(WEIGHTS, item.key) as weights:
        (weights.directory / "model.safetensors").write_text("new")
        log.info.update(pairs=100, train_accuracy=1.0)
    now = weights_digest(store.manifest(WEIGHTS, item.key))
    if evicted:
        gc.evict_weights(store, "demo", [item.key])
    for evaluation, weights in zip(item.evaluations, ("old", now), strict=True):
        commit_scores(store, evaluation.key, right=7, weights=weights)
    (result,) = sweep_results(declaration(item), store)
    # Of evicted weights nothing tells which scores are theirs.
    old = item.evaluations[:2] if evicted else item.evaluations[:1]
    datasets = [evaluation.dataset for evaluation in old]
    assert [found.dataset for found in result.evaluations] == [] if evicted else ["hamiltonian"]
    assert result.faults == (f"{of_other_weights(datasets)}; run the sweep again",)
    assert not item.whole(store)
    keys = {evaluation.key for evaluation in old}
    assert unscored(store, item.key, [evaluation.key for evaluation in item.evaluations]) == keys
    summary = (write_report(declaration(item), store).folder / "summary.md").read_text()
    assert "0 of 1 trials complete" in summary
    assert item.name in summary
    assert result.faults[0] in holes_table([result], SweepState()).rows[0]["cause"]
