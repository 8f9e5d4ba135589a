"""`python -m trainers.data`: what is printed, what is written, how faults end."""

import json
import re
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


@pytest.fixture
def say(capsys):
    return lambda *words: said(words, capsys)


def rows(file: Path, *lines: object) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_list_names_every_set_with_source_revision_and_sizes(say):
    code, out, _ = say("list")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("ultrafeedback ")]
    assert line.split()[1:5] == ["2000", "200", "3949bf5f8c17", "HuggingFaceH4/ultrafeedback_binarized"]
    (line,) = [line for line in out.splitlines() if line.startswith("rewardmath ")]
    assert line.split()[1:5] == ["2000", "200", "-", "RewardMATH/RewardMATH_pairwise"]


@pytest.mark.parametrize("words", ["list", "show --help"])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(words):
    command = [sys.executable, "-m", "trainers.data", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == UNREAD


def test_show_prints_pairs_and_the_content(say, shared):
    code, out, _ = say("show", shared / "data" / "ultrafeedback", "--split", "test", "--pairs", "1")
    assert code == 0
    pairs = read_pairs(DatasetSpec(name="a", source=str(shared / "data" / "ultrafeedback")), "test")
    assert f"200 pairs, content {content_digest(pairs)[:16]}" in out
    assert json.loads(out.partition("── 0 ──")[2])["prompt"][0]["content"].startswith("CI Integration")


def test_show_prints_pairs_as_a_model_reads_them(say, tmp_path):
    word_tokenizer(["<unk>", "why?", "because", "no", "idea", "Be"], unk_token="<unk>").save_pretrained(
        tmp_path
    )
    system = [{"role": "system", "content": "Be"}, {"role": "user", "content": "why?"}]
    file = rows(tmp_path / "own.jsonl", GOOD, {**GOOD, "prompt": system})
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content }} {% endfor %}", encoding="utf-8"
    )
    words = ("show", file, "--model", tmp_path)
    code, out, _ = say(*words)
    assert code == 0
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
    out = tmp_path / "out"
    code, printed, _ = say("prepare", shared / "data" / "rewardmath", "--out", out)
    assert code == 0
    assert "split train: 2000 pairs" in printed
    record = json.loads((out / "prepared.json").read_text())
    for split, count in (("train", 2000), ("test", 200)):
        pairs = read_pairs(DatasetSpec(name="out", source=str(out)), split)
        original = read_pairs(DatasetSpec(name="a", source=str(shared / "data" / "rewardmath")), split)
        assert content_digest(pairs) == content_digest(original) == record["splits"][split]["digest"]
        assert record["splits"][split]["rows"] == count
    assert sorted(path.name for path in out.iterdir()) == ["prepared.json", "test.jsonl", "train.jsonl"]


def test_prepare_keeps_ties_margins_and_rewritings_where_they_are_asked_for(say, tmp_path):
    rated = {"prompt": "why?", "response_1": "so", "response_2": "because", "preference_strength": 0}
    other = {"rewritten_chosen": "sure", "rewritten_rejected": "nope"}
    mine = tmp_path / "mine"
    mine.mkdir()
    rows(mine / "train-0.jsonl", rated, {**rated, "preference_strength": 2})
    rows(tmp_path / "beside.jsonl", {**GOOD, **other, "margin": 0.5})
    for source, kept in ((mine, [(True, None, None), (False, 2.0, None)]), (tmp_path / "beside.jsonl", None)):
        out = tmp_path / f"out_{source.stem}"
        assert say("prepare", source, "--ties", "--out", out)[0] == 0
        pairs = read_pairs(DatasetSpec(name="out", source=str(out), ties=True), "train")
        found = [(pair.tie, pair.margin, pair.rewritten) for pair in pairs]
        assert found == (kept or [(False, 0.5, ("sure", "nope"))])
    assert len(read_pairs(DatasetSpec(name="out", source=str(tmp_path / "out_mine")), "train")) == 1
    assert (
        "--ties: which rows tiny_world has is set"
        in say("prepare", "tiny_world", "--ties", "--out", tmp_path)[2]
    )


def test_turns_fields_and_tools_outlive_every_file_that_is_written(say, tmp_path):
    called = [{"type": "function", "function": {"name": "f", "arguments": {"a": n}}} for n in ("1", {"b": 2})]
    asked = [
        [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "", "tool_calls": called[:1]}]
    ]
    asked.append([*asked[0][:1], {"role": "assistant", "content": "", "tool_calls": called[1:]}])
    prompts = [[*turns, {"role": "tool", "content": "20 C", "name": "f"}] for turns in asked]
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    noted = {"role": "assistant", "content": "no", "tokens": 1}
    lines = [
        {
            "prompt": prompts[0],
            "chosen": "yes, quite",
            "rejected": noted,
            "tools": [{"name": "f"}],
            "margin": 0.5,
            "orig_chosen": "yes",
        },
        {"prompt": prompts[1], "chosen": [answer, *prompts[0][:1], answer], "rejected": "no"},
    ]
    data = rows(tmp_path / "train.jsonl", GOOD, *lines)
    (pairs, digest) = pairs_of(data)
    assert [len(pair.chosen_turns) for pair in pairs] == [0, 0, 3]
    assert [pair.margin for pair in pairs] == [None, 0.5, None]
    assert say("prepare", data, "--out", tmp_path / "out")[0] == 0
    assert pairs_of(tmp_path / "out") == (pairs, digest)
    shown = [json.loads(text) for text in re.split("── . ──", say("show", data, "--pairs", "3")[1])[1:]]
    assert pairs_of(rows(tmp_path / "shown.jsonl", *shown)) == (pairs, digest)
    words = ["rewrite", data, "--split", "train", "--rules", "english", "--out"]
    code, _, error = say(*words, tmp_path / "french.jsonl")
    assert code == 2
    assert "pair 2: a response has several turns" in error
    plain = rows(tmp_path / "plain.jsonl", GOOD, lines[0])
    words[1] = plain
    assert say(*words, tmp_path / "rewritten.jsonl")[0] == 0
    found, _ = pairs_of(tmp_path / "rewritten.jsonl")
    assert [(pair.prompt, pair.tools) for pair in found] == [(p.prompt, p.tools) for p in pairs[:2]]


def pairs_of(source: Path):
    pairs = read_pairs(DatasetSpec(name="a", source=str(source)), "train")
    return pairs, content_digest(pairs)


def test_prepare_keeps_a_split_that_is_named_once_and_show_says_which(say, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows(folder / "validation.jsonl", GOOD)
    code, printed, error = say("prepare", f"{folder}:validation", "--out", tmp_path / "out")
    assert code == 0, error
    assert printed.count("split validation: 1 pairs") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prepared.json", "validation.jsonl"]
    assert "split validation: 1 pairs" in say("show", f"{folder}:validation")[1]


def test_prepare_maps_columns_splits_by_problem_and_lists_bad_rows(say, tmp_path):
    lines = [{"q": f"q{n}", "good": f"g{n // 2}", "bad": "b", "id": n // 2} for n in range(40)]
    data = rows(tmp_path / "mine.jsonl", *lines, {"q": "x", "good": 3, "bad": "b", "id": 99})
    words = [
        "prepare",
        data,
        "--out",
        tmp_path / "out",
        "--columns",
        "prompt=q",
        "chosen=good",
        "rejected=bad",
    ]
    words += ["--group-by", "id", "--test-share", "0.5"]
    code, _, error = say(*words)
    assert code == 2
    assert "mine.jsonl, row 40: column 'good' holds int" in error
    assert not list((tmp_path / "out").glob("*.jsonl"))
    code, printed, _ = say(*words, "--skip-bad-rows")
    assert code == 0
    assert "1 bad rows left out:" in printed
    train, test = (
        {
            json.loads(line)["chosen"]
            for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        }
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test
    assert len(train | test) == 20


def test_prepare_says_what_bad_rows_and_a_division_leave(say, tmp_path):
    data = rows(tmp_path / "a.jsonl", *({**GOOD, "prompt": f"p{n}"} for n in range(30)), {"prompt": "x"})
    words = ["prepare", data, "--out", tmp_path / "out", "--skip-bad-rows", "--test-share", "0.5"]
    code, printed, _ = say(*words)
    assert code == 0
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())["splits"]
    for split in ("train", "test"):
        left = f"→ 30 readable → {record[split]['rows']} in the {split} split"
        assert f"31 rows, read as prompt, chosen and rejected {left}" in printed
    assert "→" not in say("prepare", "tiny_world", "--out", tmp_path / "tiny")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing_such"], "no known data set (ultrafeedback,"),
        (["show", "tiny_world", "--from", "a.jsonl"], "is not made of other files"),
        (["show", "persona", "--from", "gone.jsonl"], "there is no such file or folder"),
        (["show", "persona", "--columns", "prompt=a"], "which rows persona has is set"),
        (["show", "tiny_world", "--test-share", "0.5"], "--test-share: which rows tiny_world has is set"),
        (["show", "a.jsonl", "--columns", "prompt"], "write MEANING=COLUMN"),
        (["show", "a.jsonl", "--columns", "question=prompt"], "MEANING is one of prompt, chosen"),
        (["show", "a.jsonl", "--test-share", "2"], "a test share of 2.0"),
        (["show", "a.jsonl", "--pairs", "-1"], "--pairs -1"),
        (["show", "twice.parquet"], "column 'chosen' stands twice"),
        (["prepare", "empty", "--out", "out"], "neither a train nor a test split"),
    ],
)
def test_wrong_usage_and_input_are_said_in_one_line(say, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    rows(Path("a.jsonl"), GOOD)
    Path("empty").mkdir()
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column] * 4, names=["prompt", "chosen", "chosen", "rejected"])
    parquet.write_table(table, "twice.parquet")
    code, _, error = say(*words)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
