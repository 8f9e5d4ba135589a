"""`run --until` and `--budget` at their smallest: what is added, when it stops, and that a killed run decides the same again."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.design import Growth
from orchestrator.cli.main import Grid, main
from orchestrator.plan import durations
from orchestrator.plan.design import Found, Rule, State, decide
from orchestrator.plan.hardware import Node
from orchestrator.run import compute
from orchestrator.spec.catalog import PROFILES
from orchestrator.spec.declaration import adopt, declare
from orchestrator.spec.resolve import ResolvedSweep, resolve
from orchestrator.spec.trials import Sweep
from orchestrator.store.artifacts import Store
from sweeps.full_grid import full_grid
from tests.orchestrator import sweep_samples as sample
from tests.sweep_runs import run_sweep, trial_rows
from trainers.errors import Diverged, SpecError
from trainers.specs import DrawSpec

KINDS = (sample.EX_RM, sample.IM_RM)
# Eight pairs are learnt by heart in so many epochs.
LEARNS = ("--max-train-pairs", "8", "--epochs", "12", "--lr", "1e-2", "--effective-batch", "8")


def small(model: Path, *more: str) -> tuple[str, ...]:
    sets = ("--train-sets", "tiny_world", "--eval-sets", "tiny_world", "tiny_requests")
    return ("--models", str(model), *sets, *LEARNS, *more)


def run(storage: Path, *words: str) -> int:
    return run_sweep("full_grid", full_grid, PROFILES, storage, *words)


def found(storage: Path) -> dict[str, tuple[str, int]]:
    rows = trial_rows(storage, "full_grid")
    return {row["key"]: (row["trial"], row["evaluated"]) for row in rows}


def scored(storage: Path) -> set[int]:
    """Pairs of an evaluation, in the last report."""
    return {row["n"] for row in trial_rows(storage, "full_grid")}


def test_a_sweep_grows_until_it_is_narrow_and_a_killed_one_decides_the_same_again(
    tiny_model, tmp_path, capsys
):
    words = small(tiny_model, "--max-eval-pairs", "10", "--seeds", "0", "--until", "0.8")
    assert run(tmp_path / "store", *words) == 0
    whole, said = found(tmp_path / "store"), capsys.readouterr().out
    assert "design: no interval over other trainings yet" in said
    assert re.search(r"design: reached: ± 0\.\d+ \(trained on tiny_world", said)
    names = {name for name, _ in whole.values()}
    assert {name[-2:] for name in names} > {"s0"}
    # As if killed while a seed that nobody declared was trained.
    store, lost = (
        Store(tmp_path / "store"),
        next(key for key, (name, _) in whole.items() if name.endswith("s1")),
    )
    for kind in ("train", "weights"):
        shutil.rmtree(store.root / "artifacts" / kind / lost)
    assert run(tmp_path / "store", *words) == 0
    assert found(tmp_path / "store") == whole
    # And with all of it done, nothing is run.
    capsys.readouterr()
    assert run(tmp_path / "store", *words) == 0
    assert "trials are complete" in capsys.readouterr().out
    assert found(tmp_path / "store") == whole


def test_pairs_are_added_where_they_narrow_most_and_a_run_that_was_killed_scores_the_same_ones(
    tiny_model, tmp_path, monkeypatch, capsys
):
    score, calls = compute.run_evaluations, list[int]()

    def killed(stages, *rest):
        calls.append(len(stages))
        if len(calls) == 6:
            raise KeyboardInterrupt
        score(stages, *rest)

    words = small(tiny_model, "--max-eval-pairs", "4", "--seeds", "0", "1", "--until", "0.6")
    monkeypatch.setattr(compute, "run_evaluations", killed)
    assert run(tmp_path / "store", *words) == 130
    decided = re.search(r"design: (.*: adding evaluation on (\d+) pairs for 4[^;]*)", capsys.readouterr().out)
    assert decided
    # Four trials are scored on four pairs, one on more.
    assert scored(tmp_path / "store") == {4}
    monkeypatch.setattr(compute, "run_evaluations", score)
    trained = {
        file: file.stat().st_mtime_ns for file in tmp_path.glob("store/artifacts/train/*/manifest.json")
    }
    assert run(tmp_path / "store", *words) == 0
    said = capsys.readouterr().out
    assert decided[1] in said
    assert "of them in attempts that failed or were killed" in said
    # A later round may have added more.
    (pairs,) = scored(tmp_path / "store")
    assert pairs >= int(decided[2]) > 4
    assert trained.items() <= {file: file.stat().st_mtime_ns for file in trained}.items()


def test_a_seed_that_was_added_and_failed_is_retried_by_the_flags_that_added_it(
    tiny_model, tmp_path, monkeypatch, capsys
):
    from trainers.train import loop as training

    train = training.train

    def spoilt(inputs, **rest):
        if inputs.seed == 1:
            raise Diverged("not finite")
        return train(inputs, **rest)

    words = small(tiny_model, "--max-eval-pairs", "10", "--seeds", "0")
    monkeypatch.setattr(training, "train", spoilt)
    assert run(tmp_path / "store", *words, "--until", "0.8") == 3
    monkeypatch.setattr(training, "train", train)
    capsys.readouterr()
    assert run(tmp_path / "store", "retry", *words) == 3
    assert "failed, but not in this grid: " in capsys.readouterr().out
    assert run(tmp_path / "store", "retry", *words, "--until", "0.8") == 0
    assert {name[-2:] for name, _ in found(tmp_path / "store").values()} == {"s0", "s1"}


def test_a_budget_is_spent_seed_by_seed(tiny_model, tmp_path, monkeypatch, capsys):
    # Here the first step comes at once: by the estimate of others, dozens of trainings would fit the budget in the end.
    monkeypatch.setitem(durations.SET_UP_S, "cpu", 0.3)
    # What stages took depends on the machine.
    sound = Store.sound_manifest
    monkeypatch.setattr(
        Store,
        "sound_manifest",
        lambda self, *stage: (found := sound(self, *stage)) and {**found, "seconds": 0.1},
    )
    words = small(tiny_model, "--max-eval-pairs", "10", "--seeds", "3", "5")
    assert run(tmp_path / "store", *words, "--budget", "0.000001cpuh") == 2
    hours = float(re.search(r"takes about (\S+) CPU-hours", " ".join(capsys.readouterr().err.split()))[1])
    words = (*words, "--budget", f"{1.2 * hours:f}cpuh")
    assert run(tmp_path / "store", *words) == 0
    seeds = sorted({int(name.rpartition("s")[2]) for name, _ in found(tmp_path / "store").values()})
    # Those that are declared first, in their order, then those that follow.
    assert seeds == [3, 5, 6, 7, 8]
    assert "no step fits what is left of the budget" in capsys.readouterr().out


def test_no_pairs_are_added_of_a_suite_since_all_are_scored(tmp_path):
    suite = replace(sample.HAMILTONIAN, selection="rewardbench2")
    for sets, rows, whole, pairs in (((sample.TINY_WORLD, suite), [8], [8], 16 / 3), ((suite,), [], [8], 8)):
        trials = [
            sample.trial(reward=kind, seed=seed, eval_sets=sets, eval_draw=DrawSpec(max_pairs=4))
            for kind in KINDS
            for seed in (0, 1)
        ]
        sweep, plans = Sweep(name="demo", trials=tuple(trials)), tuple(map(sample.plan, trials))
        shifts = {("tiny_world", item.name): "domain shift" for item in sets}
        resolved = ResolvedSweep(sweep=sweep, plans=plans, categories=shifts)
        nodes = [Node(id="a", cpus=1)]
        growth = Growth(base=sweep, store=Store(tmp_path), nodes=nodes, resolve=lambda _, it=resolved: it)
        (question,) = growth.questions(resolved, measured=False)
        state = State(seeds={("tiny_world", "llama-64"): 2}, pairs=4)
        assert (question.rows, question.whole) == (rows, whole)
        assert question.design(state, state).pairs == pytest.approx(pairs)
        costs = growth.costs(resolved, measured=False)
        then = decide(state, Found(questions=[question], costs=costs), Rule(until=0.01)).state
        assert then.pairs == (8 if rows else 4)


def test_scores_on_more_pairs_take_the_place_of_those_on_fewer(tmp_path):
    store, trials = (
        Store(tmp_path),
        [sample.trial(seed=seed, reward=kind) for seed in (0, 1) for kind in KINDS],
    )
    base = Sweep(name="demo", trials=[replace(trial, eval_draw=DrawSpec(max_pairs=4)) for trial in trials])
    growth = Growth(base=base, store=store, nodes=(), resolve=lambda sweep: resolve(sweep, store))
    before, after = (
        declare(growth.resolve(growth.sweep(State(seeds={("tiny_world", "llama-64"): seeds}, pairs=pairs))))
        for seeds, pairs in ((2, 4), (3, 8))
    )
    assert [trial.seed for trial in after.trials] == [0, 0, 1, 1, 2, 2]
    # A seed that was added is the training that it would be if it were declared.
    declared = [sample.trial(seed=2, reward=kind) for kind in KINDS]
    plans = resolve(Sweep(name="other", trials=declared), store).plans
    assert [trial.key for trial in after.trials[4:]] == [plan.key for plan in plans]
    adopt(before, store)
    with pytest.raises(SpecError, match="was declared with what this command lacks"):
        adopt(after, store, adds=True)
    grown = adopt(after, store, grows=True)
    assert grown.trials == after.trials
    scored = {f"evaluate/{item.key}" for trial in before.trials for item in trial.evaluations}
    assert scored <= {*grown.artifacts}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--until", "0"], "--until 0.0: give half the width"),
        (["--until", "nan"], "--until nan: give half the width"),
        (["--until", "0.1", "--budget", "1cpuh"], "give one of them"),
        (["--budget", "40"], "--budget 40: give an amount above 0 with its unit: 40gpuh"),
        (["--budget", "0cpuh"], "give an amount above 0"),
        (["--budget", "1gpuh"], "there is no GPU to run on; give CPU-hours: --budget 1cpuh"),
        (["--budget", "$200"], "nothing here has a price"),
        (["--budget", "1e3cpuh"], "give an amount above 0 with its unit"),
        (["--budget", "0.000001cpuh"], "no cell fits. The cheapest, llama-64 on tiny_world, takes about"),
        (["--until", "0.1", "--rewards", "ex_rm"], "no training set has two; name them: --rewards"),
        (["status", "--until", "0.1"], "leave out these flags"),
        (["plan", "--cluster", "1x8xH100-80GB", "--budget", "1cpuh"], "give GPU-hours: --budget 1gpuh"),
        (
            [
                "plan",
                "--cluster",
                "1x1xA100-40GB",
                "--budget",
                "100gpuh",
                "--models",
                "llama-3.1-8b",
                "--precision",
                "fp32",
            ],
            "llama-3.1-8b · ex_rm needs 40 GB on each of at most 1 GPUs",
        ),
    ],
)
def test_a_rule_that_says_nothing_is_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["--profile", "laptop", "--backend", "inline", "--train-sets", "tiny_world"]
    base += [] if "--models" in words else ["--models", "llama-64"]
    if words[0] == "status":
        base = []
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), "full_grid.py", arguments=[*words, *base])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not [file for file in (tmp_path / "rmsweep-store").rglob("manifest.json") if "train" in file.parts]


def test_a_plan_says_what_the_design_detects_and_what_a_rule_would_add(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "plan",
        "--profile",
        "laptop",
        "--backend",
        "inline",
        "--train-sets",
        "tiny_world",
        "--until",
        "0.2",
    ]
    with pytest.raises(SystemExit):
        main(Grid(build=full_grid), "full_grid.py", arguments=words)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"domain shift: 6 models × 1 seed × 40 pairs detect a difference of 0\.\d\d with 80 % power \(± 0\.\d\d\), by priors",
        said,
    )
    assert "expected under the rule: reached: ±" in said
