"""`python -m trainers.data`: what is printed, what is written, how faults end; the commands of docs/data.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.trainers.architectures import word_tokenizer
from tests.trainers.command_line import said
from tests.trainers.digests import content_digest
from trainers.command import UNREAD
from trainers.data.sources import read_pairs
from trainers.specs import DatasetSpec

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}
PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
COMMANDS = [found[1] for found in re.finditer(r"^    \.venv/bin/python -m trainers\.data (.+)$", PAGE, re.M)]


@pytest.fixture
def say(capsys):
    return lambda *words: said(words, capsys)


def rows(file: Path, *lines: object) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def pairs_of(source: Path, split: str = "train", **more: object):
    pairs = read_pairs(DatasetSpec(name="a", source=str(source), **more), split)
    return pairs, content_digest(pairs)


def test_list_names_every_set_with_revision_and_source(say):
    code, out, _ = say("list")
    assert code == 0
    found = {line.split()[0]: line.split()[1:3] for line in out.splitlines()}
    assert found["ultrafeedback"] == ["3949bf5f8c17", "HuggingFaceH4/ultrafeedback_binarized"]
    assert found["rewardmath"] == ["-", "RewardMATH/RewardMATH_pairwise"]


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    command = [sys.executable, "-m", "trainers.data", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == UNREAD


def test_show_prints_pairs_as_a_model_reads_them(say, tmp_path):
    word_tokenizer(["<unk>", "why?", "because", "no", "idea", "Be"], unk_token="<unk>").save_pretrained(
        tmp_path
    )
    system = [{"role": "system", "content": "Be"}, {"role": "user", "content": "why?"}]
    file = rows(tmp_path / "own.jsonl", GOOD, {**GOOD, "prompt": system})
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}")
    words = ("show", file, "--model", tmp_path)
    _, out, _ = say(*words)
    assert "[prompt, 3 tokens] <|user|>·why?·<|assistant|>" in out
    assert "[rejected, 2 tokens] no·idea" in out
    _, out, _ = say(*words, "--template", template)
    assert out.count("[prompt, 1 tokens] why?") == 1
    assert "[prompt, 2 tokens] Be·why?" in out
    assert say(*words, "--template", template, "--system", "refuse")[0] == 2
    rows(file, {**GOOD, "rejected": "idea </think> no idea"})
    _, out, _ = say(*words, "--reasoning", "keep")
    assert "[rejected, 4 tokens, the first 2 not scored] idea·<unk>·no·idea" in out


def test_prepare_keeps_a_set_that_is_the_same_set(say, tmp_path, shared):
    out, source = tmp_path / "out", shared / "data" / "rewardmath"
    code, printed, _ = say("prepare", source, "--out", out)
    assert code == 0
    record = json.loads((out / "prepared.json").read_text())
    for split, count in (("train", 2000), ("test", 200)):
        _, digest = pairs_of(out, split)
        assert pairs_of(source, split)[1] == digest == record["splits"][split]["digest"]
        assert f"split {split}: {count} pairs, content {digest[:16]}" in printed
        assert record["splits"][split]["rows"] == count
    assert sorted(path.name for path in out.iterdir()) == ["prepared.json", "test.jsonl", "train.jsonl"]


def test_a_copy_has_no_revision_that_nobody_has_checked(say, shared):
    name = "ultrafeedback_french"
    _, out, _ = say("show", name, "--from", shared / "data" / name, "--pairs", "0")
    assert out.endswith(f"data/{name}\n")


CALLS = [
    {"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ("1", {"b": 2})
]
ASKED = {"role": "user", "content": "why?"}
PROMPTS = [
    [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "20 C"}]
    for call in CALLS
]
ANSWER = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
NOTED = {"role": "assistant", "content": "no", "tokens": 1}
BESIDE = {"tools": [{"name": "f"}], "margin": 0.5, "orig_chosen": "yes"}
BESIDE |= {"rewritten_chosen": "sure", "rewritten_rejected": "nope"}


def test_all_that_a_pair_has_outlives_every_file_that_is_written(say, tmp_path):
    several = {"prompt": PROMPTS[1], "chosen": [ANSWER, ASKED, ANSWER], "rejected": "no"}
    data = rows(
        tmp_path / "train.jsonl", GOOD, {**GOOD, "prompt": PROMPTS[0], "rejected": NOTED, **BESIDE}, several
    )
    (pairs, digest) = pairs_of(data)
    assert [len(pair.chosen_turns) for pair in pairs] == [0, 0, 3]
    assert (pairs[1].margin, pairs[1].rewritten, pairs[1].original_chosen) == (0.5, ("sure", "nope"), "yes")
    assert say("prepare", data, "--out", tmp_path / "out")[0] == 0
    assert pairs_of(tmp_path / "out") == (pairs, digest)
    shown = [json.loads(text) for text in re.split("── . ──", say("show", data, "--pairs", "3")[1])[1:]]
    assert pairs_of(rows(tmp_path / "shown.jsonl", *shown)) == (pairs, digest)
    rated = {"prompt": "why?", "response_1": "so", "response_2": "because"}
    ties = rows(tmp_path / "b.jsonl", *({**rated, "preference_strength": strength} for strength in (0, 2)))
    assert say("prepare", ties, "--ties", "--out", tmp_path / "ties")[0] == 0
    found, _ = pairs_of(tmp_path / "ties", ties=True)
    assert [(pair.tie, pair.margin) for pair in found] == [(True, None), (False, 2.0)]
    assert len(pairs_of(tmp_path / "ties")[0]) == 1


def test_prepare_keeps_a_split_that_is_named_once_and_show_says_which(say, tmp_path, monkeypatch):
    folder = rows(tmp_path / "mine" / "validation.jsonl", GOOD).parent
    _, printed, _ = say("prepare", f"{folder}:validation", "--out", tmp_path / "out")
    assert printed.count("split validation: 1 pairs") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prepared.json", "validation.jsonl"]
    # Killed after its note, and asked for again in other words.
    (tmp_path / "out" / "validation.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    assert say("prepare", "mine:validation", "--out", "out")[0] == 0
    assert (tmp_path / "out" / "validation.jsonl").is_file()
    assert "split validation: 1 pairs" in say("show", f"{folder}:validation")[1]
    # A split that is no longer written would stay as that of the new set.
    rows(folder / "train.jsonl", GOOD)
    assert "is no new folder" in say("prepare", folder, "--out", tmp_path / "out")[2]


def test_prepare_maps_columns_splits_by_problem_and_says_what_bad_rows_and_a_division_leave(say, tmp_path):
    lines = [{"q": f"q{n}", "good": f"g{n // 2}", "bad": "b", "id": n // 2} for n in range(40)]
    data = rows(tmp_path / "mine.jsonl", *lines, {"q": "x", "good": 3, "bad": "b", "id": 99})
    words = ["prepare", data, "--columns", "prompt=q", "chosen=good", "rejected=bad", "--group-by", "id"]
    words += ["--test-share", "0.5", "--out", tmp_path / "out"]
    code, _, error = say(*words)
    assert code == 2
    assert "mine.jsonl, row 40: column 'good' holds int" in error
    assert not list((tmp_path / "out").glob("*.jsonl"))
    for _ in range(2):
        code, printed, _ = say(*words, "--skip-bad-rows")
        assert code == 0
    assert "1 bad rows left out:" in printed
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())["splits"]
    for split in ("train", "test"):
        left = f"→ 40 readable → {record[split]['rows']} in the {split} split"
        assert f"41 rows, read as prompt, chosen and rejected {left}" in printed
    train, test = ({pair.chosen for pair in pairs_of(tmp_path / "out", split)[0]} for split in record)
    assert train
    assert test
    assert not train & test
    assert len(train | test) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "tiny_world:validation"], 'split is "validation"'),
        (["show", "nothing_such"], "no known data set (ultrafeedback,"),
        (["show", "tiny_world", "--from", "a.jsonl"], "is not made of other files"),
        (["show", "persona", "--from", "gone.jsonl"], "there is no such file or folder"),
        (["show", "persona", "--columns", "prompt=a"], "which rows persona has is set"),
        (["show", "tiny_world", "--ties"], "--ties: which rows tiny_world has is set"),
        (["show", "a.jsonl", "--columns", "question=prompt"], "MEANING is one of prompt, chosen"),
        (["show", "a.jsonl", "--test-share", "2"], "a test share of 2.0"),
        (["show", "a.jsonl", "--split-seed", "1"], "--split-seed say how --test-share divides a set"),
        (["show", "a.jsonl", "--group-by", "prompt"], "--split-seed say how --test-share divides a set"),
        (["prepare", "a.jsonl", "--out", "damaged"], "--out damaged is no new folder"),
        (["prepare", "a.jsonl", "--out", "a.jsonl/in"], "there can be no folder a.jsonl/in"),
        (["prepare", "both", "--test-share", ".5", "--out", "o"], "both has a test split of its own"),
        (["show", "both:test", "--test-share", "0.5"], "both:test has a test split of its own"),
        (["prepare", "both/test.jsonl", "--out", "both"], "--out both is no new folder"),
        (["prepare", "a.jsonl", "--out", "a.jsonl"], "--out a.jsonl is no new folder"),
        (["show", "twice.parquet"], "column 'chosen' stands twice"),
        (["prepare", "empty", "--out", "out"], "neither a train nor a test split"),
        (
            ["rewrite", "turns.jsonl", *["--endpoint", "x", "--model", "m", "--out", "o.jsonl"]],
            "has several turns",
        ),
    ],
)
def test_wrong_usage_and_input_are_said_in_one_line(say, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    rows(Path("a.jsonl"), GOOD)
    rows(Path("both/test.jsonl"), GOOD)
    rows(Path("turns.jsonl"), {**GOOD, "chosen": [ANSWER]})
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/prepared.json").write_text("[")
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column] * 4, names=["prompt", "chosen", "chosen", "rejected"])
    parquet.write_table(table, "twice.parquet")
    code, _, error = say(*words)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_the_page_has_a_command_of_each_kind():
    assert {words.split()[0] for words in COMMANDS} == {"list", "show", "prepare", "rewrite"}


# Without those that need a network.
@pytest.mark.parametrize("words", [words for words in COMMANDS if "--endpoint https://" not in words])
def test_a_command_of_the_page_does_what_it_says(say, words, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"question": f"q{n}", "best": f"good {n}", "worst": "bad", "problem": n // 2, "unused": None}
        for n in range(40)
    ]
    rows(Path("mine.jsonl"), *lines)
    Path("agreeableness.jsonl").symlink_to(shared / "data" / "persona" / "agreeableness.jsonl")
    code, out, _ = say(*shlex.split(words))
    assert code == 0
    assert out.strip()
