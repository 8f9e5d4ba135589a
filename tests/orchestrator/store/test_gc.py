"""What gc and the eviction of weights take, and above all what they leave."""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from orchestrator.cli.run import evictable
from orchestrator.report.results import sweep_results
from orchestrator.spec.declaration import adopt, adopted, declare
from orchestrator.spec.resolve import ResolvedSweep
from orchestrator.spec.stages import TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store import gc
from orchestrator.store.artifacts import MANIFEST, WEIGHTS, Store
from orchestrator.store.gc import Removable
from orchestrator.store.leases import heartbeat
from orchestrator.store.records import (
    Declaration,
    TrialRecord,
    declared_sweeps,
    read_declaration,
    write_declaration,
)
from tests.orchestrator.sweep_samples import (
    EX_RM,
    HAMILTONIAN,
    IM_RM,
    PARAPHRASE,
    TINY_WORLD,
    commit_scores,
    commit_trial,
    declaration,
    pretrained_plan,
    record,
)
from trainers.errors import SpecError, StorageError
from trainers.specs import DatasetSpec
from trainers.storage import DRAFT

SHARD = b"w" * 1000
SETS = (TINY_WORLD, HAMILTONIAN, PARAPHRASE)


def commit_weights(store: Store, key: str, text: str = "first") -> Path:
    """A training as the trainers leave it: weights, what stands beside them, a log. Where the weights are."""
    with store.write("train", key) as log, store.write(WEIGHTS, key) as attempt:
        model = attempt.directory / "model"
        model.mkdir()
        (model / "model-00001-of-00002.safetensors").write_bytes(SHARD)
        (model / "model-00002-of-00002.safetensors").write_bytes(SHARD)
        for name in ("config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"):
            (model / name).write_text(text)
        (log.directory / "log.parquet").write_text(text)
    return store.read(WEIGHTS, key)


def evict(store: Store, key: str) -> int:
    return gc.evict_weights(store, "demo", [key])


def evicted(store: Store, key: str) -> bool:
    return store.complete("train", key) and not store.complete(WEIGHTS, key)


def commit(store: Store, *names: str) -> None:
    for name in names:
        stage, _, key = name.partition("/")
        with store.write(stage, key) as attempt:
            (attempt.directory / "file").write_text("x")


def folder(store: Store, name: str) -> Path:
    return store.root / "artifacts" / name


def resolved(*plans: TrialPlan, name: str = "demo") -> ResolvedSweep:
    sets = [DatasetSpec(name=item.name, source=item.source) for item in SETS]
    categories = {(left.name, right.name): "domain shift" for left in sets for right in sets}
    sweep = Sweep(name=name, trials=tuple(item.spec for item in plans))
    return ResolvedSweep(sweep=sweep, plans=plans, categories=categories)


def declare_names(store: Store, sweep: str, *names: str, trials: tuple[TrialRecord, ...] = ()) -> Declaration:
    declared = dataclasses.replace(declaration(*trials, name=sweep), artifacts=names)
    write_declaration(declared, store)
    return declared


def needed(*declarations: Declaration) -> frozenset[str]:
    """The artifacts of declarations as stage/key."""
    return frozenset(name for item in declarations for name in item.artifacts)


def paths(items: list[Removable]) -> list[str]:
    return [item.path for item in items]


def grown(seeds: Iterable[int], sets: Iterable[str], lr: float) -> Declaration:
    """A grid with one artifact for each training, evaluation and, of all its trials, analysis."""
    trials = tuple(
        dataclasses.replace(
            item,
            key=f"{item.key}-{lr}",
            parameters={**item.parameters, "lr": lr},
            evaluations=tuple(dataclasses.replace(each, key=f"{each.key}-{lr}") for each in item.evaluations),
        )
        for item in (record(seed=seed, sets=[(name, "domain shift") for name in sets]) for seed in seeds)
    )
    named = {f"train/{item.key}" for item in trials}
    named |= {f"evaluate/{each.key}" for item in trials for each in item.evaluations}
    named.add(f"analyse/{'-'.join(sorted(named))}")
    return Declaration(sweep="demo", trials=trials, artifacts=tuple(sorted(named)))


GRIDS = st.builds(
    grown,
    st.sets(st.integers(0, 2), min_size=1),
    st.sets(st.sampled_from("abc"), min_size=1),
    st.sampled_from([0.1, 0.2]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(GRIDS, st.sampled_from(["", "adds", "replaces"])), min_size=2, max_size=5))
def test_gc_keeps_whatever_a_sweep_was_declared_to_be_and_no_trial_leaves_it_by_chance(commands):
    with tempfile.TemporaryDirectory() as place:
        store, accepted, trials = Store(Path(place)), set(), set()
        for grid, how in commands:
            try:
                declared = adopted(grid, store, **({how: True} if how else {}))
            except SpecError:
                assert how != "replaces"
                continue
            write_declaration(declared, store)
            accepted |= set(grid.artifacts)
            mine = {item.key for item in grid.trials}
            trials = mine if how == "replaces" else trials | mine
            assert {item.key for item in read_declaration("demo", store).trials} == trials
            assert len({item.name for item in declared.trials}) == len(declared.trials)
            # They are one cell of the table: nobody sees that its mean is of two learning rates.
            assert len({item.parameters["lr"] for item in declared.trials}) == 1
        left_out = accepted - gc.kept_artifacts(store)
        # Of a part of the sweep no analysis is made.
        assert all(item.startswith("analyse/") for item in left_out)


def test_what_several_drivers_add_to_a_sweep_at_once_is_all_in_it(store: Store):
    with ThreadPoolExecutor(8) as drivers:
        list(drivers.map(lambda seed: adopt(grown([seed], "a", 0.1), store, adds=True), range(24)))
    assert {trial.seed for trial in read_declaration("demo", store).trials} == set(range(24))


def test_a_grid_and_an_analysis_do_not_take_each_others_name(store: Store):
    analysis = Declaration(sweep="demo", trials=(), artifacts=("analyse/first",))
    write_declaration(adopted(analysis, store), store)
    assert adopted(dataclasses.replace(analysis, artifacts=()), store).earlier == ("analyse/first",)
    grid = adopted(grown([0], "a", 0.1), store)
    assert grid.earlier == ("analyse/first",)
    write_declaration(grid, store)
    write_declaration(dataclasses.replace(analysis, sweep="demo-2"), store)
    with pytest.raises(SpecError, match=r"s0\. Nothing was started: .* \(--name demo-3\)\.$"):
        adopted(analysis, store)
    with pytest.raises(SpecError, match=r"\(--name demo-3\), or add it to the sweep \(--extend"):
        adopted(grown([1], "a", 0.1), store)


def test_a_sweep_to_drop_that_the_store_does_not_know_is_an_error(store: Store):
    declare_names(store, "full_grid")
    with pytest.raises(SpecError, match=r"--drop ful_grid: .* did you mean full_grid"):
        gc.kept_artifacts(store, ["full_grid", "ful_grid"])


def test_what_a_dropped_sweep_shares_with_another_one_is_kept(store: Store):
    declare_names(store, "a", "train/x", "train/y")
    declare_names(store, "b", "train/y")
    assert gc.kept_artifacts(store, ["a"]) == {"train/y"}


CHOICE = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1),
        "reward": st.sampled_from([EX_RM, IM_RM]),
        "eval_sets": st.sampled_from([SETS[:1], SETS[:2], SETS[1:], SETS]),
    }
)


@given(
    wide=st.lists(CHOICE, max_size=4),
    kept=st.lists(
        CHOICE, min_size=1, max_size=3, unique_by=lambda choice: (choice["seed"], choice["reward"])
    ),
)
@settings(max_examples=20)
def test_gc_takes_nothing_from_a_kept_sweep_and_everything_else(
    tmp_path_factory: pytest.TempPathFactory, wide: list[dict[str, Any]], kept: list[dict[str, Any]]
):
    store = Store(tmp_path_factory.mktemp("store"))
    keep = declare(resolved(*(pretrained_plan(**choice) for choice in kept)))
    plans = [pretrained_plan(**choice) for choice in (*kept, *wide)]
    for item in plans:
        for stage in item.missing(store):
            commit(store, f"{stage.kind}/{stage.key}")
    everything = {f"{stage.kind}/{stage.key}" for item in plans for stage in item.stages()}
    items = gc.garbage(store, needed(keep))
    write_declaration(keep, store)
    assert read_declaration("demo", store) == keep
    assert declared_sweeps(store) == ["demo"]
    assert {item.owner for item in items} == everything - set(keep.artifacts)
    assert len(gc.remove(store, items)) == len(items)
    for choice in kept:
        assert pretrained_plan(**choice).complete(store)
    left = {str(file.parent.relative_to(folder(store, ""))) for file in store.root.rglob(MANIFEST)}
    assert left == everything & set(keep.artifacts)
    assert {f"{item.parent.name}/{item.name}" for item in folder(store, "").glob("*/*")} == left
    assert gc.garbage(store, needed(keep)) == []


def litter(store: Store) -> Declaration:
    """What killed processes leave beside two kept trainings, one of them complete; of a third the weights are evicted."""
    commit(store, "train/done", f"{WEIGHTS}/done", "sample/drawn")
    commit_weights(store, "evicted")
    evict(store, "evicted")
    leftovers = ("artifacts/train/done/killed", "artifacts/train/half/killed", "scratch/run-1")
    checkpoints = ("done", "half", "evicted", "undeclared", "sample-drawn", "sample-undrawn")
    for name in (*leftovers, *(f"checkpoints/{name}" for name in checkpoints)):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "file").write_text("x" * 10)
    (folder(store, "train/done") / ".draft-1").write_text("{")
    return declare_names(store, "demo", "train/done", "train/half", "train/evicted", "sample/drawn")


def test_leftovers_go_and_what_a_resume_needs_stays(store: Store):
    items = gc.garbage(store, needed(litter(store)))
    assert {item.path: item.why for item in items} == {
        "artifacts/train/done/.draft-1": "left by a process that did not finish",
        "artifacts/train/done/killed": "left by a process that did not finish",
        "artifacts/train/half/killed": "left by a process that did not finish",
        "checkpoints/done": "its training is complete",
        "checkpoints/sample-drawn": "its sample is complete",
        "checkpoints/sample-undrawn": "no kept sweep declares its sample",
        "checkpoints/undeclared": "no kept sweep declares its training",
        "scratch/run-1": "scratch of a run that ended",
    }
    assert [item.bytes for item in items] == [1, *[10] * 7]
    gc.remove_finished_checkpoints(store)
    left = sorted(item.name for item in (store.root / "checkpoints").iterdir())
    assert left == ["evicted", "half", "sample-undrawn", "undeclared"]
    assert gc.remove(store, items) == items
    assert store.read("train", "done")
    assert (store.root / "checkpoints" / "half" / "file").is_file()
    assert not folder(store, "train/half").exists()
    assert gc.garbage(store, needed(read_declaration("demo", store))) == []


def test_what_a_live_driver_may_be_writing_stays(store: Store):
    litter(store)
    commit(store, "evaluate/undeclared")
    attempt = folder(store, "evaluate/undeclared") / "being-written"
    attempt.mkdir()
    items = gc.garbage(store, needed(read_declaration("demo", store)))
    with heartbeat(store.root):
        removed = gc.remove(store, items)
    safe = ["artifacts/evaluate/undeclared", "checkpoints/done", "checkpoints/sample-drawn"]
    assert paths(removed) == safe
    assert list(folder(store, "evaluate/undeclared").iterdir()) == [attempt]
    assert all((store.root / item.path).exists() for item in items if item not in removed)


def test_an_attempt_that_was_committed_since_it_was_listed_stays(store: Store):
    with store.write("train", "late") as attempt:
        (attempt.directory / "log").write_text("written while gc listed")
        items = gc.garbage(store, {"train/late"})
    assert [item.kind for item in items] == ["attempt"]
    assert gc.remove(store, items) == []
    assert store.read_file("train", "late", "log").is_file()


def test_a_draft_of_a_driver_that_comes_is_left_to_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    """It reads and notes its data before it says that it is here."""
    folder = store.root / "audits"
    folder.mkdir(parents=True)
    for name in ("killed", "coming"):
        (folder / f"{DRAFT}{name}").write_text("{}")

    def comes(seconds: float) -> None:
        (folder / f"{DRAFT}coming").replace(folder / "note.json")

    monkeypatch.setattr(gc.time, "sleep", comes)
    gc.clear_up(store, "demo")
    assert [file.name for file in folder.iterdir()] == ["note.json"]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_manifest_goes_before_the_files(store: Store, monkeypatch: pytest.MonkeyPatch):
    commit(store, "train/a")
    items = gc.garbage(store, frozenset())
    with monkeypatch.context() as patch:
        patch.setattr(gc.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gc.remove(store, items)
    assert not store.complete("train", "a")
    (rest,) = gc.garbage(store, needed(declare_names(store, "demo", "train/a")))
    assert rest.kind == "attempt"
    gc.remove(store, [rest])
    assert not folder(store, "train/a").exists()


def test_an_unreadable_manifest_goes_only_with_its_artifact(store: Store):
    commit(store, "train/a")
    (folder(store, "train/a") / MANIFEST).write_text("{")
    assert gc.garbage(store, needed(declare_names(store, "demo", "train/a"))) == []
    items = gc.garbage(store, frozenset())
    with heartbeat(store.root):
        assert gc.remove(store, items) == []
    gc.remove(store, items)
    assert not folder(store, "train/a").exists()


def test_what_cannot_be_removed_is_an_error_that_names_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    commit(store, "train/a")

    def refuse(path: Path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(gc.shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=r"train/a/.* cannot be removed .not yours"):
        gc.remove(store, gc.garbage(store, frozenset()))


def test_reading_evicted_weights_says_what_they_cost_and_the_log_still_reads(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    clock = itertools.chain([1000.0], itertools.repeat(1071.6))
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.store.artifacts.time.time", lambda: next(clock))
        commit_weights(store, "a")
    before = (folder(store, "train/a") / MANIFEST).read_bytes()
    assert evict(store, "a") > 2000
    assert evict(store, "a") == 0
    assert not folder(store, f"{WEIGHTS}/a").exists()
    assert (folder(store, "train/a") / MANIFEST).read_bytes() == before
    for reader in (store, Store(store.root)):
        with pytest.raises(StorageError, match=r"training a were evicted .* took 72 s"):
            reader.read(WEIGHTS, "a")
        assert reader.read_file("train", "a", "log.parquet").read_text() == "first"


def test_one_file_is_checked_alone(store: Store):
    attempt = commit_weights(store, "a")
    (attempt / "model" / "config.json").write_text("other")
    reader, name = Store(store.root), "model/README.md"
    assert reader.read_file(WEIGHTS, "a", name) == attempt / name
    with pytest.raises(StorageError, match=r"config\.json is missing or not what was written"):
        reader.read_file(WEIGHTS, "a", "model/config.json")
    for key, wanted in (("a", "no-such-file"), ("b", name)):
        with pytest.raises(StorageError, match=rf"{wanted} of artifact weights/{key} is not in"):
            reader.read_file(WEIGHTS, key, wanted)


def test_an_eviction_that_was_cut_short_is_ended_by_gc(store: Store, monkeypatch: pytest.MonkeyPatch):
    attempt = commit_weights(store, "a")
    with monkeypatch.context() as patch:
        patch.setattr(gc.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evict(store, "a")
    assert len(list(attempt.rglob("*.safetensors"))) == 2
    with pytest.raises(StorageError, match="were evicted"):
        store.read(WEIGHTS, "a")
    everything = sum(file.stat().st_size for file in store.root.rglob("*") if file.is_file())
    assert sum(item.bytes for item in gc.garbage(store, frozenset())) == everything
    items = gc.garbage(store, needed(declare_names(store, "demo", "train/a")))
    assert [item.kind for item in items] == ["attempt"]
    gc.remove(store, items)
    assert not folder(store, f"{WEIGHTS}/a").exists()
    assert store.read_file("train", "a", "log.parquet")


def trained_plan(store: Store, **changes: Any) -> TrialPlan:
    """A trial of which everything is in the store, its weights evicted."""
    item = pretrained_plan(**changes)
    for stage in item.missing(store):
        if stage.kind == "train":
            commit_weights(store, stage.key)
        else:
            commit(store, f"{stage.kind}/{stage.key}")
    evict(store, item.key)
    return item


@pytest.mark.parametrize("reward", [EX_RM, IM_RM], ids=lambda reward: reward.kind)
def test_evicted_weights_are_missing_only_where_an_evaluation_is(store: Store, reward: Any):
    item = trained_plan(store, reward=reward)
    assert item.complete(store)
    assert item.trains_again_s(store) is None
    wider = pretrained_plan(reward=reward, eval_sets=SETS)
    missing = wider.missing(store)
    kinds = [stage.kind for stage in missing]
    assert sorted(kinds) == sorted(
        ["train", "prepare", "evaluate"] + (["reference"] if reward == IM_RM else [])
    )
    assert kinds.index("train") < kinds.index("evaluate")
    assert wider.trains_again_s(store) == store.manifest("train", wider.key)["seconds"]
    commit_weights(store, wider.key, "second")
    assert "train" not in [stage.kind for stage in wider.missing(store)]
    assert wider.trains_again_s(store) is None


def test_inputs_of_an_evicted_training_are_asked_for_when_it_runs_again(store: Store):
    item = trained_plan(store, reward=EX_RM)
    gc.delete(folder(store, f"prepare/{item.train.prepared.key}"))
    assert item.complete(store)
    labels = [stage.label for stage in pretrained_plan(reward=EX_RM, eval_sets=SETS).missing(store)]
    assert labels.index("prepare tiny_world/train") < labels.index(item.train.label)


def trials_of(store: Store, rights: dict[tuple[str, int], tuple[int, ...]]) -> tuple[TrialRecord, ...]:
    """One trial per (reward type, seed), with so many of 10 pairs right on each of two sets."""
    found = []
    for (reward, seed), right in rights.items():
        item = record(reward=reward, seed=seed)
        commit_weights(store, item.key)
        for evaluation, count in zip(item.evaluations, right, strict=False):
            commit_scores(store, evaluation.key, right=count)
        found.append(item)
    return tuple(found)


RIGHTS = {
    ("ex_rm", 0): (5, 9),
    ("ex_rm", 1): (9, 6),
    ("im_rm", 1): (8, 8),
    ("im_rm", 0): (7, 9),
    ("im_rm", 2): (9, 3),
    ("ex_grm", 0): (5, 5),
    ("ex_grm", 1): (5,),
}


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ("best", {"llama-64-ex_rm-0", "llama-64-im_rm-1", "llama-64-im_rm-2"}),
        ("none", {f"llama-64-{reward}-{seed}" for (reward, seed) in RIGHTS} - {"llama-64-ex_grm-1"}),
    ],
)
def test_the_best_of_a_group_is_kept_and_a_group_with_a_hole_is_not_judged(
    store: Store, keep: Any, gone: set[str]
):
    declared = declaration(*trials_of(store, RIGHTS))
    write_declaration(declared, store)
    gone_keys = evictable(sweep_results(declared, store), keep)
    freed = gc.evict_weights(store, "demo", gone_keys)
    assert {item.key for item in declared.trials if evicted(store, item.key)} == gone
    assert freed > 2000 * len(gone)


def test_weights_that_another_sweep_has_yet_to_evaluate_stay(store: Store):
    trials = trials_of(store, {("ex_rm", 0): (5, 9), ("ex_rm", 1): (9, 6)})
    sets = (("tiny_world", "in-distribution"), ("paraphrase", "token-level shift"))
    waiting = declaration(record(seed=0, sets=sets), record(seed=1), name="other")
    write_declaration(waiting, store)
    write_declaration(declaration(*trials), store)
    keys = [item.key for item in trials]
    assert gc.evict_weights(store, "demo", keys) > 2000
    assert [evicted(store, item.key) for item in trials] == [False, True]
    commit_scores(store, waiting.trials[0].evaluations[1].key, right=3)
    assert gc.evict_weights(store, "demo", keys) > 2000
    assert evicted(store, trials[0].key)


def test_weights_that_another_sweep_has_yet_to_score_answers_with_stay(store: Store):
    (trial,) = trials_of(store, {("ex_rm", 0): (5, 9)})
    write_declaration(declaration(dataclasses.replace(trial, answers=("answered",)), name="other"), store)
    assert gc.evict_weights(store, "demo", [trial.key]) == 0
    commit_scores(store, "answered", right=3)
    assert gc.evict_weights(store, "demo", [trial.key]) > 2000


def test_the_results_of_an_evicted_trial_are_those_from_before(store: Store):
    item = record()
    commit_trial(store, item, 7, 8)
    with store.write(WEIGHTS, item.key) as attempt:
        (attempt.directory / "model.safetensors").write_bytes(SHARD)
    (before,) = sweep_results(declaration(item), store)
    assert evict(store, item.key)
    reader = Store(store.root)
    assert sweep_results(declaration(item), reader) == [before]
    assert parquet.read_table(reader.read_file("train", item.key, "log.parquet")).num_rows == 3


def test_a_sweep_is_not_extended_over_another_content_of_an_evaluation_set(store: Store):
    write_declaration(declaration(record()), store)
    edited = record(seed=1)
    sets = (dataclasses.replace(edited.evaluations[0], dataset_digest="edited"), *edited.evaluations[1:])
    with pytest.raises(SpecError, match="s1"):
        adopted(declaration(dataclasses.replace(edited, evaluations=sets)), store, adds=True)
    assert len(adopted(declaration(edited), store, adds=True).trials) == 2
