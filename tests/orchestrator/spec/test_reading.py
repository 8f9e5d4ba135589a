"""The flags on rows of one's own sets: for all or one, what they leave alone, what they refuse, and what enters a key."""

import json
from pathlib import Path

import pytest

from orchestrator.cli import session
from orchestrator.cli.options import Options
from orchestrator.spec import catalog
from orchestrator.spec.datasets import ReadingOptions, read_as
from orchestrator.spec.resolve import resolve
from orchestrator.spec.selection import parse_dataset
from orchestrator.store.artifacts import Store
from sweeps.full_grid import full_grid
from trainers.errors import DataError, SpecError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a jsonl file into the working folder; its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, *rows: object) -> str:
        Path(name).write_text("\n".join(map(json.dumps, rows)))
        return name

    return write


def asked(number: int, **names: str) -> dict[str, object]:
    """A pair, its columns called otherwise."""
    row = {"prompt": f"q{number}", "chosen": f"good {number}", "rejected": "bad", "id": number // 2}
    return {names.get(key, key): value for key, value in row.items()}


def own(*names: str):
    return [parse_dataset(name, "--train-sets") for name in names]


def test_a_word_is_for_all_own_sets_or_for_the_one_it_names_and_the_catalogs_are_left_alone(file):
    names = [file(f"{name}.jsonl", asked(0)) for name in ("a", "b")]
    train, evaluated = read_as(
        [*own(*names), catalog.dataset("tiny_world")],
        own(names[1]),
        ReadingOptions(
            columns=("prompt=a/question", "b/prompt=q", "b/chosen=best"),
            test_share=0.25,
            group_by="id",
            skip_bad_rows=True,
        ),
    )
    first, second, named = train
    assert dict(first.columns) == {"prompt": "a/question"}
    assert dict(second.columns) == {"prompt": "q", "chosen": "best"}
    assert [(item.test_share, item.group_by) for item in train] == [(0.25, "id"), (0.25, "id"), (0, None)]
    assert first.skip_bad_rows
    assert named == catalog.dataset("tiny_world")
    # Trained on and evaluated, it is one set.
    assert evaluated == (second,)


def test_a_share_divides_what_is_trained_on_and_lacks_a_test_split(file, tmp_path):
    (tmp_path / "whole").mkdir()
    names = [file("mine.jsonl", asked(0)), file("whole/test.jsonl", asked(1)), file("other.jsonl", asked(2))]
    train, evaluated = read_as(
        own(names[0], "whole"), own("whole", names[2]), ReadingOptions(test_share=0.5, group_by="id")
    )
    assert [item.test_share for item in (*train, *evaluated)] == [0.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"columns": ("prompt",)}, "write MEANING=COLUMN"),
        ({"columns": ("question=prompt",)}, "MEANING is one of prompt"),
        ({"columns": ("min/prompt=q",)}, r"no set of one's own here is min; did you mean .*mine"),
        ({"columns": ("prompt=q", "prompt=r")}, "column 'prompt' is mapped twice"),
        ({"test_share": 1.0}, r"a test share of 1.0 is not in \[0, 1\)"),
        ({"group_by": "id"}, "say how --test-share divides"),
        ({"split_seed": 3}, "say how --test-share divides"),
    ],
)
def test_what_cannot_be_meant_is_refused(file, words, said):
    with pytest.raises(SpecError, match=said):
        read_as(own(file("mine.jsonl", asked(0))), [], ReadingOptions(**words))


def test_flags_that_concern_no_set_are_refused(file):
    words = {"columns": ("prompt=q",), "skip_bad_rows": True, "ratings": "best"}
    with pytest.raises(SpecError, match=r"--columns, --ratings, --skip-bad-rows: every set here is the"):
        read_as([catalog.dataset("tiny_world")], [], ReadingOptions(**words))
    with pytest.raises(SpecError, match="no training set of one's own lacks a test split"):
        read_as(
            [catalog.dataset("tiny_world")],
            own(file("mine.jsonl", asked(0))),
            ReadingOptions(test_share=0.5),
        )


def resolved(tmp_path, *names: str, **words: object):
    options = Options(
        models=("llama-64",), rewards=("ex_rm",), train_sets=names[:1], eval_sets=names, **words
    )
    sweep = full_grid(session.select(options, catalog.LAPTOP, "demo"))
    return resolve(sweep, Store(tmp_path / "store"))


def test_other_names_for_the_same_columns_are_the_same_trial(file, tmp_path):
    plain = file("plain.jsonl", *(asked(n) for n in range(20)))
    named = file("named.jsonl", *(asked(n, prompt="question", id="problem") for n in range(20)))
    (one,) = resolved(tmp_path, plain, test_share=0.5, group_by="id").plans
    (other,) = resolved(
        tmp_path, named, columns=("prompt=question",), test_share=0.5, group_by="problem"
    ).plans
    assert other.train.key == one.train.key
    assert [item.key for item in other.evaluations] == [item.key for item in one.evaluations]
    (elsewhere,) = resolved(tmp_path, plain, test_share=0.5, group_by="id", split_seed=1).plans
    assert elsewhere.train.key != one.train.key


def test_bad_rows_are_an_error_or_left_out_and_listed(file, tmp_path):
    data = file("mine.jsonl", *(asked(n) for n in range(20)), {**asked(9), "chosen": 7})
    with pytest.raises(DataError, match=r"mine\.jsonl, row 20"):
        resolved(tmp_path, data, test_share=0.5)
    found = resolved(tmp_path, data, test_share=0.5, skip_bad_rows=True)
    for split in ("train", "test"):
        said = [line for line in found.left_out if line.startswith(f"data set mine, split {split}: ")]
        assert "21 rows, read as prompt, chosen and rejected → 20 readable" in said[0]
        assert "1 bad rows left out: mine.jsonl, row 20" in said[1]
