"""`python -m trainers.data audit`: what is audited, audit.json, also printed, and usage errors that say what to do."""

import json
from pathlib import Path

import pytest

from tests.trainers.command_line import said


@pytest.fixture
def audit(tmp_path: Path, monkeypatch, capsys):
    """Run the command in an empty folder: what it printed, and audit.json."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, dict]:
        code, out, error = said(["audit", *arguments], capsys)
        assert code == 0, error
        return out, json.loads(Path("audit.json").read_text())

    return run


def write(folder: str, **splits: list[dict[str, str]]) -> None:
    Path(folder).mkdir()
    for split, rows in splits.items():
        (Path(folder) / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(count: int, tag: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{tag} question {i}", "chosen": f"{tag} good {i}", "rejected": f"{tag} bad {i}"}
        for i in range(count)
    ]


def sets_of(record: dict) -> list[tuple[str, str, int]]:
    return [(item["name"], item["role"], item["pairs"]) for item in record["sets"]]


def test_a_folder_is_audited_between_its_splits_and_rows_that_are_no_pair_are_a_finding(audit):
    train = rows(20, "set")
    bad = {"prompt": "p", "chosen": "", "rejected": "b"}
    write("data", train=[*train, bad], test=[*rows(8, "new"), *train[:2]])
    out, record = audit("data")
    assert sets_of(record) == [("data/train", "train", 20), ("data/test", "eval", 10)]
    assert record["between"][0]["leaked"] == [8, 9]
    assert "error: leak, data/test evaluated, data/train trained on: 2 of 10 pairs" in out
    assert "2 error, 0 warn, 0 info" in out
    (found,) = [item for item in record["findings"] if item["what"] == "rows that are no pair"]
    assert (found["severity"], found["where"]) == ("error", "data/train")
    assert found["number"].startswith("1 of 21 rows (")
    assert "train.jsonl, row 20: column 'chosen' is empty" in found["number"]


def test_sets_may_only_train_or_be_evaluated_and_a_split_that_is_named_does_not_leak_into_itself(audit):
    write("data", train=rows(20, "set"), test=rows(9, "x"), validation=[*rows(8, "new"), *rows(1, "set")])
    row = {"id": "1", "prompt": "p", "chosen": "a", "rejected": "b", "source": "s", "language": "l"}
    Path("suite.jsonl").write_text(json.dumps(row))
    words = ("--train", "./data", "--eval", "mine=./data", "--json")
    out, record = audit("data:validation", "m_rewardbench=suite.jsonl", *words)
    assert json.loads(out) == record
    assert sets_of(record) == [
        ("data/train", "train", 20),
        ("data/test", "eval", 9),
        ("m_rewardbench/test", "eval", 1),
        ("mine/test", "eval", 9),
    ]
    assert [item["leaked"] for item in record["between"]] == [[8], [], []]


def test_columns_are_mapped_and_a_file_is_divided_by_problem(audit):
    lines = [{"q": f"q {n}", "good": "yes", "bad": f"no {n}", "id": n // 2} for n in range(40)]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--columns", "prompt=q", "chosen=good", "rejected=bad", "--group-by", "id")
    _, record = audit("mine.jsonl", *words, "--test-share", "0.5")
    assert [(name, role) for name, role, _ in sets_of(record)] == [
        ("mine/train", "train"),
        ("mine/test", "eval"),
    ]
    assert sum(item["pairs"] for item in record["sets"]) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one set"),
        (["./nowhere"], "./nowhere: there is no such file or folder"),
        (["empty"], "empty has no test split"),
        (
            ["bad.jsonl"],
            "1 rows were read, 1 of them bad. The first: bad.jsonl, row 0: column 'chosen' is empty",
        ),
        (["good.jsonl", "--eval", "./good.jsonl"], "two sets are called good"),
        (["good.jsonl", "--out", "."], "--out . is a folder"),
        (["tiny_world", "--columns", "prompt=q"], "--columns: no set here can be read so"),
        (["both", "--test-share", "0.5"], "--test-share: no set here can be read so"),
        (["good.jsonl", "--tokenizer", "./nowhere"], "./nowhere"),
        (["good.jsonl", "--columns", "prompt=q"], "no column 'q'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write("both", train=rows(3, "x"), test=rows(3, "y"))
    good = rows(3, "x")
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    Path("bad.jsonl").write_text(json.dumps({**good[1], "chosen": " "}) + "\n")
    code, out, err = said(["audit", *arguments], capsys)
    assert code == 2
    assert message in " ".join((out + err).split())
    assert not Path("audit.json").exists()


def test_with_a_tokenizer_lengths_are_measured_in_its_tokens_too(audit, tiny_model):
    write("data", test=rows(9, "x"))
    _, record = audit("data", "--tokenizer", str(tiny_model))
    (found,) = record["sets"]
    assert [baseline["unit"] for baseline in found["baselines"]] == ["characters", "words", "tokens"]
    assert found["lengths"]["chosen"]["tokens"]["median"] > 0
