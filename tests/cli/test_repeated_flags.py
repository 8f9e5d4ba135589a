"""A flag that is given twice is refused: one of two values never vanishes."""

import pytest

from orchestrator.cli import main
from orchestrator.cli.main import Grid
from sweeps.full_grid import full_grid
from tests.trainers.command_line import said
from trainers.train import __main__ as training

TRAIN = ["--model", "m", "--reward", "ex_rm", "--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--seeds=0 plan --price 2 --seeds 1", "--seeds"),
        ("--train-sets a --eval-sets b --train_sets c", "--train-sets"),
        ("gc --delete --delete", "--delete"),
    ],
)
def test_a_sweep_refuses_a_flag_that_is_given_twice(words, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(Grid(build=full_grid), "full_grid.py", arguments=words.split())
    assert ended.value.code == 2
    assert f"error: {flag}: given more than once" in capsys.readouterr().err


def test_the_other_commands_refuse_it_too(capsys):
    of = (training.Train, training.run, "trainers.train")
    code, _, error = said([*TRAIN, "--freeze", "backbone", "--freeze", "embeddings"], capsys, of)
    assert (code, "error: --freeze: given more than once" in error) == (2, True)
