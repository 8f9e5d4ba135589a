"""README.md and docs/: every link resolves, every command can be parsed, and what a page promises of one is so.

The README's commands are run by test_readme.py, those of docs/cluster.md by tests/cluster, those of docs/data.md by
tests/trainers/test_data_commands.py and here.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.spec import catalog
from orchestrator.spec.axes import AXES
from sweeps.full_grid import full_grid
from tests.sweep_runs import run_sweep, trial_rows
from trainers import command as trainers_command

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = ("--epochs", "1", "--max-train-pairs", "8", "--max-eval-pairs", "8")
OF_A_SWEEP = re.compile(r"(?:(?:python )?sweeps/(\w+)\.py|rmsweep (\w+))(?: (.*))?$")
OF_TRAINERS = re.compile(r"-m trainers\.(\w+) (.*)$")
# Files that pages have one write, in this order.
MADE_ON_THE_PAGES = (
    *("trainers/rewards/simpo.py", "tests/trainers/test_simpo.py"),
    *("sweeps/betas.py", "sweeps/best_beta.py"),
)


def commands(page: Path) -> list[str]:
    """Lines of bash blocks, and what is indented; without what is said of them behind two spaces."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    blocks = [line for kind, body in FENCE.findall(text) if kind == "bash" for line in body.splitlines()]
    indented = [line for line in FENCE.sub("", text).splitlines() if re.match(r"(?: {4}| {8})\S", line)]
    return [
        re.split(r" {2,}", line.strip().removeprefix("$ "))[0] for line in blocks + indented if line.strip()
    ]


def anchors(page: Path) -> set[str]:
    """The fragments under which GitHub shows the page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def targets(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    return [target for target in found if not target.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_of_a_page_are_there(page):
    broken = []
    for target in targets(page):
        path, _, fragment = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
    assert broken == []
    folders = "benchmarks|cluster|docs|orchestrator|sweeps|tests|trainers"
    named = set(re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named - {*MADE_ON_THE_PAGES}) if not (ROOT / name).exists()] == []


def test_every_page_is_on_the_map_which_the_readme_names():
    on_the_map = set(targets(ROOT / "docs" / "README.md"))
    assert {page.name for page in DOCS if page.name != "README.md"} <= on_the_map
    assert "docs/README.md" in targets(ROOT / "README.md")


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_can_be_meant(page, tmp_path, monkeypatch):
    """Each is parsed, and not run."""
    monkeypatch.chdir(tmp_path)

    def parsed_only(*given, **named):
        parse(*given, **named)
        sys.exit(0)

    parse = trainers_command.parse
    monkeypatch.setattr(trainers_command, "parse", parsed_only)
    monkeypatch.setattr(main, "execute", lambda *_: 0)
    for command in commands(page):
        if any(sign in command for sign in "[…") or command.startswith(".venv/bin/ray "):
            continue
        words = None
        if (found := OF_A_SWEEP.search(command)) and (
            script := f"sweeps/{found[1] or found[2]}.py"
        ) not in MADE_ON_THE_PAGES:
            words = found[3] or ""
        elif found := OF_TRAINERS.search(command):
            script, words = f"trainers/{found[1]}/__main__.py", found[2]
        if words is not None:
            monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
            with pytest.raises(SystemExit) as exit_:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert not exit_.value.code, command


AXES_PAGE = ROOT / "docs" / "axes.md"


@pytest.mark.parametrize(
    ("command", "trials"), re.findall(r"^ {4}(python .*?)  # (\d+ trials)$", AXES_PAGE.read_text(), re.M)
)
def test_axes_of_the_page_come_to_so_many_trials(command, trials, tmp_path, monkeypatch, capsys):
    assert command in commands(AXES_PAGE)
    monkeypatch.chdir(tmp_path)
    (rows,) = blocks(AXES_PAGE, "csv")
    Path("trials.csv").write_text(rows)
    grid(tmp_path / "store", command, "--backend", "inline")
    assert f"full_grid: {trials} on" in capsys.readouterr().out


def test_the_page_of_axes_has_them_all():
    listed = re.findall(r"^\| `([\w-]+)` \|", AXES_PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(AXES)


@pytest.fixture(scope="module")
def storage(tiny_model, tmp_path_factory):
    """A store with two complete sweeps of two trials."""
    folder = tmp_path_factory.mktemp("docs") / "store"
    words = ("--models", str(tiny_model), "--only", "train=tiny_world", *SMALL)
    for name in ("full_grid", "OTHER"):
        assert run_sweep("full_grid", full_grid, catalog.PROFILES, folder, *words, "--name", name) == 0
    return folder


def grid(storage: Path, command: str, *more: str) -> None:
    words = [*shlex.split(command)[2:], *more, "--storage", str(storage)]
    with pytest.raises(SystemExit) as ended:
        main.main(main.Grid(build=full_grid), storage.parent / "full_grid.py", arguments=words)
    assert not ended.value.code


@pytest.mark.parametrize("command", commands(ROOT / "docs" / "report.md"))
def test_a_report_of_the_page_is_made(command, storage, capsys):
    grid(storage, command)
    assert "token-level shift" in capsys.readouterr().out
    page = "compare-OTHER/compare.html" if "--compare" in command else "report.html"
    assert (storage / "sweeps" / "full_grid" / "report" / page).is_file()


@pytest.mark.parametrize("command", commands(ROOT / "docs" / "planning.md"))
def test_a_plan_of_the_page_is_made(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Without a cluster it asks Ray, which is not started here.
    grid(tmp_path / "store", command, *([] if "--cluster" in command else ["--backend", "inline"]))
    assert ("72" if "--cluster" in command else "24 trials") in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


SWEEPS_ON_DATA = [text for text in commands(ROOT / "docs" / "data.md") if "python sweeps/" in text]


@pytest.mark.parametrize("command", SWEEPS_ON_DATA)
def test_a_sweep_takes_data_as_the_page_says(command, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"q{n}", "best": f"yes, {n}", "worst": f"no, not {n}", "problem": n // 2}
        for n in range(24)
    ]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, _, *words = shlex.split(command)
    storage = tmp_path / "store"
    few = ("--models", str(tiny_model), "--epochs", "1")
    assert run_sweep("full_grid", full_grid, catalog.PROFILES, storage, *words, *few) == 0
    evaluated = trial_rows(storage, "full_grid")
    assert {(row["train_set"], row["evaluation_set"]) for row in evaluated} == {("mine", "mine")}
    assert {row["category"] for row in evaluated} == {"in-distribution"}


def blocks(page: Path, kind: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == kind]


# One process pays for the imports of all, and draws none of the figures that tests/orchestrator looks at.
FOLLOW = """
import json, runpy, sys
from orchestrator.report import page

page.every_figure = lambda *_: ()
for run, name, *words in json.loads(sys.argv[1]):
    sys.argv = [name, *words]
    try:
        getattr(runpy, run)(name, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    print("= ended =")
"""


def test_whoever_follows_the_pages_on_adding_has_a_reward_type_and_experiments(tiny_model, tmp_path):
    for folder in ("trainers", "orchestrator", "sweeps", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    pages = [ROOT / "docs" / f"adding_{what}.md" for what in ("a_reward_type", "an_experiment")]
    texts = [text for page in pages for text in blocks(page, "python")]
    for file, text in zip(MADE_ON_THE_PAGES, texts, strict=True):
        (tmp_path / file).write_text(text)
    simpo, trains, reads = (shlex.split(command)[1:] for page in pages for command in commands(page))
    small = ("--models", str(tiny_model), *SMALL, "--backend", "inline")
    # At this rate the values of beta come apart.
    apart = ("--lr", "1e-2", "--effective-batch", "1")
    lines = [
        ("run_module", "pytest", "tests/trainers/test_simpo.py", "-p", "no:cacheprovider"),
        ("run_path", *simpo, *small, "--only", "train=tiny_world", "--storage", "store"),
        ("run_path", *trains, *small, *apart, "--storage", "store"),
        ("run_path", *reads, "--storage", "store"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, json.dumps(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested, *_, read, _ = done.stdout.split("= ended =\n")
    assert "1 passed" in tested
    rows = trial_rows(tmp_path / "store", "simpo")
    assert {row["reward"] for row in rows if row["evaluated"]} == {"simpo", "im_rm"}
    rows = trial_rows(tmp_path / "store", "betas")
    assert {row["reward"] for row in rows if row["evaluated"]} == {
        f"im_rm_beta={beta}" for beta in (0.01, 0.1, 1)
    }
    accuracies = [row["accuracy"] for row in rows if row["evaluation_set"] == "tiny_world_paraphrase"]
    assert min(accuracies) < max(accuracies)
    (line,) = [line for line in read.splitlines() if line.startswith("| tiny_world_paraphrase ")]
    assert line.endswith(f"| {max(accuracies):.3f} |")


def test_functions_that_the_walk_along_a_trial_links_to_are_defined_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    linked = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", text)
    assert len(linked) >= 12
    missing = [
        (name, file)
        for name, file in linked
        if not re.search(rf"^\s*(?:async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)
    ]
    assert missing == []
