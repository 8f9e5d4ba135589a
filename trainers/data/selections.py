"""The paper's filters and draws: from the rows of a hub data set to the pairs that the paper used (paper §2).

Every draw comes from one torch generator in the order of the official code: a set that has one split is divided
first, then the train rows are drawn, then the test rows. Rows come out as prompt, chosen, rejected.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainers.data.formats import Located, Row
from trainers.errors import DataError

if TYPE_CHECKING:
    from torch import Generator

LENGTH_TOKENIZER = "meta-llama/Llama-3.2-1B"
LENGTH_TOKENIZER_VARIABLE = "RMSWEEP_LENGTH_TOKENIZER"
MAX_TOKENS = 512
SEED = 982

# The rows of a split of the source, from the start at each call.
RowsOf = Callable[[str], Iterator[Located]]
Texts = tuple[str, str, str]
# Whether each of some texts is short enough.
Short = Callable[[Sequence[str]], list[bool]]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How a named set is made of its source: `columns` are what a row must have."""

    run: Callable[[RowsOf, str, Short], Iterator[Located]]
    columns: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperDraw:
    """One of the paper's draws. `texts` gives prompt, chosen and rejected of a row, or None where it is dropped.

    With `test_rows` the source's `train_split` is divided and the last of a permutation are for testing.
    """

    texts: Callable[[Row], Texts | None]
    train_split: str
    test_split: str
    test_rows: int | None = None
    train_pairs: int | None
    test_pairs: int = 200
    drop_translation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Row numbers of the source in the order of the draw, and how many rows were left after each filter."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    funnel: Mapping[str, tuple[int, ...]]


def generator(seed: int) -> "Generator":
    """The generator that every draw of a set is taken from, in turn."""
    import torch

    return torch.Generator().manual_seed(seed)


def permutation(count: int, source: "Generator") -> list[int]:
    """The next permutation of `count` rows."""
    import torch

    return [int(row) for row in torch.randperm(count, generator=source)]


def divide(count: int, test_rows: int, source: "Generator") -> tuple[list[int], list[int]]:
    """(train, test) rows of a set of one split. Raises DataError where there are too few."""
    if count <= test_rows:
        raise DataError(
            f"{count} rows are left, of which {test_rows} are for testing: is this the whole set?"
        )
    order = permutation(count, source)
    return order[: count - test_rows], order[count - test_rows :]


def draw(rows: Sequence[int], most: int | None, source: "Generator") -> tuple[int, ...]:
    """The first `most` of the next permutation of `rows`; all of it where None."""
    return tuple(rows[place] for place in permutation(len(rows), source)[:most])


def paper_draw(paper: PaperDraw, rows_of: RowsOf, short: Short) -> Drawn:
    """Which rows the paper's draw takes."""
    source = generator(SEED)
    splits = (paper.train_split,) if paper.test_rows else (paper.train_split, paper.test_split)
    counts, kept, fitting = {}, {}, {}
    for split in splits:
        counts[split], kept[split], fitting[split] = _filtered(paper, rows_of(split), short)
    if paper.test_rows:
        all_rows, fits = kept[paper.train_split], fitting[paper.train_split]
        train, test = (
            [all_rows[place] for place in places if all_rows[place] in fits]
            for places in divide(len(all_rows), paper.test_rows, source)
        )
    else:
        train, test = (
            [row for row in kept[split] if row in fitting[split]]
            for split in (paper.train_split, paper.test_split)
        )
    drawn = draw(train, paper.train_pairs, source), draw(test, paper.test_pairs, source)
    funnel = {
        side: (counts[split], len(kept[split]), len(rows), len(taken))
        for side, split, rows, taken in zip(
            ("train", "test"), (splits[0], splits[-1]), (train, test), drawn, strict=True
        )
    }
    return Drawn(train=drawn[0], test=drawn[1], funnel=funnel)


def _filtered(paper: PaperDraw, rows: Iterator[Located], short: Short) -> tuple[int, list[int], set[int]]:
    """(rows there are, those that are not dropped, those of them that are short and not about translation)."""
    count, kept, fits = 0, [], set()
    for group in _groups(rows, _ROWS_AT_ONCE):
        count += len(group)
        texts = [(item.number, paper.texts(_row(item))) for item in group]
        mine = [(number, found) for number, found in texts if found is not None]
        kept += [number for number, _ in mine]
        fit = short([text for _, found in mine for text in found])
        for place, (number, (prompt, _, _)) in enumerate(mine):
            about_translation = any(word in prompt.lower() for word in ("translate", "translation"))
            if all(fit[3 * place : 3 * place + 3]) and not (paper.drop_translation and about_translation):
                fits.add(number)
    return count, kept, fits


def _run_draw(paper: PaperDraw, rows_of: RowsOf, side: str, short: Short) -> Iterator[Located]:
    drawn = paper_draw(paper, rows_of, short)
    split = paper.train_split if side == "train" or paper.test_rows else paper.test_split
    numbers = drawn.train if side == "train" else drawn.test
    wanted = set(numbers)
    found = {item.number: item for item in rows_of(split) if item.number in wanted}
    for number in numbers:
        texts = paper.texts(_row(found[number]))
        assert texts is not None
        yield found[number]._replace(row=dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))


def _groups(items: Iterable[Located], size: int) -> Iterator[list[Located]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _row(item: Located) -> Row:
    if isinstance(item.row, DataError):
        raise item.row
    return item.row


@functools.cache
def _length_tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the paper's length filter needs the tokenizer {location}, which could not be loaded "
            f"({(str(error).splitlines() or [repr(error)])[0]}). Accept its licence on the hub and set HF_TOKEN, or set "
            f"{LENGTH_TOKENIZER_VARIABLE} to a folder that holds a copy of it."
        ) from error


def length_tokenizer() -> str:
    """Hub id or folder of the tokenizer that the length filter counts with."""
    return os.environ.get(LENGTH_TOKENIZER_VARIABLE) or LENGTH_TOKENIZER


def short_enough(texts: Sequence[str]) -> list[bool]:
    """Whether each text has at most 512 tokens, the begin-of-sequence token counted."""
    if not texts:
        return []
    ids = _length_tokenizer(length_tokenizer())(list(texts))["input_ids"]
    return [len(tokens) <= MAX_TOKENS for tokens in ids]


def _ultrafeedback(row: Row) -> Texts | None:
    if row["score_chosen"] <= row["score_rejected"]:
        return None
    return row["prompt"], row["chosen"][1]["content"], row["rejected"][1]["content"]


def _rewardmath(row: Row) -> Texts:
    solutions = [" ".join(row[f"eval_solution_{side}"]) for side in "AB"]
    chosen, rejected = solutions if row["chosen_position"] == "A" else reversed(solutions)
    return row["problem"], chosen, rejected


def _rewardbench(row: Row, prefix: str) -> Texts | None:
    if not row["subset"].startswith(prefix):
        return None
    return row["prompt"], row["chosen"], row["rejected"]


def _rewardbench2(rows_of: RowsOf, side: str, short: Short) -> Iterator[Located]:
    for item in rows_of("test"):
        row = _row(item)
        if row["subset"] == "Ties":
            continue
        for rejected in row["rejected"]:
            yield item._replace(
                row={"prompt": row["prompt"], "chosen": row["chosen"][0], "rejected": rejected}
            )


_BENCH_COLUMNS = ("prompt", "chosen", "rejected", "subset")
PAPER_DRAWS: Mapping[str, PaperDraw] = MappingProxyType(
    {
        "ultrafeedback": PaperDraw(
            texts=_ultrafeedback,
            train_split="train_prefs",
            test_split="test_prefs",
            train_pairs=2000,
            drop_translation=True,
        ),
        "rewardmath": PaperDraw(
            texts=_rewardmath, train_split="test", test_split="test", test_rows=1000, train_pairs=2000
        ),
        "rewardbench_math": PaperDraw(
            texts=functools.partial(_rewardbench, prefix="math-prm"),
            train_split="filtered",
            test_split="filtered",
            test_rows=400,
            train_pairs=None,
        ),
        # 900 for testing gives the paper's 84 training pairs; the official code's last version says 492.
        "rewardbench_code": PaperDraw(
            texts=functools.partial(_rewardbench, prefix="hep"),
            train_split="filtered",
            test_split="filtered",
            test_rows=900,
            train_pairs=None,
        ),
    }
)
_DRAW_COLUMNS = {
    "ultrafeedback": ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
    "rewardmath": ("problem", "eval_solution_A", "eval_solution_B", "chosen_position"),
    "rewardbench_math": _BENCH_COLUMNS,
    "rewardbench_code": _BENCH_COLUMNS,
}
SELECTIONS: Mapping[str, Selection] = MappingProxyType(
    {
        **{
            name: Selection(run=functools.partial(_run_draw, paper), columns=_DRAW_COLUMNS[name])
            for name, paper in PAPER_DRAWS.items()
        },
        "rewardbench2": Selection(run=_rewardbench2, columns=_BENCH_COLUMNS, splits=("test",)),
    }
)
