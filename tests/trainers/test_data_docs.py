"""The commands of docs/data.md do what it says, but for those that need a network."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.trainers.command_line import said

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
COMMANDS = [
    match[1]
    for match in re.finditer(r"^    \.venv/bin/python -m trainers\.data (.+)$", DOCUMENT.read_text(), re.M)
]
NEEDS_A_NETWORK = "--endpoint https://"


def test_there_are_commands():
    assert {words.split()[0] for words in COMMANDS} == {"list", "show", "prepare", "rewrite"}


@pytest.mark.parametrize("words", [words for words in COMMANDS if NEEDS_A_NETWORK not in words])
def test_a_documented_command_runs(words, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"q{n}", "best": f"good {n}", "worst": "bad", "problem": n // 2, "unused": None}
        for n in range(40)
    ]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("agreeableness.jsonl").symlink_to(shared / "data" / "persona" / "agreeableness.jsonl")
    code, out, _ = said(shlex.split(words), capsys)
    assert code == 0
    assert out.strip()
