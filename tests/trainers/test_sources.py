"""Preference data from files, real and bad."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainers.data.records import content_digest
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.specs import DatasetSpec

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def read(source: Path, split: str = "train", **more):
    return read_pairs(DatasetSpec(name="set", source=str(source), **more), split)


def write_jsonl(file: Path, *rows) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("folder", "split", "count"),
    [
        ("ultrafeedback", "train", 200),
        ("ultrafeedback", "test", 200),
        ("ultrafeedback_paraphrase", "test", 200),
        ("rewardmath", "train", 2000),
        ("rewardmath", "test", 200),
        ("rewardbench_math", "test", 200),
    ],
)
def test_real_sets_are_read_whole(shared, folder, split, count):
    pairs = read(shared / "data" / folder, split)
    assert len(pairs) == count
    assert all(pair.prompt[0].role == "user" and pair.chosen.strip() for pair in pairs)


def test_a_rewriting_says_what_it_rewrites(shared):
    rewritten = read(shared / "data" / "ultrafeedback_paraphrase", "test")
    originals = {pair.chosen for pair in read(shared / "data" / "ultrafeedback", "test")}
    assert {pair.original_chosen for pair in rewritten} <= originals


def test_the_same_rows_have_one_digest_in_every_format(tmp_path):
    rows = [{**GOOD, "prompt": f"why {n}?"} for n in range(50)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    write_jsonl(tmp_path / "c.jsonl", *rows)
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(tmp_path / "d" / "train")
    found = {content_digest(read(tmp_path / name)) for name in ("a.parquet", "b.parquet", "c.jsonl", "d")}
    assert len(found) == 1
    changed = write_jsonl(tmp_path / "e.jsonl", *rows[:-1], {**rows[-1], "chosen": "because!"})
    assert content_digest(read(changed)) not in found


def test_chat_messages_are_the_same_as_their_text(tmp_path):
    user = {"role": "user", "content": GOOD["prompt"]}
    answer = {"role": "assistant", "content": GOOD["chosen"]}
    worse = {"role": "assistant", "content": GOOD["rejected"]}
    files = [
        write_jsonl(tmp_path / "text.jsonl", GOOD),
        write_jsonl(tmp_path / "messages.jsonl", {"prompt": [user], "chosen": [answer], "rejected": [worse]}),
        write_jsonl(tmp_path / "implicit.jsonl", {"chosen": [user, answer], "rejected": [user, worse]}),
        write_jsonl(
            tmp_path / "both.jsonl", {"prompt": "why?", "chosen": [user, answer], "rejected": [user, worse]}
        ),
    ]
    assert len({content_digest(read(file)) for file in files}) == 1


def test_rows_are_kept_by_column(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", {**GOOD, "subset": "hep-cpp"}, {**GOOD, "subset": "math-prm"})
    assert len(read(file, keep=(("subset", "hep*"),))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"prompt": "x", "chosen": "y"}], r"row 1: no column 'rejected'.*found prompt, chosen"),
        ([GOOD, {**GOOD, "chosen": 3}], r"row 1: column 'chosen' holds int"),
        ([GOOD, {**GOOD, "rejected": None}], r"row 1: column 'rejected' holds NoneType"),
        ([{**GOOD, "prompt": "  "}], r"row 0: column 'prompt' is empty"),
        ([{"chosen": "a", "rejected": "b"}], r"row 0: no column 'prompt'"),
        ([[1, 2]], r"row 0: expected an object, found list"),
        ([], r"holds no pairs"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(write_jsonl(tmp_path / "bad.jsonl", *rows))


def test_different_prompts_in_one_pair_are_refused(tmp_path):
    def talk(prompt):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]

    file = write_jsonl(tmp_path / "bad.jsonl", {"chosen": talk("a"), "rejected": talk("b")})
    with pytest.raises(DataError, match="differ between chosen and rejected"):
        read(file)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as parquet"):
        read(tmp_path / "bad.parquet")
    (tmp_path / "bad.jsonl").write_text('{"prompt": ')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 0 cannot be read as JSON"):
        read(tmp_path / "bad.jsonl")


def test_a_parquet_without_a_column_is_refused(tmp_path):
    parquet.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="no column 'rejected'"):
        read(tmp_path / "bad.parquet")


def test_a_folder_without_the_split_says_what_it_holds(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no test split: expected test\.parquet.*found train\.jsonl"):
        read(tmp_path, "test")
