"""What a plan comes to on nodes, and how many pairs it expects to leave out for length, by what is at hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.plan import outlook
from orchestrator.plan.hardware import Node, read_cluster
from orchestrator.plan.outlook import too_long
from orchestrator.plan.placement import place
from orchestrator.spec import catalog
from orchestrator.spec.resolve import ResolvedSweep
from orchestrator.spec.stages import PretrainStage, TrialPlan
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from tests.orchestrator.sweep_samples import (
    EX_RM,
    HAMILTONIAN,
    TINY_WORLD,
    commit_prepared,
    dataset_folder,
    plan,
    rows,
    trial,
)
from trainers.models import tiny
from trainers.specs import DrawSpec


def planned(folder: Path, draw: DrawSpec, *, built_in: bool) -> TrialPlan:
    """A trial on 8 pairs that fit and 4 of 1,500 words, each 3 letters and a space."""
    long = [{**row, "chosen": "abc " * 1500} for row in rows(4, "long")]
    data = dataset_folder(folder / "mine", train=[*long, *rows(8, "short")], test=rows(8, "test"))
    spec = trial(train_set=data, eval_sets=(data,), train_draw=draw)
    if not built_in:
        return plan(spec)
    name = next(iter(tiny.TINY_MODELS))
    return plan(spec, location="", origin=PretrainStage(name=name, model=tiny.TINY_MODELS[name]))


@pytest.mark.parametrize(
    ("draw", "built_in", "most", "expected"),
    [
        # 1,500 words are 1,500 tokens to the tiny tokenizer.
        (DrawSpec(), True, 500, "4 of 12 "),
        (DrawSpec(), True, 6, "4 of 6 "),
        (DrawSpec(max_pairs=4), True, 6, "1 of 5 "),
        (DrawSpec(max_response_tokens=1600), True, 500, ""),
        (DrawSpec(max_response_tokens=1), True, 500, "12 of 12 "),
        # Its tokenizer is not on this machine: 6,000 bytes are taken for 1,500 tokens.
        (DrawSpec(), False, 500, "4 of 12 "),
    ],
)
def test_pairs_are_counted_where_the_tokenizer_is_at_hand_else_estimated(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw: DrawSpec,
    built_in: bool,
    most: int,
    expected: str,
):
    monkeypatch.setattr(outlook, "MOST", most)
    found, refused = too_long([planned(tmp_path, draw, built_in=built_in)] * 2, store)
    said = [said.partition("left out: ")[2] for said in found if "mine/train" in said]
    about = "" if built_in else ", about: taking 4 bytes for a token"
    about = ", of the first 6 that are drawn" if expected == "4 of 6 " else about
    assert said == ([f"{expected}pairs of mine/train for llama-64{about}"] if expected else [])
    assert refused == []


def test_of_a_prepared_set_it_is_known(store: Store, tmp_path: Path):
    item = planned(tmp_path, DrawSpec(), built_in=False)
    commit_prepared(store, item.train.prepared.key, too_long=3, pairs=9)
    (found,), _ = too_long([item], store)
    assert found.endswith("left out: 3 of 12 pairs of mine/train for llama-64")


def test_a_first_row_that_a_template_refuses_is_said_before_anything_runs(store: Store, tmp_path: Path):
    turns = [{"role": "tool", "content": "20 C"}]
    row = {"prompt": turns, "chosen": "Warm.", "rejected": "Cold."}
    item = planned(tmp_path, DrawSpec(max_response_tokens=1600), built_in=True)
    for file in (tmp_path / "mine").glob("*.jsonl"):
        file.write_text(json.dumps(row) + "\n")
    _, said = too_long([item], store)
    assert all("no token for the role tool" in why for why in said)
    assert [why.partition(",")[0] for why in said] == ["llama-64 on mine/train", "llama-64 on mine/test"]


def test_a_row_has_one_step_time_that_of_its_training_sets(store: Store):
    sets = (TINY_WORLD, HAMILTONIAN)
    trials = tuple(trial(train_set=data, seed=seed) for data in sets for seed in (0, 1))
    plans = tuple(map(plan, trials))
    sweep = ResolvedSweep(sweep=Sweep(name="demo", trials=trials), plans=plans, categories={})

    def rows() -> list[tuple[list[str], int, bool]]:
        found = outlook.outlook(sweep, [Node(id="a", cpus=2)], store).cells
        assert len({row.step_s for row in found}) == len(found)
        return [(row.train_sets, row.trials, row.measured) for row in found]

    assert rows() == [(["tiny_world", "hamiltonian"], 4, False)]
    with store.write("train", plans[0].key) as attempt:
        placed = asdict(place(trials[0], [Node(id="a", cpus=2)]))
        attempt.info.update(perf={"step_s": 9.0}, placement=placed)
    assert rows() == [(["tiny_world"], 2, True), (["hamiltonian"], 2, False)]


def test_a_gang_that_waits_for_a_node_of_its_own_waits_in_a_plan_too(store: Store):
    """Of six GPUs, three gangs of two leave none idle; on nodes of three, one gang a node does."""
    model = catalog.MODELS["llama-3.2-3b"]
    trials = tuple(trial(model=model, reward=EX_RM, seed=seed) for seed in range(3))
    # Scored before: what is left are the trainings.
    plans = tuple(replace(plan(spec), evaluations=()) for spec in trials)
    sweep = ResolvedSweep(sweep=Sweep(name="demo", trials=trials), plans=plans, categories={})
    together, apart = (
        outlook.outlook(sweep, read_cluster(words), store) for words in ("1x6xH100", "2x3xH100")
    )
    (group,) = apart.cells
    assert (group.trials, group.placement and group.placement.world_size) == (3, 2)
    assert group.device_hours == pytest.approx(apart.device_hours)
    assert together.makespan_h == pytest.approx(together.lower_bound_h)
    assert apart.lower_bound_h == pytest.approx(together.lower_bound_h)
    assert apart.makespan_h == pytest.approx(2 * together.makespan_h)
