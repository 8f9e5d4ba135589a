"""A user's mistake is refused before anything starts: exit 2, one clear message, no traceback."""

import json
import os
import sys

import pytest

from tests.faults.lives import ROOT, forked, output

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def command(folder, words):
    """`python sweeps/full_grid.py` in a folder."""
    from orchestrator.cli.main import Grid, main
    from sweeps.full_grid import full_grid

    os.chdir(folder)
    sys.argv = [str(ROOT / "sweeps" / "full_grid.py"), *words]
    main(Grid(build=full_grid), ROOT / "sweeps" / "full_grid.py", arguments=words)


@pytest.fixture
def grid(tmp_path, tmp_path_factory):
    """Run the command in an empty folder: its exit code and all that it said."""

    def run(*arguments: str):
        log = tmp_path_factory.mktemp("said") / "grid"
        life = forked(log, command, (tmp_path, list(arguments)))
        life.join(60)
        return life.exitcode, output(log)

    return run


@pytest.fixture
def data(tmp_path):
    def write(name: str, *rows) -> str:
        file = tmp_path / name
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return str(file)

    return write


def refused(done: tuple[int | None, str], *messages: str) -> None:
    code, said = done[0], " ".join(done[1].split())
    assert code == 2, said
    assert "Traceback" not in said
    for message in messages:
        assert message in said


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--models", "lama-64"], ["--models lama-64", "did you mean llama-64"]),
        (["--lr", "-1"], ["--lr -1.0 is outside (0, 1)"]),
        (["--lr", "nan"], ["--lr nan is outside"]),
        (["--beta", "0"], ["positive beta, not 0"]),
        (["--epochs", "0"], ["--epochs 0: at least 1"]),
        (["--epochs", "many"], ["many"]),
        (["--seeds", "1", "1"], ["--seeds 1 1: a value stands twice"]),
        (["--models", "llama-64", "llama-64"], ["declared twice"]),
        (["--only", "model=gpt*"], ["holds no trial"]),
        (["--profile", "paper"], ["0 GPUs", "llama-3.1-8b", "--profile laptop"]),
        (["--profile", "huge"], ["huge"]),
        (["--no-such-flag"], ["no-such-flag"]),
        (["fly"], ["fly"]),
        (["report"], ["knows no sweep 'full_grid'"]),
        (["--storage", "/proc/rmsweep"], ["/proc/rmsweep"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) and value[0].startswith("-") else None,
)
def test_a_mistake_in_words_is_refused(grid, arguments, messages):
    profile = [] if "--profile" in arguments else ["--profile", "laptop"]
    refused(grid(*arguments, *profile), *messages)


def test_a_row_that_is_not_text_is_named_with_its_file(grid, data):
    train, test = data("train.jsonl", GOOD, {**GOOD, "chosen": 7}), data("test.jsonl", GOOD)
    refused(
        grid("--models", "llama-64", "--train-sets", train, "--eval-sets", test),
        "train.jsonl, row 1",
        "holds int",
    )


def test_an_empty_set_and_a_missing_column_are_both_named(grid, data):
    train, test = data("train.jsonl"), data("test.jsonl", {"prompt": "a", "chosen": "b"})
    refused(
        grid("--models", "llama-64", "--train-sets", train),
        "data set train, split train",
        "holds no pairs",
    )
    refused(grid("--models", "llama-64", "--eval-sets", test), "test.jsonl", "no column 'rejected'")


def test_a_refused_command_starts_and_writes_nothing(grid, tmp_path):
    refused(grid("--models", "lama-64", "--profile", "laptop"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_code_is_no_model(grid, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    refused(grid("--models", "./model", "--profile", "laptop"), "holds no safetensors weights")
