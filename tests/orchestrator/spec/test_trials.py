"""Grid algebra and content keys."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.keys import content_key
from orchestrator.spec.trials import Sweep, TrialSpec, grid, only
from tests.orchestrator.sweep_samples import EX_RM, HAMILTONIAN, IM_RM, LLAMA, QWEN, TINY_WORLD, trial
from trainers.errors import SpecError
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, ModelSpec, OptimSpec


def small_grid() -> tuple[TrialSpec, ...]:
    return grid(
        models=[LLAMA, QWEN],
        rewards=[EX_RM, IM_RM],
        train_sets=[TINY_WORLD, HAMILTONIAN],
        eval_sets=[TINY_WORLD],
        seeds=[0, 1, 2],
        recipe=lambda model, dataset: OptimSpec(lr=1e-3 if dataset.name == "hamiltonian" else 1e-4),
        train_draw=DrawSpec(max_pairs=7),
        eval_draw=DrawSpec(max_pairs=5),
    )


def names(trials: tuple[TrialSpec, ...]) -> list[str]:
    return [item.name for item in trials]


def test_a_grid_is_the_full_product_with_seeds_outermost_and_reward_types_innermost():
    assert names(small_grid())[:5] == [
        "llama-64 · ex_rm · tiny_world · s0",
        "llama-64 · im_rm · tiny_world · s0",
        "llama-64 · ex_rm · hamiltonian · s0",
        "llama-64 · im_rm · hamiltonian · s0",
        "qwen2-64 · ex_rm · tiny_world · s0",
    ]
    assert [t.seed for t in small_grid()] == [0] * 8 + [1] * 8 + [2] * 8
    assert len(set(names(small_grid()))) == 2 * 2 * 2 * 3
    for item in small_grid():
        assert item.optim.lr == (1e-3 if item.train_set is HAMILTONIAN else 1e-4)
        assert (item.train_draw.max_pairs, item.eval_draw.max_pairs) == (7, 5)


@pytest.mark.parametrize(
    ("patterns", "among"),
    [
        ((), " · "),
        ([("model", "qwen*")], "qwen2-64 · "),
        ([("seed", "0"), ("seed", "2")], (" · s0", " · s2")),
        ([("reward", "im_rm")], " · im_rm · "),
        (
            [("model", "llama-64"), ("reward", "im_rm"), ("train", "ham*"), ("seed", "1")],
            "llama-64 · im_rm · hamiltonian · s1",
        ),
    ],
)
def test_only_takes_globs_of_one_key_as_or_and_of_several_as_and(patterns, among):
    words = (among,) if isinstance(among, str) else among
    kept = [name for name in names(small_grid()) if any(word in name for word in words)]
    assert names(only(small_grid(), patterns)) == kept


def test_only_with_an_unknown_key_is_refused_and_names_the_known_ones():
    with pytest.raises(SpecError, match=r"colour.*model, reward, train, seed"):
        only(small_grid(), [("colour", "red")])


def test_a_sweep_with_a_trial_twice_is_refused_and_names_it():
    with pytest.raises(SpecError, match="llama-64 · im_rm · tiny_world · s0"):
        Sweep(name="demo", trials=(trial(), trial()))


def test_two_models_under_one_name_are_refused():
    other = ModelSpec(name=LLAMA.name, source="builtin:qwen2-64")
    with pytest.raises(SpecError, match="twice"):
        Sweep(name="demo", trials=(trial(), trial(model=other)))


def test_an_empty_sweep_is_refused():
    with pytest.raises(SpecError, match="no trial"):
        Sweep(name="demo", trials=only(small_grid(), [("model", "nothing*")]))


GOLDEN = "1dad65af1f5a1b11b274d31276099826"
EXAMPLE = """
from orchestrator.spec.keys import content_key
from trainers.rewards import RewardSpec
from trainers.specs import DrawSpec, OptimSpec
key = content_key(
    "demo", 3, optim=OptimSpec(), reward=RewardSpec(kind="im_rm", beta=0.01), draw=DrawSpec(max_pairs=200),
    text="é", pair=(1, 2.5, None, True),
)
"""


def test_a_content_key_is_the_golden_one_here_and_in_another_process():
    here: dict[str, Any] = {}
    exec(EXAMPLE, here)
    there = subprocess.run(
        [sys.executable, "-c", EXAMPLE + "print(key)"],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert here["key"] == there.stdout.strip() == GOLDEN


def test_a_content_key_depends_on_stage_version_and_the_names_of_its_inputs():
    keys = {
        content_key("train", 1, seed=0),
        content_key("evaluate", 1, seed=0),
        content_key("train", 2, seed=0),
        content_key("train", 1, epoch=0),
        content_key("train", 1, seed=0, epoch=0),
    }
    assert len(keys) == 5


def test_the_order_of_inputs_does_not_matter():
    assert content_key("train", 1, a=1, b={"x": 1, "y": 2}) == content_key(
        "train", 1, b={"y": 2, "x": 1}, a=1
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, "1"), (1, True), (0, False), (None, "None"), ([1, 2], [2, 1]), ([1, [2]], [[1], 2])],
)
def test_values_that_look_alike_have_different_keys(left: object, right: object):
    assert content_key("train", 1, value=left) != content_key("train", 1, value=right)


CHANGES = [
    (OptimSpec(), "lr", 1e-5),
    (OptimSpec(), "epochs", 6),
    (OptimSpec(), "effective_batch", 16),
    (OptimSpec(), "weight_decay", 0.1),
    (OptimSpec(), "betas", (0.9, 0.95)),
    (OptimSpec(), "eps", 1e-6),
    (OptimSpec(), "optimizer", "sgd"),
    (OptimSpec(), "schedule", "linear"),
    (OptimSpec(), "warmup_steps", 5),
    (OptimSpec(), "clip", 1.0),
    (OptimSpec(), "momentum", 0.9),
    (OptimSpec(), "freeze", ("backbone",)),
    (IM_RM, "kind", "ex_rm"),
    (IM_RM, "beta", 0.1),
    (IM_RM, "reference", False),
    (RewardSpec(kind="ex_rm"), "pooling", "mean"),
    (DrawSpec(), "max_pairs", 5),
    (DrawSpec(), "seed", 1),
    (DrawSpec(), "permutation", "torch"),
    (DrawSpec(), "max_prompt_tokens", 512),
    (DrawSpec(), "max_response_tokens", 512),
    (DrawSpec(), "system", "drop"),
    (DrawSpec(), "reasoning", "drop"),
]


@pytest.mark.parametrize(
    ("spec", "field", "value"), CHANGES, ids=lambda item: item if isinstance(item, str) else ""
)
def test_a_content_key_changes_with_every_field(spec: Any, field: str, value: object):
    others = {"beta": None} if value == "ex_rm" else {}
    changed = dataclasses.replace(spec, **{field: value}, **others)
    assert content_key("train", 1, spec=spec) != content_key("train", 1, spec=changed)


def test_every_field_of_the_specs_in_a_key_is_tried_above():
    tried = {(type(spec), field) for spec, field, _ in CHANGES}
    wanted = {
        (kind, item.name) for kind in (OptimSpec, RewardSpec, DrawSpec) for item in dataclasses.fields(kind)
    }
    assert tried == wanted


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
