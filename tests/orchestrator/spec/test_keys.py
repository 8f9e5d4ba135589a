"""Content keys: golden ones of whole sweeps, what enters a key, what can have none.

A golden key changes only with a version (trainers/versions.py) or with what a sweep asks for.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.spec import catalog
from orchestrator.spec.axes import varied
from orchestrator.spec.datasets import ReadingOptions, read_as
from orchestrator.spec.declaration import declare
from orchestrator.spec.keys import content_key
from orchestrator.spec.models import identify_model
from orchestrator.spec.resolve import resolve
from orchestrator.spec.selection import parse_dataset
from orchestrator.spec.stages import AnalyseStage, SampleStage
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from sweeps.full_grid import full_grid
from tests.model_files import write_model
from tests.orchestrator.spec.test_axes import VALUES
from tests.orchestrator.sweep_samples import dataset_folder, plan, rows, split, trial, write_jsonl
from trainers.errors import SpecError
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, ModelSpec, OptimSpec, SamplingSpec, Trust

GOLDEN = {
    "laptop": "40cc63e16cd08e6a5ddd9f73e5a15dfe",
    "paper": "c7ad8e29c37c4b86dc028bd395ea83ab",
    "axes": "6f7639a13dbbf2726d04d466fcac537b",
    "data": "b30226eb8b3247933aa4817e420b6ecc",
    "models": "409a3a9c29cc6a8373dfcc9591d51d29",
    "answers and analysis": "9533be64c4bf3a8564adba0e461d690b",
}


def digest(found: object) -> str:
    return content_key("golden", 1, found=found)


def artifacts(profile: catalog.Profile, folder: Path, **flags: Any) -> list[str]:
    sweep = full_grid(session.select(Options(**flags), profile, "demo"))
    lock = folder / "lock.json"
    lock.write_text(json.dumps({model.source: "abc" for model in profile.models}))
    found = declare(resolve(sweep, Store(folder / "store"), fetch=False, lock=lock)).artifacts
    return [name for name in found if "not fetched" not in name]


def test_the_keys_of_the_shipped_grids_are_the_golden_ones(tmp_path: Path):
    for profile in (catalog.LAPTOP, catalog.PAPER):
        assert GOLDEN[profile.name] == digest(artifacts(profile, tmp_path))


def test_the_keys_of_every_axis_are_the_golden_ones():
    keys = {}
    for name, (_, value, needs) in VALUES.items():
        made = varied(trial(), {**needs, name: value})
        item = plan(made, precision=made.model.precision)
        keys[name] = [stage.key for stage in item.stages()]
    assert GOLDEN["axes"] == digest(keys)


def test_the_keys_of_ones_own_data_are_the_golden_ones(tmp_path: Path):
    file = write_jsonl(tmp_path / "mine.jsonl", [{**row, "kind": "é"} for row in rows(20, "mine")])
    other = dataset_folder(tmp_path / "other", train=rows(40, "other"), test=rows(3, "test"))
    mixed = parse_dataset(f"mix={file}:0.3+{other.source}:0.7", "--train-sets")
    (mine, mix), _ = read_as(
        [parse_dataset(str(file), "--train-sets"), mixed], [], ReadingOptions(test_share=0.25)
    )
    trials = [
        trial(train_set=item, train_draw=DrawSpec(max_pairs=5), eval_sets=(other,)) for item in (mine, mix)
    ]
    resolved = resolve(Sweep(name="demo", trials=tuple(trials)), Store(tmp_path / "store"), fetch=False)
    assert GOLDEN["data"] == digest(declare(resolved).artifacts)


def test_the_keys_of_models_of_ones_own_are_the_golden_ones(tmp_path: Path):
    write_model(tmp_path / "mine")
    code = tmp_path / "mine" / "parts" / "layer.py"
    code.parent.mkdir()
    code.write_text("x = 1")
    spec = ModelSpec(name="mine", source=str(tmp_path / "mine"))
    hub = ModelSpec(name="hub", source="acme/tiny-model", revision="abc")
    specs = [
        item
        for one in (spec, hub)
        for item in (
            one,
            dataclasses.replace(one, trust=Trust(trust_remote_code=True)),
            dataclasses.replace(one, template="chatml"),
        )
    ]
    found = [identify_model(item) for item in specs]
    assert GOLDEN["models"] == digest([(item.key, item.tokenizer_key) for item in found])


def test_the_keys_of_answers_and_analyses_are_the_golden_ones():
    item = plan()
    sample = SampleStage(
        base=item.train.base,
        prompts=split("tiny_world", "test"),
        draw=DrawSpec(max_pairs=4),
        sampling=SamplingSpec(),
        ends=(2,),
    )
    analysis = AnalyseStage(
        analysis="demo",
        version=3,
        compute=lambda *_: None,
        parameters=OptimSpec(),
        base=item.train.base,
        prepared=(("pairs", item.train.prepared),),
        reads=(item.train, *item.evaluations),
    )
    assert sample.answers.digest == sample.key
    assert GOLDEN["answers and analysis"] == digest([sample.key, analysis.key])


def test_a_content_key_is_the_golden_one_and_depends_on_the_names_of_its_inputs():
    key = content_key(
        "demo",
        3,
        optim=OptimSpec(),
        reward=RewardSpec(kind="im_rm", beta=0.01),
        draw=DrawSpec(max_pairs=200),
        text="é",
        pair=(1, 2.5, None, True),
    )
    assert key == "1dad65af1f5a1b11b274d31276099826"
    others = {content_key("train", version, **{name: 0}) for version in (1, 2) for name in ("seed", "epoch")}
    assert len(others | {content_key("evaluate", 1, seed=0), content_key("train", 1, seed=0, epoch=0)}) == 6


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, "1"), (1, True), (0, False), (None, "None"), ([1, 2], [2, 1]), ([1, [2]], [[1], 2])],
)
def test_values_that_look_alike_have_different_keys(left: object, right: object):
    assert content_key("train", 1, value=left) != content_key("train", 1, value=right)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, frozenset(), object(), float("nan"), float("inf"), Path("/x"), b"x", {1: "x"}, OptimSpec, len],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "wrap", [lambda v: v, lambda v: [v], lambda v: {"a": (v,)}], ids=["bare", "list", "dict"]
)
def test_a_value_without_a_stable_identity_is_refused(value: object, wrap: Any):
    with pytest.raises(SpecError):
        content_key("train", 1, value=wrap(value))
