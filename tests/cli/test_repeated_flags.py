"""A flag that is given twice: its values add up, or it is refused; one of two never vanishes."""

import functools
import sys

import pytest

from orchestrator.cli import main
from orchestrator.cli.analyses import Analyses, ModelOptions
from orchestrator.cli.main import Grid
from sweeps.full_grid import full_grid
from trainers.command import command
from trainers.data.__main__ import Data
from trainers.train.__main__ import Train

TRAIN = ["--model", "m", "--reward", "ex_rm", "--data", "d", "--out", "o"]


@pytest.fixture
def parsed(monkeypatch):
    """What a command line means to a sweep, or to a command of trainers."""
    found = []

    monkeypatch.setattr(main, "execute", lambda _, options, *rest: found.append(options) or 0)

    def experiment(experiment, *words):
        with pytest.raises(SystemExit) as ended:
            main.main(experiment, "experiment.py", arguments=words)
        assert ended.value.code == 0
        return found.pop()

    def analysis(kind, *words):
        return experiment(Analyses(options=kind, declare=lambda *_: ()), *words)

    def trainers(kind, *words):
        monkeypatch.setattr(sys, "argv", ["command", *words])
        command(kind, found.append, "trainers", models=False)
        return found.pop()

    return {
        "sweep": functools.partial(experiment, Grid(build=full_grid)),
        "analysis": analysis,
        "trainers": trainers,
    }


@pytest.mark.parametrize(
    ("twice", "once"),
    [
        ("--seeds 0 --seeds 1", "--seeds 0 1"),
        ("--seeds=0 --lr 1e-3 --seeds=1 2", "--seeds 0 1 2 --lr 1e-3"),
        ("--seeds 0 plan --price 2 --seeds 1", "--seeds 0 1 plan --price 2"),
        ("--only model=a --only train=b", "--only model=a train=b"),
        ("--train-sets a --eval-sets b --train_sets c", "--train-sets a c --eval-sets b"),
        ("gc --drop a --delete --drop b --delete", "gc --drop a b --delete"),
        # As a value it is no command.
        ("--name plan --seeds 0 --seeds 1", "--name plan --seeds 0 1"),
    ],
)
def test_values_of_a_sweeps_flag_add_up(parsed, twice, once):
    assert parsed["sweep"](*twice.split()) == parsed["sweep"](*once.split())


def test_values_add_up_in_the_other_commands(parsed):
    assert parsed["analysis"](ModelOptions, "--models", "a", "--models", "b").models == ("a", "b")
    train = parsed["trainers"](Train, *TRAIN, "--freeze", "backbone", "--freeze", "embeddings")
    assert train.optim.freeze == ("backbone", "embeddings")
    show = parsed["trainers"](Data, "show", "a", "--columns", "prompt=q", "--columns", "chosen=c")
    assert show.command.reading.columns == ("prompt=q", "chosen=c")


@pytest.mark.parametrize("place", [["--lr", "1", "--lr", "2"], ["--lr=1", "plan", "--lr", "2"]])
def test_of_two_values_for_one_neither_is_dropped(parsed, place, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(Grid(build=full_grid), "full_grid.py", arguments=place)
    assert ended.value.code == 2
    assert "Unrecognized options: 2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        parsed["trainers"](Train, *TRAIN, *place)
    assert ended.value.code == 2
