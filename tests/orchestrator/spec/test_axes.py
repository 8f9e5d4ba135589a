"""Every field of a trial is an axis: read by its type, put where it belongs, in names and keys only where it counts."""

import dataclasses
from typing import Any

import pytest

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.spec import catalog
from orchestrator.spec.axes import AXES, settled, shown, varied
from orchestrator.spec.declaration import adopted, declare
from orchestrator.spec.resolve import ResolvedSweep, resolve
from orchestrator.spec.trials import Sweep, TrialSpec, only
from orchestrator.store.artifacts import Store
from orchestrator.store.records import write_declaration
from sweeps.full_grid import full_grid
from tests.orchestrator.sweep_samples import EX_RM, IM_RM, plan, trial
from trainers.errors import SpecError
from trainers.rewards import RewardSpec
from trainers.specs import (
    DrawSpec,
    LoraSpec,
    LossSpec,
    ModelSpec,
    OptimSpec,
    ValidationSpec,
)

# Axis → a word of the command line, what is not the axis's default, and what has to be set for it to count.
VALUES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lr": ("1e-5", 1e-5, {}),
    "optimizer": ("sgd", "sgd", {}),
    "schedule": ("cosine", "cosine", {}),
    "warmup-steps": ("7", 7, {}),
    "clip": ("1", 1.0, {}),
    "epochs": ("2", 2, {}),
    "effective-batch": ("8", 8, {}),
    "weight-decay": ("0.1", 0.1, {}),
    "betas": ("0.8+0.9", (0.8, 0.9), {}),
    "momentum": ("0.9", 0.9, {"optimizer": "sgd"}),
    "eps": ("1e-6", 1e-6, {}),
    "freeze": ("embeddings+unembedding", ("embeddings", "unembedding"), {}),
    "beta": ("0.5", 0.5, {}),
    "loss": ("hinge", "hinge", {}),
    "margin": ("0.5", 0.5, {}),
    "label-smoothing": ("0.1", 0.1, {}),
    "centring": ("0.01", 0.01, {}),
    "consistency": ("0.5", 0.5, {}),
    "lora-rank": ("8", 8, {}),
    "lora-alpha": ("32", 32.0, {"lora-rank": 4}),
    "lora-targets": ("q_proj+v_proj", ("q_proj", "v_proj"), {"lora-rank": 4}),
    "precision": ("bf16", "bf16", {}),
    "train-pairs": ("5", 5, {}),
    "draw-seed": ("3", 3, {"train-pairs": 5}),
    "permutation": ("torch", "torch", {"train-pairs": 5}),
    "max-prompt-tokens": ("64", 64, {}),
    "max-response-tokens": ("64", 64, {}),
    "system": ("drop", "drop", {}),
    "reasoning": ("drop", "drop", {}),
    "validation-share": ("0.5", 0.5, {}),
    "validation-seed": ("3", 3, {"validation-share": 0.5}),
}


def trials(*axis: str, profile: Any = catalog.LAPTOP, **flags: Any) -> tuple[TrialSpec, ...]:
    small = {"models": ("llama-64",), "train_sets": ("tiny_world",), "seeds": (0,)}
    options = Options(**{**small, "axis": axis, **flags})
    return full_grid(session.select(options, profile, "demo")).trials


def test_every_field_that_can_change_a_result_is_an_axis_and_tried_here():
    fields = {
        (spec, item.name)
        for spec in (OptimSpec, RewardSpec, LossSpec, LoraSpec, DrawSpec, ValidationSpec)
        for item in dataclasses.fields(spec)
    }
    named = {(RewardSpec, name) for name in ("kind", "pooling", "reference")}
    assert {(axis.spec, axis.field) for axis in AXES.values()} == fields - named | {(ModelSpec, "precision")}
    assert VALUES.keys() == AXES.keys()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_read_put_into_the_trial_and_changes_its_training(name: str):
    word, value, needs = VALUES[name]
    base = settled(trial(), needs)
    assert AXES[name].read(word) == value != AXES[name].of(base)
    made = varied(base, {name: value})
    assert (AXES[name].of(made), made.axes) == (value, ((name, value),))
    assert AXES[name].read(shown(value)) == value
    assert made.name == f"llama-64 · im_rm {name}={shown(value)} · tiny_world · s0"
    changes = {"precision": made.model.precision}
    assert plan(made, **changes).key != plan(base).key


@pytest.mark.parametrize("name", [name for name, axis in AXES.items() if hasattr(Options(), axis.parameter)])
def test_a_flag_gives_all_trials_the_value_and_no_name(name: str):
    word, value, needs = VALUES[name]
    given = {AXES[need].parameter: item for need, item in needs.items()}
    given[AXES[name].parameter] = value
    # EX-RM has no unembedding.
    given["rewards"] = ("im_rm",) if name == "freeze" else ()
    for made, along in zip(
        trials(**given),
        trials(f"{name}={word}", **{key: given[key] for key in given if key != AXES[name].parameter}),
        strict=True,
    ):
        assert not made.axes
        assert dataclasses.replace(along, axes=()) == made


def test_other_values_of_a_training_leave_its_key_where_they_say_nothing():
    plain = plan(trial()).key
    assert plan(varied(trial(), {"lora-rank": 0, "lora-alpha": 64.0})).key == plain
    assert plan(varied(trial(), {"validation-share": 0.0})).key == plain
    assert plan(varied(trial(), {"momentum": 0.9})).key == plain
    assert plan(varied(trial(reward=EX_RM), {"beta": 0.9})).key == plan(trial(reward=EX_RM)).key


def test_a_reward_type_with_a_loss_of_its_own_is_in_a_product_as_it_is():
    assert len(trials("loss=hinge,ipo", "margin=0,0.5", rewards=("ex_grm", "ex_rm"))) == 5
    with pytest.raises(SpecError, match="no trial would use loss; the reward type has a loss of its own"):
        trials("loss=hinge", rewards=("ex_grm",))


def test_values_for_one_reward_type_leave_its_ablation_as_it_is():
    made = trials("im_rm.beta=0.1,0.2", rewards=("im_rm", "im_rm_no_reference"))
    assert len(made) == 3
    assert {item.reward_name: item.reward.beta for item in made}["im_rm_no_reference"] == IM_RM.beta


def test_two_precisions_of_a_model_are_one_model_of_two_trials(tmp_path):
    sweep = Sweep(name="demo", trials=trials("precision=fp32,bf16", rewards=("ex_rm",)))
    assert len({item.key for item in resolve(sweep, Store(tmp_path), fetch=False).plans}) == 2


def test_points_that_are_one_training_are_one_trial():
    names = [item.reward_name for item in trials("lora-rank=0,8", "lora-alpha=16,32", rewards=("ex_rm",))]
    assert names == ["ex_rm_lora-rank=0", *(f"ex_rm_lora-rank=8_lora-alpha={alpha}" for alpha in (16, 32))]
    names = [item.variant for item in trials("optimizer=adamw,sgd", "momentum=0,0.9", rewards=("ex_rm",))]
    assert names == ["optimizer=adamw", "optimizer=sgd momentum=0", "optimizer=sgd momentum=0.9"]


def test_a_flag_that_only_some_points_read_is_kept_for_those():
    made = trials("optimizer=adamw,sgd", momentum=0.9, rewards=("ex_rm",))
    assert [item.optim.momentum for item in made] == [0.0, 0.9]
    made = trials("lora-rank=0,8", lora_alpha=32.0, lora_targets=("v_proj", "q_proj"), rewards=("ex_rm",))
    assert [item.lora for item in made] == [None, LoraSpec(rank=8, alpha=32.0, targets=("q_proj", "v_proj"))]


def test_names_of_parts_are_one_value_in_any_order():
    assert AXES["freeze"].read("unembedding+embeddings+embeddings") == ("embeddings", "unembedding")
    assert AXES["betas"].read("0.9+0.8") == (0.9, 0.8)


def test_without_a_draw_its_seed_tells_no_trainings_apart():
    with pytest.raises(
        SpecError, match="no trial would use draw-seed; all pairs are taken; give --max-train-pairs"
    ):
        trials("draw-seed=0,1")
    made = trials("train-pairs=none,5", "draw-seed=0,1", rewards=("ex_rm",))
    assert [item.variant for item in made] == [
        "train-pairs=none",
        "train-pairs=5 draw-seed=0",
        "train-pairs=5 draw-seed=1",
    ]
    assert made[0].train_draw == DrawSpec()


def test_another_number_of_pairs_of_a_set_with_its_own_draw_is_the_flags_draw():
    for pairs in (500, 1000):
        flag, along = (
            trials(*axis, profile=catalog.PAPER, train_sets=("rewardmath",), **given)
            for axis, given in (((), {"max_train_pairs": pairs}), ((f"train-pairs={pairs}",), {}))
        )
        assert flag[0].train_draw == along[0].train_draw
        assert (flag[0].train_draw.permutation == "torch") == (pairs == 1000)


def test_every_epoch_is_kept_of_each_number_of_epochs():
    made = trials("epochs=1,3", keep_epochs=("every",), rewards=("ex_rm",))
    assert [item.keep_epochs for item in made] == [(1,), (1, 2, 3)]


def test_only_takes_every_axis_and_any_way_to_write_a_number():
    made = trials("lr=1e-5,1e-4", "beta=0.01,0.5")
    assert [item.variant for item in only(made, [("lr", "0.00001"), ("beta", "5e-1")])] == [
        "lr=1e-05 beta=0.5"
    ]
    assert len(only(made, [("reward", "im_rm")])) == 4
    assert len(only(made, [("precision", "fp*"), ("epochs", "12")])) == len(made)
    with pytest.raises(SpecError, match=r"--only lrr=…: .*did you mean lr"):
        only(made, [("lrr", "1")])


def test_an_experiments_own_axis_gives_way_to_a_flag():
    chosen = session.select(Options(lr=1e-3), catalog.ONE_MODEL, "demo")
    assert {item.optim.lr for item in chosen.trials(axes={"lr": (1e-5, 1e-4)})} == {1e-3}
    some = session.select(Options(axis=("im_rm.lr=1e-3",)), catalog.ONE_MODEL, "demo")
    rates = [(item.reward.name, item.optim.lr) for item in some.trials(axes={"lr": (1e-5, 1e-4)})]
    assert rates == [("ex_rm", 1e-5), ("ex_rm", 1e-4), ("im_rm", 1e-3)]
    made = chosen.trials(axes={"epochs": (1, 2), "warmup-steps": (3,)})
    assert {item.reward_name for item in made} == {
        f"{reward}_epochs={epochs}" for reward in ("ex_rm", "im_rm") for epochs in (1, 2)
    }
    assert {item.optim.warmup_steps for item in made} == {3}


def test_values_that_print_alike_have_names_of_their_own():
    first, second = trials("lr=0.12345678,0.12345679", rewards=("ex_rm",))
    assert first.name != second.name


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("lr=2", "--axis lr=2: --lr 2.0 is outside"),
        ("train-pairs=0", "--axis train-pairs=0: a draw of 0 pairs"),
        ("freeze=backbone+head", "give one of backbone, embeddings, unembedding; . joins several"),
        ("beta=-1", "im_rm needs a positive beta"),
        ("betas=0.9", "give a number; . joins several"),
        ("weight-decay=inf", "'inf' is no value of weight-decay; give a number"),
        ("freeze=none,unembedding", "--freeze unembedding: ex_rm has none"),
        ("im_rm.freeze=backbone+unembedding", "nothing of im_rm is left to train"),
    ],
)
def test_a_value_is_validated_by_the_spec_that_has_it(axis: str, said: str):
    with pytest.raises(SpecError, match=said):
        trials(axis)


def declared(*specs: TrialSpec, **base: Any) -> Any:
    plans = tuple(plan(spec, **base) for spec in specs)
    names = {(spec.train_set.name, item.name): "domain shift" for spec in specs for item in spec.eval_sets}
    return declare(ResolvedSweep(sweep=Sweep(name="demo", trials=specs), plans=plans, categories=names))


def test_a_record_has_what_varies_and_every_value():
    made = varied(trial(), {"lr": 1e-5, "freeze": ("backbone",), "clip": None})
    (record,) = declared(made).trials
    assert record.axes == {"lr": 1e-5, "freeze": "backbone", "clip": None}
    assert record.reward == "im_rm_lr=1e-05_freeze=backbone_clip=none"
    values = {axis.parameter: axis.of(made) for axis in AXES.values()}
    wanted = {
        name: value for name, value in values.items() if value is not None and not isinstance(value, tuple)
    }
    assert {"lr", "beta", "max_prompt_tokens", "optimizer", "loss", "lora_rank", "precision"} <= wanted.keys()
    assert {name: record.parameters.get(name) for name in wanted} == wanted
    assert (record.parameters["betas"], record.parameters["freeze"]) == ("0.9+0.999", "backbone")
    assert "clip" not in record.parameters


def test_another_value_is_added_under_a_name_of_its_own_and_a_refusal_says_how(tmp_path):
    store = Store(tmp_path)
    write_declaration(declared(trial()), store)
    other = trial(optim=OptimSpec(lr=1e-5))
    for adds in (True, False):
        with pytest.raises(SpecError, match="--axis NAME=VALUE --extend") as refused:
            adopted(declared(other), store, adds=adds)
        assert all(word in str(refused.value) for word in ("(--replace)", "(--name demo-2)"))
    both = adopted(declared(varied(trial(), {"lr": 1e-5})), store, adds=True)
    assert {item.reward for item in both.trials} == {"im_rm", "im_rm_lr=1e-05"}


@pytest.mark.parametrize("change", [{"key": "other weights"}, {"template": "chatml"}])
def test_seeds_of_another_model_or_template_of_that_name_are_not_added(tmp_path, change: dict[str, str]):
    store, other = Store(tmp_path), trial(seed=1)
    write_declaration(declared(trial()), store)
    adopted(declared(other), store, adds=True)
    if "template" in change:
        other = dataclasses.replace(other, model=dataclasses.replace(other.model, **change))
        change = {}
    with pytest.raises(SpecError, match="with other data or settings"):
        adopted(declared(other, **change), store, adds=True)
