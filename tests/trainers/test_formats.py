"""The user's own data: formats, column maps, splits, and rows that cannot be read."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainers.data.records import Digest, content_digest, read_written_pairs, write_pairs
from trainers.data.sources import iter_pairs, read_pairs, splits_of
from trainers.data.turns import MAX_CHARACTERS
from trainers.errors import DataError, SpecError
from trainers.specs import DatasetSpec

GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def read(source: Path, split: str = "train", left_out: list[str] | None = None, **more):
    return read_pairs(DatasetSpec(name="set", source=str(source), **more), split, left_out)


def jsonl(file: Path, *rows) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def csv_file(file: Path, *rows: list[str]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def test_every_format_and_row_group_layout_has_one_digest(tmp_path):
    from datasets import Dataset

    rows = [{**GOOD, "prompt": f'why\n{n}, or "so"?'} for n in range(3000)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    parquet.write_table(
        table.select(["rejected", "prompt", "chosen"]), tmp_path / "c.parquet", compression="gzip"
    )
    jsonl(tmp_path / "d.jsonl", *rows)
    csv_file(tmp_path / "e.csv", list(GOOD), *(list(row.values()) for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "f" / "train")
    Dataset.from_list(rows).save_to_disk(tmp_path / "g")
    with pa.OSFile(str(tmp_path / "h.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    mapped = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "x": 1} for row in rows]
    jsonl(tmp_path / "i.jsonl", *mapped)
    columns = (("prompt", "q"), ("chosen", "good"), ("rejected", "bad"))
    digests = {
        name: content_digest(read(tmp_path / name)) for name in ("a.parquet", "b.parquet", "c.parquet")
    }
    digests |= {
        name: content_digest(read(tmp_path / name)) for name in ("d.jsonl", "e.csv", "f", "g", "h.arrow")
    }
    digests["i.jsonl"] = content_digest(read(tmp_path / "i.jsonl", columns=columns))
    assert len(set(digests.values())) == 1, digests


def test_rows_come_one_by_one(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": 3})
    pairs = iter_pairs(DatasetSpec(name="set", source=str(rows)), "train")
    assert next(pairs).chosen == "because"
    with pytest.raises(DataError, match="row 1"):
        next(pairs)


def test_the_formats_that_trl_documents_are_one_pair(tmp_path):
    user, answer, worse = (
        {"role": role, "content": text}
        for role, text in (("user", "The sky is"), ("assistant", "blue."), ("assistant", "green."))
    )
    files = [
        jsonl(tmp_path / "1.jsonl", {"prompt": "The sky is", "chosen": "blue.", "rejected": "green."}),
        jsonl(tmp_path / "2.jsonl", {"prompt": [user], "chosen": [answer], "rejected": [worse]}),
        jsonl(tmp_path / "3.jsonl", {"chosen": [user, answer], "rejected": [user, worse]}),
        # Of texts, the space before the first word that differs is nobody's.
        jsonl(tmp_path / "4.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ]
    assert len({content_digest(read(file)) for file in files}) == 1


@pytest.mark.parametrize(
    "row", [{"chosen": "same", "rejected": "same"}, {"chosen": "The sky is", "rejected": "The sky is blue."}]
)
def test_texts_that_leave_no_response_after_what_they_share_are_refused(tmp_path, row):
    with pytest.raises(DataError, match="row 0: column 'chosen' is empty"):
        read(jsonl(tmp_path / "a.jsonl", row))


def test_a_column_map_that_cannot_be_meant_is_refused():
    with pytest.raises(SpecError, match="'question' is not one of prompt, chosen"):
        DatasetSpec(name="a", source="a", columns=(("question", "prompt"),))
    with pytest.raises(SpecError, match="mapped twice"):
        DatasetSpec(name="a", source="a", columns=(("prompt", "a"), ("prompt", "b")))
    with pytest.raises(SpecError, match="give a test share"):
        DatasetSpec(name="a", source="a", group_by="problem")


def problems(folder: Path, count: int = 400) -> Path:
    rows = [
        {**GOOD, "prompt": f"{n} {side}", "chosen": f"right {n}", "problem": n}
        for n in range(count)
        for side in "abc"
    ]
    return jsonl(folder / "a.jsonl", *rows)


def test_a_set_is_split_by_problem(tmp_path):
    file = problems(tmp_path)
    halves = {split: read(file, split, group_by="problem", test_share=0.25) for split in ("train", "test")}
    by_problem = {split: {pair.chosen for pair in pairs} for split, pairs in halves.items()}
    assert not by_problem["train"] & by_problem["test"]
    assert len(halves["train"]) + len(halves["test"]) == 1200
    assert all(len(pairs) == 3 * len(by_problem[split]) for split, pairs in halves.items())
    assert len(by_problem["test"]) == pytest.approx(100, abs=30)
    other = read(file, "test", group_by="problem", test_share=0.25, split_seed=1)
    assert {pair.chosen for pair in other} != by_problem["test"]
    assert splits_of(DatasetSpec(name="a", source=str(file), test_share=0.25)) == ("train", "test")


def test_a_problem_stays_where_it_is_when_rows_are_added(tmp_path):
    few = {pair.chosen for pair in read(problems(tmp_path, 40), "test", group_by="problem", test_share=0.5)}
    many = {pair.chosen for pair in read(problems(tmp_path, 80), "test", group_by="problem", test_share=0.5)}
    assert few == many & {f"right {n}" for n in range(40)}


def test_without_a_group_column_pairs_of_one_prompt_stay_together(tmp_path):
    rows = [{**GOOD, "prompt": f"p{n}", "chosen": f"{n} {side}"} for n in range(100) for side in "ab"]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    train, test = (read(file, split, test_share=0.5) for split in ("train", "test"))
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    assert len(train) + len(test) == 200


def test_a_row_without_a_group_is_named(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "problem": 1}, {**GOOD, "problem": None})
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: no value in the group column 'problem'"):
        read(file, "train", group_by="problem", test_share=0.01)


BAD_LINES = {
    "a number": (json.dumps({**GOOD, "chosen": 3}).encode(), "column 'chosen' holds int"),
    "a null": (json.dumps({**GOOD, "rejected": None}).encode(), "column 'rejected' holds NoneType"),
    "a null row": (b"null", "expected an object, found NoneType"),
    "empty": (json.dumps({**GOOD, "chosen": " "}).encode(), "column 'chosen' is empty"),
    "no UTF-8": (b'{"prompt": "a", "chosen": "\xff\xfe", "rejected": "b"}', "byte 0xff at 27 is no UTF-8"),
    "a million characters": (
        json.dumps({**GOOD, "chosen": "x" * 1_000_000}).encode(),
        f"column 'chosen' has 1,000,000 characters; at most {MAX_CHARACTERS:,}",
    ),
    "a name twice": (
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        "'chosen' stands twice",
    ),
    "cut off": (b'{"prompt": "a", "chos', "cannot be read as JSON"),
    "messages and text": (
        json.dumps(
            {**GOOD, "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ).encode(),
        "column 'chosen' begins with a user turn that the prompt does not have",
    ),
    "a column missing": (b'{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_row_is_named_or_left_out_and_listed(tmp_path, what):
    line, message = BAD_LINES[what]
    file = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(b"\n".join([good, line, b"", good]))
    with pytest.raises(DataError) as raised:
        read(file)
    assert f"{file}, row 1" in str(raised.value)
    assert message in str(raised.value)
    left_out: list[str] = []
    assert len(read(file, skip_bad_rows=True, left_out=left_out)) == 2
    (said,) = left_out
    assert f"{file}, row 1" in said
    assert message in said


def test_bytes_that_are_no_utf8_in_parquet_are_named_by_row(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    fine = pa.array(["a", "b", "c"])
    table = pa.table({"prompt": fine, "chosen": broken, "rejected": fine})
    parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet, row 1: column 'chosen': Invalid UTF8 sequence\.$"):
        read(tmp_path / "bad.parquet")
    left_out: list[str] = []
    assert len(read(tmp_path / "bad.parquet", skip_bad_rows=True, left_out=left_out)) == 2
    assert len(left_out) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["prompt", "chosen", "chosen"], ["a", "b", "c"]], r"bad\.csv: column 'chosen' stands twice"),
        ([["prompt", "chosen"], ["a", "b"]], r"bad\.csv: no column 'rejected'"),
        ([list(GOOD), ["a", "b"]], r"bad\.csv, row 0: 2 cells under 3 column names"),
        ([list(GOOD), ["a", "b", ""]], r"bad\.csv, row 0: column 'rejected' is empty"),
        ([list(GOOD), ["a", "b", "c" * 600_000]], r"row 0: column 'rejected' has 600,000 characters"),
        ([], r"bad\.csv: no column 'chosen'"),
        ([list(GOOD)], "holds no pairs"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(csv_file(tmp_path / "bad.csv", *rows))


def test_bytes_that_are_no_utf8_in_csv_are_named_by_row(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"prompt,chosen,rejected\na,b,c\na,\xff,c\n")
    with pytest.raises(DataError, match=r"bad\.csv, row 1: column 'chosen' holds .* no UTF-8"):
        read(tmp_path / "bad.csv")


def test_a_quote_that_never_ends_is_named(tmp_path):
    (tmp_path / "bad.csv").write_text('prompt,chosen,rejected\na,"b,c\n')
    with pytest.raises(DataError, match=r"bad\.csv cannot be read as csv"):
        read(tmp_path / "bad.csv")


def test_duplicate_column_names_of_parquet_are_refused(tmp_path):
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column] * 4, names=["prompt", "chosen", "chosen", "rejected"])
    parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: column 'chosen' stands twice"):
        read(tmp_path / "bad.parquet")


def test_nothing_left_says_what_was_read(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "subset": "a"}, {**GOOD, "chosen": 3, "subset": "b"})
    with pytest.raises(DataError, match=r"holds no pairs\. 2 rows were read, 0 of them bad"):
        read(file, keep=(("subset", "c"),))
    with pytest.raises(
        DataError, match=r"2 rows were read, 1 of them bad\. The first: .*row 1: column 'chosen'"
    ):
        read(file, keep=(("subset", "b"),), skip_bad_rows=True)


def test_a_bom_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert content_digest(read(tmp_path / "a.jsonl")) == content_digest(
        read(jsonl(tmp_path / "b.jsonl", GOOD))
    )


def test_written_pairs_are_read_in_any_order(tmp_path):
    pairs = read(jsonl(tmp_path / "a.jsonl", *({**GOOD, "prompt": f"é\n{n}"} for n in range(20))))
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    found = read_written_pairs(tmp_path / "pairs.jsonl")
    assert list(found) == pairs
    assert [found[n] for n in (19, 0, -1)] == [pairs[n] for n in (19, 0, -1)]
    assert found[3:5] == pairs[3:5]
    digest = Digest()
    for pair in found:
        digest.add(pair)
    assert (digest.hexdigest(), digest.rows) == (content_digest(pairs), 20)
    with pytest.raises(IndexError):
        found[20]
