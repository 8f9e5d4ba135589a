"""Every command of the README is run: as it stands but for flags that make it small, and names of files that we make."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cli import run as commands
from orchestrator.report import page
from orchestrator.store.artifacts import Store
from orchestrator.store.records import declared_sweeps, read_declaration
from sweeps.full_grid import full_grid
from tests.cluster import documented
from tests.cluster.machine import free_port
from tests.faults.watching import LOOPBACK, listening
from tests.trainers import command_line
from trainers.evaluate import __main__ as scoring
from trainers.train import __main__ as training

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip().removeprefix("$ ").split("  #")[0].split("   ")[0].strip()
    for line in FENCE.sub("", README).splitlines()
    if line.startswith("    ")
]
ROWS = [
    json.loads(line) for kind, body in FENCE.findall(README) if kind == "json" for line in body.splitlines()
]
WITHOUT_RAY = [text for text in COMMANDS if "-m trainers." in text]
# tests/cluster/test_ray_up.py runs them.
RUN_ON_A_CLUSTER = {command for command in documented.COMMANDS if documented.RUN_BY_RAY_UP["up"] in command}


def grid_command(verb: str) -> list[str]:
    (command,) = [text for text in COMMANDS if text.endswith(f"full_grid.py {verb}")]
    return [sys.executable, *shlex.split(command)[1:]]


def ended(words: Sequence[str]) -> object:
    """The exit code of `python sweeps/full_grid.py …` in this process, which has paid for its imports."""
    with pytest.raises(SystemExit) as ended:
        main.main(main.Grid(build=full_grid), ROOT / "sweeps" / "full_grid.py", arguments=words)
    return ended.value.code


@pytest.fixture
def said(monkeypatch, capsys):
    """What a command of full_grid.py prints on a storage, which it takes from the environment."""

    def run(words: Sequence[str], storage: Path) -> str:
        monkeypatch.setenv("RMSWEEP_STORAGE", str(storage))
        assert words[1].endswith("sweeps/full_grid.py")
        assert ended(words[2:]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def small(tiny_model):
    """The flags of two trials of one epoch of a model that needs no pretraining."""
    return ["--backend", "inline", "--models", str(tiny_model), "--only", "train=tiny_world", "--epochs", "1"]


@pytest.fixture(scope="module")
def storage(small, tmp_path_factory):
    """Where the README's own command has run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMSWEEP_STORAGE", str(folder))
        # Those of `report` below are drawn.
        patch.setattr(page, "every_figure", lambda *_: ())
        assert ended([*grid_command("run")[2:], *small]) == 0
    return folder


def test_every_command_is_one_that_is_tested_here():
    verbs = {"plan", "run", "status", "report", "ui", "sync", "retry", "gc"}
    for command in COMMANDS:
        words = shlex.split(command)
        made = words[0] == "make" and re.search(
            rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        swept = words[:2] == [".venv/bin/python", "sweeps/full_grid.py"] and words[2] in verbs
        assert made or swept or command in (*WITHOUT_RAY, *RUN_ON_A_CLUSTER), command
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", [text for text in COMMANDS if "--cluster" in text and "my-" not in text])
def test_the_papers_grid_is_planned(said, command, tmp_path):
    output = said(shlex.split(command), tmp_path / "store")
    assert "full_grid: 72 trials on" in output
    assert "GPU-hours on 16 GPUs" in output


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("plan", "nothing to do: all 2 trials are complete"),
        ("status", "complete"),
        ("report", "token-level shift"),
        ("retry", "no trial of these has failed"),
        ("gc", "nothing to remove"),
    ],
)
def test_a_verb_on_a_sweep_that_has_run(said, storage, small, verb, expected):
    more = small if verb in ("plan", "retry") else []
    assert expected in said([*grid_command(verb), *more], storage)


def test_sync(said, storage):
    (storage / "mlflow.db").unlink()
    assert "2 trials in sqlite" in said(grid_command("sync"), storage)
    assert (storage / "mlflow.db").is_file()


def test_ui(storage):
    port = free_port()
    server = subprocess.Popen(
        [*grid_command("ui"), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "RMSWEEP_STORAGE": str(storage), "README_TEST": str(storage)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        return False

    try:
        deadline = time.monotonic() + 300
        while not answers():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        found = listening(f"README_TEST={storage}")
        assert found
        assert {address for address, _, _ in found} <= set(LOOPBACK)
        # A process that is told to end by its supervisor takes its server along.
        server.terminate()
        assert server.wait(timeout=60) == 130
        assert not answers()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=120)


@pytest.fixture
def yours(tiny_model, tmp_path):
    """A folder in which a user has a model and data."""
    shutil.copytree(tiny_model, tmp_path / "my-model")
    (tmp_path / "my-data").mkdir()
    *plain, reworded = ROWS
    files = {"my-data/train.jsonl": (plain, 8), "my-data/test.jsonl": (plain, 4), "test.jsonl": (plain, 3)}
    for name, (rows, count) in {**files, "reworded.jsonl": ([reworded], 3)}.items():
        many = [
            {**rows[n % len(rows)], "prompt": f"{name}: {n} {rows[n % len(rows)]['prompt']}"}
            for n in range(count)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, many)))
    return tmp_path


def test_one_training_and_one_score_without_ray(yours, monkeypatch, capsys):
    # From another folder than the repository's, as a user who has installed it.
    monkeypatch.chdir(yours)
    train, evaluate = (shlex.split(command) for command in WITHOUT_RAY)
    # tests/trainers/test_commands.py starts the launcher.
    assert train[:5] == [".venv/bin/torchrun", "--nproc-per-node", "2", "-m", "trainers.train"]
    of_train = (training.Train, training.run, train[4])
    assert command_line.said([*train[5:], "--epochs", "1"], capsys, of_train)[0] == 0
    of_evaluate = (scoring.Evaluate, scoring.run_evaluate, evaluate[2])
    code, printed, _ = command_line.said(evaluate[3:], capsys, of_evaluate)
    assert (code, json.loads(printed.splitlines()[-1])["n"]) == (0, 3)
    assert (yours / "scores.parquet").is_file()


def test_your_own_model_and_learning_rates_on_your_own_data_are_planned(said, yours, monkeypatch):
    monkeypatch.chdir(yours)
    (command,) = [text for text in COMMANDS if "full_grid.py plan --models" in text]
    output = said(shlex.split(command), yours / "store")
    assert "my-model" in output
    assert "8 × H100-80GB" in output
    (command,) = [text for text in COMMANDS if "--axis" in text]
    python, script, _, *words = shlex.split(command)
    assert "4 trials" in said([python, script, "plan", *words, "--backend", "inline"], yours / "store")


def test_one_storage_takes_them_all_one_after_another(yours, monkeypatch):
    """The demo, one's own data, another reward type, the plain command: none takes another's name, gc offers nothing."""
    monkeypatch.chdir(yours)
    monkeypatch.delenv("RMSWEEP_STORAGE", raising=False)
    # Declared, not run.
    monkeypatch.setattr(
        commands, "run", lambda *given, **_: commands.ready(given[0], next(commands.rounds(*given))) and 0
    )
    (demo,) = re.findall(r"full_grid\.py (--profile laptop)", (ROOT / "Makefile").read_text())
    swept = [
        command.partition("full_grid.py run")[2] for command in COMMANDS if "full_grid.py run" in command
    ]
    assert len(swept) == 4
    for text in (demo, *swept):
        # That one is made while one follows docs/adding_a_reward_type.md.
        words = [{"simpo": "ex_rm"}.get(word, word) for word in shlex.split(text)]
        assert ended([*words, "--backend", "inline"]) == 0, text
    store = Store(yours / "rmsweep-store")
    assert len(read_declaration("full_grid", store).trials) == 24
    assert len(declared_sweeps(store)) == 4


def test_your_own_model_and_data_in_the_shell_and_then_in_python(said, yours, monkeypatch):
    (command,) = [text for text in COMMANDS if "run --name mine" in text]
    monkeypatch.chdir(yours)
    output = said([*shlex.split(command), "--backend", "inline"], yours / "store")
    assert "6 trials, 0 complete" in output
    assert "in-distribution" in output
    assert "token-level shift" in output
    assert "domain shift" in output

    (block,) = [body for kind, body in FENCE.findall(README) if kind == "python"]
    known: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), known)
    assert set(known["accuracies"]["state"]) == {"complete"}
    assert set(known["accuracies"]["reward"]) == {"ex_rm", "im_rm"}
