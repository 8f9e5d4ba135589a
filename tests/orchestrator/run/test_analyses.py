"""Damage that an analysis meets: it enters no result, and the same command computes it anew."""

import dataclasses
from pathlib import Path

import pytest

from orchestrator.report.results import results_of, scored
from orchestrator.run.inline import compute_analyses
from orchestrator.spec.stages import AnalyseStage
from orchestrator.store.artifacts import Store
from orchestrator.store.records import write_declaration
from tests.orchestrator.sweep_samples import commit_trial, declaration, plan, record
from trainers.errors import Damaged, StorageError


@dataclasses.dataclass(frozen=True)
class Parameters:
    """None."""


def break_file(store: Store, stage: str, key: str, name: str) -> None:
    manifest = store.manifest(stage, key)
    assert manifest is not None
    file = Path(str(store.root)) / "artifacts" / stage / key / manifest["attempt"] / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_a_damaged_input_of_an_analysis_is_set_aside(store: Store):
    prepared = plan().train.prepared
    with store.write("prepare", prepared.key) as attempt:
        (attempt.directory / "pairs.arrow").write_bytes(b"pairs")
    break_file(store, "prepare", prepared.key, "pairs.arrow")
    stage = AnalyseStage(
        analysis="any",
        version=1,
        compute=lambda *_: pytest.fail("it was computed from damaged pairs"),
        parameters=Parameters(),
        prepared=(("pairs", prepared),),
    )
    with pytest.raises(Damaged, match="computed anew by the same command"):
        compute_analyses([stage], store)
    assert not store.complete("prepare", prepared.key)


def test_no_analysis_is_made_of_scores_of_which_some_are_damaged(store: Store):
    trials = [record(reward="ex_rm"), record(reward="im_rm", beta=0.01)]
    for trial in trials:
        commit_trial(store, trial, 9, 5)
    write_declaration(declaration(*trials), store)
    parameters = scored(store, "demo")
    assert len(results_of(parameters, store)[0]) == 2
    break_file(store, "evaluate", trials[1].evaluations[0].key, "scores.parquet")
    fresh = Store(store.root)
    with pytest.raises(
        StorageError, match=r"scores.parquet is missing or not what was written. Run its sweep again"
    ):
        results_of(parameters, fresh)
