"""Evaluation after chosen epochs: keys, what is missing, tables; and what is declared to be training pairs."""

from dataclasses import replace

import pytest
from pyarrow import parquet

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.report.by_axis import axis_tables, draw_axis
from orchestrator.report.comparison import Analysis
from orchestrator.report.house_style import rendered
from orchestrator.report.results import sweep_results
from orchestrator.spec import catalog
from orchestrator.spec.resolve import resolve
from orchestrator.spec.selection import parse_keep_epochs
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import evict_weights
from orchestrator.store.records import EvaluationRecord, TrialRecord
from sweeps.persona import LAPTOP, persona
from tests.orchestrator.sweep_samples import (
    PARAPHRASE,
    TINY_WORLD,
    commit_scores,
    commit_train,
    declaration,
    plan,
    record,
    sweep,
    trial,
    trial_result,
    write_report,
)
from trainers.errors import SpecError

ON_TRAINING = replace(TINY_WORLD, name="tiny_world_train", test_split="train")


def test_kept_epochs_are_in_the_keys_of_training_and_evaluations():
    plain, kept = plan(trial()), plan(trial(keep_epochs=(1, 3)))
    assert kept.key != plain.key
    # The last epoch is always kept.
    assert plan(trial(keep_epochs=(5,))).key == plain.key
    assert [stage.epoch for stage in kept.evaluations] == [1, 1, 3, 3, 5, 5]
    assert len({stage.key for stage in kept.evaluations}) == 6
    assert kept.train.keep_epochs == (1, 3)
    with pytest.raises(SpecError, match=r"--keep-epochs 6.*1 to 5"):
        trial(keep_epochs=(6,))


@pytest.mark.parametrize("words", [["0"], ["1", "every"], ["-1"], ["last"], ["2", "2"]])
def test_words_that_are_no_epochs_are_refused(words):
    with pytest.raises(SpecError, match="--keep-epochs"):
        parse_keep_epochs(words)


def test_every_keeps_all_epochs_of_each_trials_own_recipe():
    options = Options(keep_epochs=("every",), epochs=3)
    made = persona(session.select(options, LAPTOP, "demo"))
    assert {item.keep_epochs for item in made.trials} == {(1, 2, 3)}


def epochs_record(**changes: int) -> TrialRecord:
    plain = record(**changes)
    return replace(
        plain,
        evaluations=tuple(
            EvaluationRecord(
                dataset="tiny_world",
                key=f"{plain.key}-{epoch}",
                category="in-distribution",
                dataset_digest="0" * 64,
                epoch=epoch,
            )
            for epoch in (1, 2)
        ),
    )


def test_the_last_epoch_is_what_a_trial_is_judged_by_and_tables_hold_them_all(store: Store):
    item = epochs_record()
    commit_train(store, item.key)
    commit_scores(store, item.evaluations[0].key, right=3)
    assert trial_result(item, store).category_accuracy() == {}
    commit_scores(store, item.evaluations[1].key, right=9)
    result = trial_result(item, store)
    assert result.category_accuracy() == {"in-distribution": 0.9}
    assert [found.epoch for found in result.final] == [2]
    assert not [*axis_tables(Analysis(sweep_results(declaration(record()), store)))]
    written = write_report(declaration(item), store)
    summary = (written.folder / "summary.md").read_text()
    for line in ("| EX-RM | 1 | 0.300 [", "| EX-RM | 2 | 0.900 ["):
        assert line in summary
    rows = parquet.read_table(store.sweep_dir("demo") / "trials.parquet").to_pylist()
    assert [(row["epoch"], row["accuracy"]) for row in rows] == [(1, 0.3), (2, 0.9)]


def test_an_epochs_mean_is_over_the_seeds_that_learned(store: Store):
    items = [epochs_record(seed=seed) for seed in range(4)]
    for item, accuracy, rights in zip(items, (1.0, 1.0, 0.5), ((3, 9), (5,), (1, 1)), strict=False):
        commit_train(store, item.key, accuracy=accuracy)
        for wanted, right in zip(item.evaluations, rights, strict=False):
            commit_scores(store, wanted.key, right=right)
    (found,) = axis_tables(Analysis(sweep_results(declaration(*items), store)))
    assert [(row["epoch"], row["accuracy"].value) for row in found.rows] == [("1", 0.4), ("2", 0.9)]
    assert [row["over"].partition(",")[0] for row in found.rows] == [
        "2 seeds",
        "10 pairs of one training of this model",
    ]
    assert rendered("by_epoch", "", "", lambda: draw_axis(found)) is not None
    # How held-out pairs are ranked is known after the last epoch alone.
    results = [replace(item, validation_accuracy=0.75) for item in sweep_results(declaration(*items), store)]
    (found,) = axis_tables(Analysis(results))
    assert [row["held_out"] for row in found.rows] == [None, 0.75]


def test_kept_weights_are_evicted_with_the_last(store: Store):
    with store.write("weights", "key") as attempt:
        for folder in ("model", "model-epoch-1"):
            (attempt.directory / folder).mkdir()
            (attempt.directory / folder / "model.safetensors").write_bytes(b"12345")
    assert evict_weights(store, "demo", ["key"]) == 10
    assert not list(store.root.rglob("*.safetensors"))


def test_training_pairs_are_evaluated_where_they_are_declared_as_such(store: Store):
    refused = sweep([TINY_WORLD], [TINY_WORLD, ON_TRAINING])
    with pytest.raises(SpecError, match="very rows"):
        resolve(refused, store)
    declared = replace(refused, categories=(("tiny_world", "tiny_world_train", "training pairs"),))
    assert resolve(declared, store).categories["tiny_world", "tiny_world_train"] == "training pairs"


def test_a_rewriting_in_the_same_source_is_a_token_level_shift(store: Store, shared):
    file = f"{shared}/data/persona/agreeableness.jsonl"
    original, rewritten = (
        replace(catalog.dataset(name), source=file) for name in ("persona", "persona_paraphrase")
    )
    found = resolve(sweep([original], [original, rewritten]), store).categories
    assert list(found.values()).count("token-level shift") == 1
    assert found["persona", "persona_paraphrase"] == "token-level shift"


def test_persona_evaluates_training_and_test_prompts_as_they_are_and_paraphrased(store: Store):
    resolved = resolve(persona(session.select(Options(epochs=2), LAPTOP, "demo")), store)
    named = {name: category for (_, name), category in resolved.categories.items()}
    assert named == {
        "tiny_world": "in-distribution",
        "tiny_world_paraphrase": "token-level shift",
        "tiny_world_train": "training pairs",
        "tiny_world_paraphrase_train": "token-level shift",
    }
    assert PARAPHRASE.name in named
    assert [len(item.evaluations) for item in resolved.plans] == [8, 8]
