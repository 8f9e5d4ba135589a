"""What commands print where a terminal is narrow, has no colour, is none, or knows no UTF-8: as real processes."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from orchestrator.cli.inspect import say_holes
from orchestrator.cli.main import Grid, main
from orchestrator.cli.options import Command, Options
from orchestrator.cli.running import StateWriter
from orchestrator.cli.session import HOLES, Session
from orchestrator.cli.terminal import Progress
from orchestrator.report.results import sweep_results
from orchestrator.run.events import Failed
from orchestrator.store.artifacts import Store
from orchestrator.store.records import TrialNote, read_declaration, write_declaration
from sweeps import full_grid as full_grid_file
from sweeps.full_grid import full_grid
from tests.orchestrator.simulated import ULTRAFEEDBACK, simulated_sweep

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ROOT / "sweeps" / "full_grid.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep of four trials, one of which has failed."""
    store = Store(tmp_path_factory.mktemp("cli") / "store")
    declared = simulated_sweep(
        store, name="full_grid", seeds=(0,), sets=ULTRAFEEDBACK[:2], pairs=10, missing=1
    )
    write_declaration(declared, store)
    last = declared.trials[-1].key
    writer = StateWriter("full_grid", store, "gone", [GRID.name, "--extend", "run", "--name", "run"], [last])
    writer.on_event(Failed(trial=last, cause="Diverged", message="loss is nan – step 3"))
    writer.close()
    return store


@pytest.fixture(scope="module")
def rmsweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that an installation has."""
    file = tmp_path_factory.mktemp("bin") / "rmsweep"
    file.write_text(f"#!{sys.executable}\nfrom sweeps import main\nmain()\n")
    file.chmod(0o755)
    return file


def run(
    *words: str, cwd: Path, call: Sequence[str | Path] = (sys.executable, GRID), **environment: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, read as the encoding that was asked for."""
    done = subprocess.run(
        [*call, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    said = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "Traceback" not in "".join(said)
    assert "\x1b[" not in "".join(said), "colours go to no pipe"
    return done.returncode, *said


@pytest.mark.parametrize("command", [None, *get_args(Command)])
def test_help_documents_every_flag_and_command(
    command: type | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "120")
    words = [command.__name__.lower()] if command else []
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), GRID, full_grid_file.__doc__, [*words, "--help"])
    assert not ended.value.code
    said = capsys.readouterr().out.replace("│", " ")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n +(?=--)", said)]
    documented = {entry.split()[0] for entry in entries if len(entry.partition("(default")[0].split()) > 3}
    for field in (*fields(Options), *(fields(command) if command else ())):
        assert field.name == "command" or f"--{field.name.replace('_', '-')}" in documented, field.name
    for item in [command] if command else get_args(Command):
        assert " ".join(item.__doc__.split()) in " ".join(said.split())
    for line in "" if command else full_grid_file.__doc__.splitlines():
        assert line in said


def test_help_is_readable_on_a_narrow_terminal_without_utf_8(tmp_path: Path):
    code, said, _ = run("--help", cwd=tmp_path, COLUMNS="40", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert code == 0
    assert "? of im_rm" in " ".join(said.replace("|", " ").split())
    prose = [line for line in said.splitlines() if "python sweeps" not in line]
    assert max(map(len, prose)) <= 40


def test_who_reads_the_first_line_alone_hears_no_complaint(store: Store, tmp_path: Path):
    call = ("bash", "-c", '"$@" | true; echo "${PIPESTATUS[0]}"', "bash", sys.executable, GRID)
    _, *said = run("status", "--json", "--storage", str(store.root), cwd=tmp_path, call=call)
    assert said == ["1\n", ""]
    assert list(tmp_path.iterdir()) == []


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "40"}


def test_status_in_ascii_and_forty_columns_names_every_trial_and_the_cause_once(store: Store, tmp_path: Path):
    code, said, _ = run("status", "--storage", str(store.root), cwd=tmp_path, **ASCII)
    assert code == 3
    words = " ".join(said.split())
    for model in ("llama-64", "qwen2-64"):
        assert f"{model} ? ex_rm ? ultrafeedback ? s0" in words
    assert words.count("loss is nan ? step 3") == 1
    assert words.count("state complete") == 3
    assert "evaluations 2/2" in words


def test_status_for_machines_is_whole_in_any_encoding_and_an_error_is_said_once(store: Store, tmp_path: Path):
    code, said, _ = run("status", "--json", "--watch", "--storage", str(store.root), cwd=tmp_path, **ASCII)
    rows = json.loads(said)
    assert (code, len(rows)) == (3, 4)
    assert rows[0]["trial"] == "llama-64 · ex_rm · ultrafeedback · s0"
    assert rows[-1]["cause"] == "loss is nan – step 3"
    words = ("report", "--name", "nöne", "--storage", str(tmp_path / "störe"))
    code, out, error = run(*words, cwd=tmp_path, **ASCII)
    assert (code, (out + error).count("knows no sweep")) == (2, 1)
    assert error.startswith("error: ")


@pytest.mark.parametrize("on_path", [True, False])
def test_hints_name_the_command_as_it_was_called(on_path: bool, store: Store, rmsweep: Path, tmp_path: Path):
    path = {"PATH": f"{rmsweep.parent}:{os.environ['PATH']}"} if on_path else {}
    called = "rmsweep" if on_path else os.path.relpath(rmsweep, tmp_path)
    words = ("full_grid", "status", "--storage", str(store.root))
    _, said, _ = run(*words, cwd=tmp_path, call=[called], COLUMNS="200", **path)
    assert f"to run the failed trials again: {called} full_grid retry --extend --name run\n" in said


@pytest.mark.parametrize("no_colour", [False, True])
def test_on_a_terminal_an_error_is_red_unless_colours_are_declined(no_colour: bool, tmp_path: Path):
    ours, theirs = pty.openpty()
    declined = {"NO_COLOR": "1"} if no_colour else {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **declined}
    command = [sys.executable, str(GRID), "report", "--storage", str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert process.wait(60) == 2
    assert said.count(b"error:") == 1
    assert (b"\x1b[31m" in said) is not no_colour


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_failure_is_said_once_and_in_red(terminal: bool, store: Store):
    """In a pipe when it comes, as there is no live table; on a terminal at the end."""
    out = io.StringIO()
    console = Console(
        file=out, width=200, force_terminal=terminal, color_system="standard" if terminal else "auto"
    )
    declared = read_declaration("full_grid", store)
    failed = declared.trials[-1]
    with Progress(console, {failed.key: failed.name}, {failed.key: TrialNote()}, 3) as shown:
        shown.on_event(Failed(trial=failed.key, cause="Diverged", message="loss is nan – step 3"))
    place = {"store": store, "tracking_uri": "", "folder": ROOT, "console": console}
    session = Session(options=Options(), sweep_name="full_grid", **place)
    assert say_holes(session, sweep_results(declared, store), told=[failed.key]) == HOLES
    (line,) = [line for line in out.getvalue().splitlines() if "loss is nan – step 3" in line]
    assert "failed: " in line
    assert set(re.findall(r"\x1b\[[\d;]*m", line)) == ({"\x1b[31m", "\x1b[0m"} if terminal else set())
    assert f"missing: {failed.name}" in out.getvalue()
    assert "the same command" not in out.getvalue(), "it would leave out what failed for good"


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["status", "--models", "llama-64", "--seeds", "1"], "--models, --seeds: status reads"),
        (["status", "--profile", "laptop"], "--profile: status reads"),
        (["report", "--lr", "1e-4", "--profile", "laptop"], "--lr: report reads"),
    ],
)
def test_what_reads_a_declaration_refuses_the_flags_of_a_grid(
    words: list[str], ignored: str, store: Store, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(Grid(build=full_grid), GRID, arguments=[*words, "--storage", str(store.root)])
    assert ended.value.code == 2
    assert f"error: {ignored} the whole sweep as it was declared" in capsys.readouterr().err


def test_rmsweep_runs_any_experiment_by_name(rmsweep: Path, tmp_path: Path):
    code, said, _ = run(cwd=tmp_path, call=[sys.executable, rmsweep], COLUMNS="120")
    assert code == 0
    for file in (ROOT / "sweeps").glob("[!_]*.py"):
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [file.stem]]
        assert line.split(maxsplit=1)[1] in file.read_text(encoding="utf-8").splitlines()[0]
    code, _, error = run("full_gird", "plan", cwd=tmp_path, call=[sys.executable, rmsweep])
    assert (code, error) == (2, "error: no experiment is called full_gird; did you mean full_grid?\n")
    code, said, _ = run("full-grid", "--help", cwd=tmp_path, call=[sys.executable, rmsweep])
    assert "usage: rmsweep full_grid " in said
    assert "  rmsweep full_grid --profile laptop  " in said
    assert (code, "python sweeps" in said) == (0, False)


def test_the_script_is_declared():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"rmsweep": "sweeps:main"}
