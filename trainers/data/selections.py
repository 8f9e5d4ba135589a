"""The paper's filters and draws: from the rows of a hub data set to the pairs that the paper used (paper §2).

Every draw comes from one torch generator in the order of the official code: a set that has one split is divided
first, then the train rows are drawn, then the test rows. Rows come out as prompt, chosen, rejected.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from trainers.data.formats import Located, Row
from trainers.data.length_filter import MAX_TOKENS, Short
from trainers.errors import DataError

if TYPE_CHECKING:
    from torch import Generator

SEED = 982

# The rows of a split of the source, from the start at each call.
RowsOf = Callable[[str], Iterator[Located]]
Texts = tuple[str, str, str]
# How many rows were left after each step, from what was fetched to what was drawn.
Funnel = list[tuple[str, int]]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How a named set is made of its source: `columns` are what a row must have."""

    run: Callable[[RowsOf, str, Short, Funnel], Iterator[Located]]
    columns: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperDraw:
    """One of the paper's draws. `texts` gives prompt, chosen and rejected of a row, or None where it is dropped.

    `kept` says what is true of the rows that are not. With `test_rows` the source's `train_split` is divided and the last of
    a permutation are for testing.
    """

    texts: Callable[[Row], Texts | None]
    kept: str = ""
    train_split: str
    test_split: str
    test_rows: int | None = None
    train_pairs: int | None
    test_pairs: int = 200
    drop_translation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Row numbers of the source in the order of the draw, and how many rows of each side were left after each step."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    funnel: Mapping[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filtered:
    """Of a source split: how many rows there are, which are not dropped, which of those are short, which fit."""

    rows: int
    kept: list[int]
    short: set[int]
    fits: set[int]


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
    found = {split: _filtered(paper, rows_of(split), short) for split in splits}
    ours = {"train": found[splits[0]], "test": found[splits[-1]]}
    sides = {side: filtered.kept for side, filtered in ours.items()}
    if paper.test_rows:
        kept = found[paper.train_split].kept
        divided = divide(len(kept), paper.test_rows, source)
        sides = {
            side: [kept[place] for place in places]
            for side, places in zip(("train", "test"), divided, strict=True)
        }
    fitting = {side: [row for row in rows if row in ours[side].fits] for side, rows in sides.items()}
    most = {"train": paper.train_pairs, "test": paper.test_pairs}
    drawn = {side: draw(rows, most[side], source) for side, rows in fitting.items()}
    funnel = {
        side: _steps(paper, side, ours[side], sides[side], len(fitting[side]), len(drawn[side]))
        for side in sides
    }
    return Drawn(train=drawn["train"], test=drawn["test"], funnel=funnel)


def _steps(
    paper: PaperDraw, side: str, found: _Filtered, rows: Sequence[int], fitting: int, drawn: int
) -> tuple[tuple[str, int], ...]:
    """The funnel of one side; a step that this draw does not have is not in it."""
    steps = (
        ("rows", found.rows, True),
        (paper.kept, len(found.kept), bool(paper.kept)),
        (f"for the {side} split", len(rows), paper.test_rows is not None),
        (f"of at most {MAX_TOKENS} tokens", sum(row in found.short for row in rows), True),
        ("not about translation", fitting, paper.drop_translation),
        ("drawn", drawn, True),
    )
    return tuple((what, count) for what, count, has in steps if has)


def _filtered(paper: PaperDraw, rows: Iterator[Located], short: Short) -> _Filtered:
    found = _Filtered(rows=0, kept=[], short=set(), fits=set())
    count = 0
    for group in _groups(rows, _ROWS_AT_ONCE):
        count += len(group)
        texts = [(item.number, paper.texts(_row(item))) for item in group]
        mine = [(number, said) for number, said in texts if said is not None]
        found.kept.extend(number for number, _ in mine)
        fit = short([text for _, said in mine for text in said])
        for place, (number, (prompt, _, _)) in enumerate(mine):
            if not all(fit[3 * place : 3 * place + 3]):
                continue
            found.short.add(number)
            about_translation = any(word in prompt.lower() for word in ("translate", "translation"))
            if not (paper.drop_translation and about_translation):
                found.fits.add(number)
    return dataclasses.replace(found, rows=count)


def _run_draw(
    paper: PaperDraw, rows_of: RowsOf, side: str, short: Short, funnel: Funnel
) -> Iterator[Located]:
    drawn = paper_draw(paper, rows_of, short)
    funnel.extend(drawn.funnel[side])
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


def _rewardbench2(rows_of: RowsOf, side: str, short: Short, funnel: Funnel) -> Iterator[Located]:
    rows = kept = pairs = 0
    for item in rows_of("test"):
        rows += 1
        row = _row(item)
        if row["subset"] == "Ties":
            continue
        kept += 1
        for rejected in row["rejected"]:
            pairs += 1
            yield item._replace(
                row={"prompt": row["prompt"], "chosen": row["chosen"][0], "rejected": rejected}
            )
    funnel.extend([("rows", rows), ("not of the subset Ties", kept), ("pairs", pairs)])


_BENCH_COLUMNS = ("prompt", "chosen", "rejected", "subset")
PAPER_DRAWS: Mapping[str, PaperDraw] = MappingProxyType(
    {
        "ultrafeedback": PaperDraw(
            texts=_ultrafeedback,
            kept="with a preference",
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
            kept="of its subset",
            train_split="filtered",
            test_split="filtered",
            test_rows=400,
            train_pairs=None,
        ),
        # 900 for testing gives the paper's 84 training pairs; the official code's last version says 492.
        "rewardbench_code": PaperDraw(
            texts=functools.partial(_rewardbench, prefix="hep"),
            kept="of its subset",
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
