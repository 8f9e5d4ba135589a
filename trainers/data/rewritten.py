"""What every way of rewriting shares: which pairs, in which words a model is asked, and the files that come of it."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data import hygiene
from trainers.data.hygiene import LANGUAGES
from trainers.data.named import SUBSET_SEED
from trainers.data.records import Pair, as_row, as_turns, is_plain
from trainers.disk import replace
from trainers.errors import DataError, SpecError

PARAPHRASE = "paraphrase"
_PROMPTS = Path(__file__).parent / "prompts"
_MEANS = ("self_overlap", "overlap", "chrf", "length_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A response without a usable rewriting, by its row and side, and why it has none."""

    row: int
    side: str
    why: str


def sampled(pairs: Sequence[Pair], sample: int | None, seed: int = SUBSET_SEED) -> list[tuple[int, Pair]]:
    """(row, pair) of a draw; the paper's draws train before test from one generator, whose test is all 200 rows."""
    if sample is not None and sample < 1:
        raise SpecError(f"--sample {sample}: give at least 1.")
    if sample is None or sample >= len(pairs):
        return list(enumerate(pairs))
    from trainers.data.selections import generator, permutation

    rows = sorted(permutation(len(pairs), generator(seed))[:sample])
    return [(row, pairs[row]) for row in rows]


def require_texts(pairs: Iterable[Pair]) -> None:
    """Raise DataError where a response is more than a text."""
    for number, pair in enumerate(pairs):
        if pair.chosen_turns or pair.rejected_turns:
            raise DataError(
                f"pair {number}: a response has several turns, tool calls or reasoning beside its text; only plain "
                "texts are rewritten."
            )


def prompt_for(into: str, own: Path | None, flag: str) -> str:
    """The words in which a model is asked; `flag` is the one that said `into`. Raises SpecError."""
    if own is not None:
        if not own.is_file():
            raise SpecError(f"--prompt {own}: there is no such file.")
        return own.read_text(encoding="utf-8")
    known = _PROMPTS / f"{into}.txt"
    if known.is_file() and into != "translate":
        return known.read_text(encoding="utf-8")
    if into not in LANGUAGES:
        names = ", ".join((PARAPHRASE, *LANGUAGES))
        raise SpecError(f"{flag} {into} is not one of {names}; give --prompt FILE and --language CODE.")
    words = (_PROMPTS / "translate.txt").read_text(encoding="utf-8")
    return words.replace("{language}", into.capitalize())


def responses_of(pairs: Sequence[tuple[int, Pair]]) -> list[str]:
    """What is rewritten: every response, chosen before rejected."""
    return [text for _, pair in pairs for text in (pair.chosen, pair.rejected)]


def whole(pairs: Sequence[tuple[int, Pair]], answers: Mapping[str, str]) -> list[tuple[int, Pair]]:
    """The pairs of which both responses have a rewriting."""
    return [(row, pair) for row, pair in pairs if pair.chosen in answers and pair.rejected in answers]


def failures(
    pairs: Sequence[tuple[int, Pair]], answers: Mapping[str, str], why: Callable[[str], str]
) -> list[Failure]:
    """The responses without a rewriting."""
    return [
        Failure(row=row, side=side, why=why(text))
        for row, pair in pairs
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
        if text not in answers
    ]


def said_failures(found: Sequence[Failure], most: int = 5) -> str:
    """The first of them in a line."""
    said = "; ".join(f"row {item.row}, {item.side}: {item.why}" for item in found[:most])
    return said + ("; …" if len(found) > most else "")


def write_lines(file: Path, items: Sequence[Any]) -> None:
    """Dataclasses or plain values as jsonl."""
    plain = [dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in items]  # type: ignore[arg-type]
    replace(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in plain))


def write_rewritten(
    file: Path, listed: Path, pairs: Sequence[tuple[int, Pair]], rewritten: Callable[[str], str]
) -> dict[str, float]:
    """Write the rewritten pairs (.parquet or .jsonl) and beside them, in `listed`, what each is like; its means."""
    import pyarrow as pa
    from pyarrow import parquet

    plain = file.suffix == ".jsonl" or all(is_plain(pair) for _, pair in pairs)
    rows: list[dict[str, Any]] = [
        {
            **(as_row(pair) if plain else as_turns(pair)),
            "chosen": rewritten(pair.chosen),
            "rejected": rewritten(pair.rejected),
            "orig_chosen": pair.chosen,
            "orig_rejected": pair.rejected,
            "orig_index": row,
        }
        for row, pair in pairs
    ]
    measured = [
        {
            "row": row["orig_index"],
            "side": side,
            **dataclasses.asdict(hygiene.measure(row[f"orig_{side}"], row[side])),
        }
        for row in rows
        for side in ("chosen", "rejected")
    ]
    if file.suffix == ".jsonl":
        write_lines(file, rows)
    else:
        draft = file.with_name(f".draft-{file.name}")
        parquet.write_table(pa.Table.from_pylist(rows), draft)
        draft.replace(file)
    write_lines(listed, measured)
    return {name: statistics.fmean(line[name] for line in measured) for name in _MEANS}


def said_means(means: Mapping[str, float]) -> str:
    """The means in a sentence."""
    return (
        f"token overlap {means['overlap']:.3f} (of the originals with themselves {means['self_overlap']:.3f}), "
        f"chrF {means['chrf']:.1f}, {means['length_ratio']:.2f} times as long"
    )
