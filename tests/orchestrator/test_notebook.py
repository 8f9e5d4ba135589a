"""Sweeps from Python: the words of the command line, results as pandas tables, mistakes as one line."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from orchestrator import grid, notebook, open_sweep
from orchestrator.cli.main import Grid, main
from orchestrator.cli.options import Options
from orchestrator.report.comparison import LEAK_FREE, Analysis
from orchestrator.report.results import on_common_pairs
from orchestrator.report.tables import reward_title
from orchestrator.spec import catalog
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, write_declaration
from sweeps.full_grid import full_grid
from tests.orchestrator.simulated import simulated_sweep
from tests.orchestrator.test_layers import HEAVY, python
from trainers.command import parse
from trainers.data.records import Message, Pair
from trainers.data.sources import read_pairs
from trainers.errors import SpecError

LAZY = """
import sys
import orchestrator
print("orchestrator.notebook" in sys.modules, "rich" in sys.modules)
from orchestrator import grid, open_sweep
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def test_importing_costs_nothing_and_grid_imports_nothing_heavy():
    assert python(LAZY.format(heavy=HEAVY)).split("\n") == ["False False"]


def test_values_are_the_words_of_the_command_line():
    said = notebook._options(
        {
            "models": [Path("a"), "llama-64"],
            "train_sets": {"mine": "x.jsonl"},
            "eval_sets": "tiny_world",
            "category": {("mine", "tiny_world"): "domain-shift"},
            "columns": {"mine/prompt": "question"},
            "test_share": 0.2,
            "seeds": range(2),
            "lr": 1,
            "keep_epochs": [1, 2],
            "backend": "inline",
            "extend": True,
        }
    )
    words = "--models a llama-64 --train-sets mine=x.jsonl --eval-sets tiny_world --category mine/tiny_world=domain-shift "
    words += "--columns mine/prompt=question --test-share 0.2 --seeds 0 1 --lr 1 --keep-epochs 1 2 --backend inline --extend"
    assert said == parse(Options, words.split(), prog="grid", config=())
    assert notebook._listed({"lr": [1e-6, 1e-5]}).__next__() == "lr=1e-06,1e-05"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"modles": ["llama-64"]}, "grid has no modles; did you mean models"),
        ({"lr": "high"}, "parsing --lr: "),
        ({"seeds": [0, 1.5]}, "parsing --seeds: "),
        ({"extend": 1}, "extend=1: give True or False."),
        ({"seeds": True}, "seeds=True: give a value, not True or False"),
        (
            {"models": ["llama-64", "--replace"]},
            "--replace']: give a value, not True or False, and not a flag.",
        ),
        ({"backend": "big"}, "invalid choice 'big' for argument '--backend'"),
        ({"models": ["lama-64"], "profile": "laptop"}, "--models lama-64: no such file"),
        ({"name": "a/b"}, "--name"),
        ({"lr": [1e-6, 2e-6]}, "lr=[1e-06, 2e-06]: give one value."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_mistake_is_one_line(words: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(SpecError) as raised:
        grid(**{"name": "demo", "storage": tmp_path, **words}).plan()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A sweep of a sound model and one whose weights hold a NaN, as it was declared and run."""
    storage = tmp_path_factory.mktemp("ran") / "store"
    folder = shutil.copytree(tiny_model, storage.parent / "broken")
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in weights if "down_proj" in name)][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sweep = grid(
        "demo",
        models={"good": tiny_model, "bad": folder},
        rewards="ex_rm",
        train_sets="tiny_world",
        eval_sets=["tiny_world", "tiny_world_paraphrase"],
        seeds=0,
        profile="laptop",
        storage=storage,
        epochs=1,
        max_train_pairs=16,
        max_eval_pairs=8,
    )
    hook = sys.excepthook
    results = sweep.run(backend="inline")
    assert sys.excepthook is hook, "a script's own mistakes would be those of [rank0]"
    return sweep, results, storage


def test_a_trial_that_fails_is_in_the_results(ran: tuple[Any, Any, Path]):
    _, results, storage = ran
    good, bad = (f"{model} · ex_rm · tiny_world · s0" for model in ("good", "bad"))
    assert list(results.failed()) == [bad]
    assert "not finite" in results.failed()[bad]
    table = results.to_pandas()
    assert list(zip(table["trial"], table["evaluation_set"], table["state"], strict=True)) == [
        (good, "tiny_world", "complete"),
        (good, "tiny_world_paraphrase", "complete"),
        (bad, "tiny_world", "failed"),
        (bad, "tiny_world_paraphrase", "failed"),
    ]
    for metric in ("accuracy", "loss"):
        assert table[metric].notna().tolist() == [True, True, False, False]
    assert set(table["loss_function"]) == {"bradley_terry"}
    assert set(table["cause"]) == {"", results.failed()[bad]}
    assert (results.model_path(good) / "config.json").is_file()
    with pytest.raises(SpecError, match=f"{bad} has no weights: .*not finite"):
        results.model_path(bad)
    assert f"missing: {bad}: " in repr(open_sweep(storage, "demo"))


def test_pairs_have_their_texts(ran: tuple[Any, Any, Path]):
    pairs = ran[1].pairs("tiny_world_paraphrase")
    assert len(pairs) == 8
    assert set(pairs["evaluation_set"]) == {"tiny_world_paraphrase"}
    rows = read_pairs(catalog.dataset("tiny_world_paraphrase"), "test")
    for row in pairs.to_dict("records"):
        pair = rows[row["index"]]
        texts = pair.prompt[0].content, pair.chosen, pair.rejected
        assert (row["prompt"], row["chosen"], row["rejected"]) == texts
        assert row["margin"] == row["chosen_reward"] - row["rejected_reward"]


def test_running_again_does_nothing_for_a_trial_that_failed_for_good(
    ran: tuple[Any, Any, Path], capsys: pytest.CaptureFixture[str]
):
    sweep, results, _ = ran
    assert sweep.run(backend="inline").failed() == results.failed()
    assert "failed for good" in capsys.readouterr().out
    assert sweep.plan().outlook.stages["train"] == {"cached": 1, "missing": 1}
    # A run of a part evicts no weights of the rest.
    grid(**{**sweep._words, "only": "model=bad", "keep_weights": "none"}).run(backend="inline")
    assert results.model_path("good · ex_rm · tiny_world · s0").is_dir()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two models, three seeds, two reward types, as if they had been trained."""
    store = Store(tmp_path_factory.mktemp("simulated") / "store")
    write_declaration(simulated_sweep(store, name="demo"), store)
    return store


def test_differences_are_the_report_s_own(simulated: Store):
    results = open_sweep(simulated.root, "demo")
    analysis = Analysis(on_common_pairs(results.trials))
    found = results.difference("ex_rm", "im_rm")
    for row, scope in zip(found.to_dict("records"), analysis.categories(), strict=True):
        wanted = analysis.difference(scope, "accuracy")
        assert wanted is not None
        assert row["category"] == scope.category
        estimate = wanted.estimate
        assert (row["difference"], row["low"], row["high"]) == (wanted.value, estimate.low, estimate.high)
        assert (row["models"], row["seeds"]) == (2, 3)
    turned = results.difference("im_rm", "ex_rm")
    assert turned["difference"].tolist() == (-found["difference"]).tolist()
    assert (turned["low"] <= turned["difference"]).all()
    assert results.difference("ex_rm", "im_rm", "set")["evaluation_set"].is_unique
    assert len(results.difference("ex_rm", "im_rm", "model")) == 2 * len(found)
    # A control that one training lacks is not estimated from the others.
    for trial in results.trials[1:]:
        for item in trial.evaluations:
            item.metrics[LEAK_FREE] = 0.5
    assert results.difference("ex_rm", "im_rm", metric=LEAK_FREE).empty


def test_an_ensemble_ranks_by_the_mean_reward_of_its_seeds(
    simulated: Store, capsys: pytest.CaptureFixture[str]
):
    results = open_sweep(simulated.root, "demo")
    found = results.ensembles()
    pairs = results.pairs()
    assert len(found) == len({(item.model, item.reward, item.evaluation_set) for item in pairs.itertuples()})
    for row in found.to_dict("records"):
        own = pairs[(pairs["evaluation_set"] == row["evaluation_set"]) & (pairs["model"] == row["model"])]
        own = own[own["reward"].map(reward_title) == row["reward"]]
        margins = own.pivot_table(index="index", columns="seed", values="margin")
        assert row["seeds"] == margins.shape[1] == 3
        assert row["accuracy"] == pytest.approx((margins.mean(axis=1) > 0).mean())
        assert row["accuracy_alone"] == pytest.approx((margins > 0).mean().mean())
        assert row["accuracy_spread"] == pytest.approx((margins > 0).mean().std())
        assert row["margin_spread"] == pytest.approx(margins.std(axis=1).mean())
    assert (found["accuracy"] > found["accuracy_alone"]).any()
    words = ["report", "--storage", str(simulated.root), "--name", "demo", "--ensemble", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=words)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == found.to_dict("records")


def test_a_prompt_of_several_turns_keeps_its_roles():
    asked, said = Message("user", "Why?"), Message("assistant", "So.")
    assert notebook._prompt_of(Pair(prompt=(asked,), chosen="a", rejected="b")) == "Why?"
    assert (
        notebook._prompt_of(Pair(prompt=(asked, said), chosen="a", rejected="b"))
        == "user: Why?\n\nassistant: So."
    )


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda results: results.table("powre"), "demo has no table powre; did you mean power"),
        (lambda results: results.figure("diffrences"), "did you mean differences"),
        (lambda results: results.pairs("ultrafeedbak"), "did you mean ultrafeedback"),
        (lambda results: results.model_path("x"), "demo has no trial x"),
        (lambda results: results.difference("ex_rm", "im_rm", by=3), "no difference by 3"),
        (lambda results: results.difference("ex", "im_rm"), "no reward type ex; did you mean ex_rm"),
        (lambda results: results.difference("ex_rm", "ex_rm"), "give two reward types"),
        (lambda results: results.difference("ex_rm", "im_rm", "models"), "no difference by models; did you"),
        # Of other metrics no interval would be right.
        (lambda results: results.difference("ex_rm", "im_rm", "set", "n"), "no interval of n; known are acc"),
    ],
)
def test_what_the_results_do_not_have_is_refused(simulated: Store, ask: Any, said: str):
    with pytest.raises(SpecError, match=said):
        ask(open_sweep(simulated.root, "demo"))


def test_what_is_no_sweep_of_trials_is_not_opened(tmp_path: Path):
    store = Store(tmp_path / "store")
    with pytest.raises(SpecError, match="knows no sweep 'margins'"):
        open_sweep(store.root, "margins")
    write_declaration(Declaration(sweep="margins", trials=(), artifacts=("analyse/a",)), store)
    with pytest.raises(SpecError, match=r"margins in .* has analyses and no trials; ask the file"):
        open_sweep(store.root, "margins")
