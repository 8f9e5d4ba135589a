"""Grid algebra."""

import pytest

from orchestrator.spec.trials import Sweep, TrialSpec, grid, only
from tests.orchestrator.sweep_samples import EX_RM, HAMILTONIAN, IM_RM, LLAMA, QWEN, TINY_WORLD, trial
from trainers.errors import SpecError
from trainers.specs import DrawSpec, OptimSpec


def small_grid() -> tuple[TrialSpec, ...]:
    return grid(
        models=[LLAMA, QWEN],
        rewards=[EX_RM, IM_RM],
        train_sets=[TINY_WORLD, HAMILTONIAN],
        eval_sets=[TINY_WORLD, HAMILTONIAN, TINY_WORLD],
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
        # A set that is named twice weighs no more in a mean over sets.
        assert item.eval_sets == (TINY_WORLD, HAMILTONIAN)


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


def test_a_sweep_with_a_trial_twice_is_refused_and_names_it():
    with pytest.raises(SpecError, match="llama-64 · im_rm · tiny_world · s0"):
        Sweep(name="demo", trials=(trial(), trial()))


def test_an_empty_sweep_is_refused():
    with pytest.raises(SpecError, match="no trial"):
        Sweep(name="demo", trials=only(small_grid(), [("model", "nothing*")]))
