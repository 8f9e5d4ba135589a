"""What commands print where a terminal is narrow, has no colour, is none, or knows no UTF-8: as real processes."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.simulated import ULTRAFEEDBACK, simulated_sweep
from orchestrator.cli.inspect import say_holes
from orchestrator.cli.options import Options
from orchestrator.cli.running import StateWriter
from orchestrator.cli.session import HOLES, Session
from orchestrator.cli.terminal import Progress
from orchestrator.report.results import sweep_results
from orchestrator.run.events import Failed
from orchestrator.store.artifacts import Store
from orchestrator.store.records import read_declaration, write_declaration

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ROOT / "sweeps" / "full_grid.py"
SCREEN = 45


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep of four trials, one of which has failed."""
    store = Store(tmp_path_factory.mktemp("cli") / "store")
    declared = simulated_sweep(
        store, name="full_grid", seeds=(0,), sets=ULTRAFEEDBACK[:2], pairs=10, missing=1
    )
    write_declaration(declared, store)
    last = declared.trials[-1].key
    writer = StateWriter("full_grid", store, "gone", ["sweeps/full_grid.py"], [last])
    writer.on_event(Failed(trial=last, cause="Diverged", message="loss is nan – step 3"))
    writer.close()
    return store


def run(*words: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, read as the encoding that was asked for."""
    done = subprocess.run(
        [sys.executable, str(GRID), *words],
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


def test_help_fits_a_screen_and_holds_every_command_and_flag(tmp_path: Path):
    code, said, _ = run("--help", cwd=tmp_path, COLUMNS="100")
    lines = said.splitlines()
    assert code == 0
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 100
    _, full, _ = run("--help-verbose", cwd=tmp_path, COLUMNS="100")
    flags = {word.strip(",│") for word in full.split() if word.startswith("--")} - {"--help"}
    assert len(flags) > 25
    for word in (*flags, "run", "plan", "status", "report", "ui", "sync", "retry", "gc"):
        assert word in said, word
    assert "examples" in said


def test_help_is_readable_on_a_narrow_terminal_without_utf_8(tmp_path: Path):
    code, said, _ = run("--help", cwd=tmp_path, COLUMNS="40", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert code == 0
    assert "beta of im_rm" in " ".join(said.split())
    # One sign may come to three letters.
    prose = [line for line in said.splitlines() if "python sweeps" not in line and "..." not in line]
    assert max(map(len, prose)) <= 40


def test_status_in_ascii_and_forty_columns_names_every_trial_and_the_cause_once(store: Store, tmp_path: Path):
    code, said, _ = run(
        "status",
        "--storage",
        str(store.root),
        cwd=tmp_path,
        COLUMNS="40",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    assert code == 3
    words = " ".join(said.split())
    for model in ("llama-64", "qwen2-64"):
        assert f"{model} * ex_rm * ultrafeedback * s0" in words
    assert words.count("loss is nan - step 3") == 1
    assert words.count("state complete") == 3
    assert "evaluations 2/2" in words
    assert "what failed is run again by: " in words


def test_status_for_machines_is_whole_in_any_encoding(store: Store, tmp_path: Path):
    words = ("status", "--json", "--watch", "--storage", str(store.root))
    code, said, _ = run(*words, cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="40")
    rows = json.loads(said)
    assert (code, len(rows)) == (3, 4)
    assert rows[0]["trial"] == "llama-64 · ex_rm · ultrafeedback · s0"
    assert rows[-1]["cause"] == "loss is nan – step 3"


def test_an_error_is_said_once_in_ascii(tmp_path: Path):
    words = ("report", "--name", "nöne", "--storage", str(tmp_path / "störe"))
    code, out, error = run(*words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert code == 2
    assert (out + error).count("knows no sweep") == 1
    assert error.startswith("error: ")


@pytest.mark.parametrize("no_colour", [False, True])
def test_on_a_terminal_an_error_is_red_unless_colours_are_declined(no_colour: bool, tmp_path: Path):
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        **({"NO_COLOR": "1"} if no_colour else {}),
    }
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
    with Progress(console, {failed.key: failed.name}, 3) as shown:
        shown.on_event(Failed(trial=failed.key, cause="Diverged", message="loss is nan – step 3"))
    session = Session(
        options=Options(),
        sweep_name="full_grid",
        store=store,
        tracking_uri="",
        folder=ROOT,
        console=console,
    )
    told = [] if terminal else [failed.key]
    assert say_holes(session, sweep_results(declared, store), told=told) == HOLES
    (line,) = [line for line in out.getvalue().splitlines() if "loss is nan – step 3" in line]
    assert ("missing: " if terminal else "failed: ") in line
    assert set(re.findall(r"\x1b\[[\d;]*m", line)) == ({"\x1b[31m", "\x1b[0m"} if terminal else set())
    assert f"missing: {failed.name}" in out.getvalue()
