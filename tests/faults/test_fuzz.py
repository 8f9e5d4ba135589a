"""Spoilt inputs: each is refused with a message that names it, exit 2, no traceback, and nothing is started."""

import contextlib
import io
import json
import re
from pathlib import Path

from orchestrator.cli import main, run
from orchestrator.cli.session import USAGE
from sweeps import full_grid
from tests.faults.mutations import ROWS, all_cases

WHOLE = 200
VALID_AT_MOST = 0.1
# Ours, or that of the parser of words.
REFUSAL = r"(?m)^error: \S|^For full helptext|Parsing error|full_grid.py --help"


class Started(BaseException):
    """Raised in the place of running the sweep."""


def outcome(arguments: list[str], folder: Path) -> tuple[object, str]:
    """The exit code, or `started`; and all that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main.main(main.Grid(build=full_grid.full_grid), folder / "full_grid.py", arguments=arguments)
        except SystemExit as ended:
            return ended.code, said.getvalue()
        except Started:
            return "started", said.getvalue()
    return None, said.getvalue()


def started(*arguments: object) -> None:
    raise Started


def test_every_spoilt_input_is_refused_by_name_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_missing", started)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for split in ("train", "test"):
        rows = [{**row, "prompt": f"{split} {row['prompt']}"} for row in ROWS]
        (tmp_path / "good").mkdir(exist_ok=True)
        (tmp_path / "good" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usual = {
        "--models": ["llama-64"],
        "--train-sets": ["good"],
        "--eval-sets": ["good"],
        "--profile": ["laptop"],
        "--backend": ["inline"],
        "--rewards": ["im_rm"],
        # Some spoilt files are another grid of the same name.
        "--replace": [],
    }
    assert outcome([word for flag in usual for word in (flag, *usual[flag])], tmp_path)[0] == "started"
    cases = list(all_cases(tmp_path / "spoilt"))
    assert len(cases) >= WHOLE
    valid, wrong = [], []
    for what, words in cases:
        others = {flag: values for flag, values in usual.items() if flag not in words}
        arguments = [*words, *(word for flag in others for word in (flag, *others[flag]))]
        code, said = outcome(arguments, tmp_path)
        if code == "started":
            valid.append(what)
        elif not _refused(code, said, words[1:]):
            wrong.append(f"{what}: {code}: {said[-300:]} {_defect(tmp_path)}")
    print(len(cases), len(valid), valid)
    assert not wrong, "\n".join(wrong)
    assert len(valid) < VALID_AT_MOST * len(cases), valid


def _refused(code: object, said: str, words: list[str]) -> bool:
    """Exit 2 and no traceback, in words that name the file where there is one."""
    named = all(word.removeprefix("mine=") in said for word in words if word.startswith("mine="))
    return code == USAGE and "Traceback" not in said and bool(re.search(REFUSAL, said)) and named


def _defect(folder: Path) -> str:
    log = folder / "rmsweep-error.log"
    if not log.exists():
        return ""
    text = log.read_text()
    log.unlink()
    return text[-700:]
