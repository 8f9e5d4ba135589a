"""A user's mistake is refused before anything starts: exit 2, one clear message, no traceback."""

import json

import pytest

from orchestrator.cli.main import Grid, main
from sweeps.full_grid import full_grid

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


@pytest.fixture
def grid(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: its exit code and all that it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        with pytest.raises(SystemExit) as ended:
            main(Grid(build=full_grid), "full_grid.py", arguments=arguments)
        return ended.value.code, "".join(capsys.readouterr())

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
    for message in messages:
        assert message in said


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--models lama-64", ["--models lama-64", "did you mean llama-64"]),
        ("--lr -1", ["--lr -1.0 is outside (0, 1)"]),
        ("--lr nan", ["'nan' is no value of lr; give a number"]),
        ("--beta 0", ["positive beta, not 0"]),
        ("--epochs 0", ["--epochs 0: at least 1"]),
        ("--epochs many", ["many"]),
        ("--seeds 1 1", ["--seeds 1 1: a value stands twice"]),
        ("--models llama-64 llama-64", ["declared twice"]),
        ("--only model=gpt*", ["holds no trial"]),
        ("--max-eval-pairs 0", ["--max-eval-pairs 0: give at least 1"]),
        ("--profile paper", ["0 GPUs", "llama-3.1-8b", "--profile laptop"]),
        ("--no-such-flag", ["no-such-flag"]),
        ("fly", ["fly"]),
        ("report", ["knows no sweep 'full_grid'"]),
        ("retry", ["knows no sweep 'full_grid'"]),
        ("run --json", ["--json: run prints no JSON"]),
        ("plan --extend --replace", ["give one of them"]),
        ("--storage /proc/rmsweep", ["/proc/rmsweep"]),
    ],
)
def test_a_mistake_in_words_is_refused_and_nothing_is_written(grid, tmp_path, arguments, messages):
    # Inline, so that a Ray that happens to run here is not asked.
    words = [] if arguments == "report" else ["--backend", "inline"]
    words += [] if arguments == "report" or "--profile" in arguments else ["--profile", "laptop"]
    refused(grid(*arguments.split(), *words), *messages)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_data_is_named_with_its_file(grid, data):
    train, test = data("train.jsonl", GOOD, {**GOOD, "chosen": 7}), data("test.jsonl", GOOD)
    sets = ("--train-sets", train, "--eval-sets", test)
    refused(grid("--models", "llama-64", *sets), "train.jsonl, row 1", "holds int")
    data("train.jsonl")
    refused(grid("--models", "llama-64", *sets), "data set train, split train", "holds no pairs")
    data("test.jsonl", {"prompt": "a", "chosen": "b"})
    refused(grid("--models", "llama-64", "--eval-sets", test), "test.jsonl", "no column 'rejected'")


def test_a_folder_of_code_is_no_model(grid, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    refused(grid("--models", "./model", "--profile", "laptop"), "holds no safetensors weights")
