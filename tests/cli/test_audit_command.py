"""`python -m trainers.data audit`: a table, audit.json, and usage errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.command_line import said
from trainers.command import command
from trainers.data.__main__ import Data, run

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def audit(tmp_path: Path):
    """Run the command in an empty folder."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "trainers.data", "audit", *arguments]
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "COLUMNS": "200",
            "HOME": str(tmp_path),
        }
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def write(folder: Path, **splits: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(count: int, tag: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{tag} question {i}", "chosen": f"{tag} good {i}", "rejected": f"{tag} bad {i}"}
        for i in range(count)
    ]


def test_a_folder_is_audited_between_its_splits(audit, tmp_path):
    train = rows(20, "set")
    data = write(tmp_path / "data", train=train, test=[*rows(8, "new"), *train[:2]])
    done = audit(str(data))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "audit.json").read_text())
    assert [(item["name"], item["role"], item["pairs"]) for item in said["sets"]] == [
        ("data/train", "train", 20),
        ("data/test", "eval", 10),
    ]
    assert said["between"][0]["leaked"] == [8, 9]
    assert "2 of 10 pairs" in done.stdout
    assert "1 error, 0 warn, 0 info" in done.stdout


def test_a_split_that_is_named_is_evaluated_and_does_not_leak_into_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", train=rows(20, "set"), validation=rows(8, "new"))
    row = {"id": "1", "prompt": "p", "chosen": "a", "rejected": "b", "source": "s", "language": "l"}
    (tmp_path / "suite.jsonl").write_text(json.dumps(row))
    code, *_ = said(["audit", "data:validation", "m_rewardbench=suite.jsonl", "--train", "data"], capsys)
    assert code == 0
    sets = json.loads((tmp_path / "audit.json").read_text())["sets"]
    assert [(item["name"], item["role"], item["pairs"]) for item in sets] == [
        ("data/train", "train", 20),
        ("data/test", "eval", 8),
        ("m_rewardbench/test", "eval", 1),
    ]


def test_sets_may_only_train_or_only_be_evaluated_and_json_is_printed(audit, tmp_path):
    write(tmp_path / "a", train=rows(5, "a"), test=rows(5, "a2"))
    write(tmp_path / "b", train=rows(5, "b"), test=rows(5, "a"))
    done = audit("--train", "./a", "--eval", "mine=./b", "--json", "--out", "out/audit.json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [(item["train"], item["evaluated"]) for item in said["between"]] == [("a/train", "mine/test")]
    assert said["between"][0]["leaked"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one set"),
        (["./nowhere"], "./nowhere: no such file or folder"),
        (["empty"], "empty has no test split"),
        (
            ["bad.jsonl"],
            "1 rows were read, 1 of them bad. The first: bad.jsonl, row 0: column 'chosen' is empty",
        ),
        (["good.jsonl", "--eval", "./good.jsonl"], "two sets are called good"),
        (["good.jsonl", "--out", "."], "--out . is a folder"),
        (["good.jsonl", "--tokenizer", "./nowhere"], "./nowhere"),
        (["good.jsonl", "--no-such-flag"], "no-such-flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    good = rows(3, "x")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    (tmp_path / "bad.jsonl").write_text(json.dumps({**good[1], "chosen": " "}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data", "audit", *arguments])
    with pytest.raises(SystemExit) as ended:
        command(Data, run, "trainers.data", models=False)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert message in " ".join((out + err).split())
    assert not (tmp_path / "audit.json").exists()


def test_rows_that_are_no_pair_are_a_finding_and_the_others_are_audited(audit, tmp_path):
    data = write(tmp_path / "data", train=[*rows(9, "set"), {"prompt": "p", "chosen": "", "rejected": "b"}])
    with (data / "train.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n{"prompt": "half')
    done = audit(str(data))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "audit.json").read_text())
    (found,) = [item for item in said["findings"] if item["what"] == "rows that are no pair"]
    assert (found["severity"], found["where"]) == ("error", "data/train")
    assert found["number"].startswith("3 of 12 rows (")
    assert "train.jsonl, row 9: column 'chosen' is empty" in found["number"]
    assert "A run refuses the set" in found["effect"]
    assert said["sets"][0]["pairs"] == 9
    assert len(said["sets"][0]["unreadable"]) == 3
    assert "rows that are no pair" in done.stdout


def test_columns_are_mapped_and_a_file_is_divided_by_problem(audit, tmp_path):
    data = tmp_path / "mine.jsonl"
    lines = [{"q": f"q {n}", "good": "yes", "bad": f"no {n}", "id": n // 2} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--columns", "prompt=q", "chosen=good", "rejected=bad", "--group-by", "id")
    done = audit(str(data), *words, "--test-share", "0.5")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "audit.json").read_text())
    assert [(item["name"], item["role"]) for item in said["sets"]] == [
        ("mine/train", "train"),
        ("mine/test", "eval"),
    ]
    assert sum(item["pairs"] for item in said["sets"]) == 40
    assert "rejected" in audit(str(data), "--columns", "prompt=q").stderr
