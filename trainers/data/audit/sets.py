"""One set on its own: what it holds, and what of that would mislead."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainers.data.audit import lengths
from trainers.data.audit.duplicates import TextIndex
from trainers.data.audit.findings import Finding
from trainers.data.audit.lengths import LengthBaseline, Lengths
from trainers.data.audit.overlaps import indexed
from trainers.data.audit.rules import set_findings
from trainers.data.audit.texts import (
    LANGUAGE_SAMPLE,
    UNKNOWN,
    language,
    looks_cut,
    similarity,
    token_overlap,
    words,
)
from trainers.data.records import Pair

Role = Literal["train", "eval"]
Tokenize = Callable[[str], Sequence[int]]
# Similarity is slow to compute: the mean is taken over this many evenly spaced pairs.
SIMILARITY_SAMPLE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSet:
    """A set to audit: the pairs of one split. `unreadable` says of each row that is no pair what is wrong with it.

    `rewrites` are, row by row, the (chosen, rejected) responses that the set rewrites, None where that is not known.
    """

    name: str
    role: Role
    pairs: Sequence[Pair]
    unreadable: Sequence[str] = ()
    rewrites: Sequence[tuple[str, str] | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """Token overlap of responses with what they rewrite; `itself` is that of the originals with themselves."""

    responses: int
    overlap: float
    itself: float
    unchanged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAudit:
    """What one set holds; counts are of pairs unless they say otherwise."""

    name: str
    role: Role
    pairs: int
    unreadable: tuple[str, ...]
    prompts: int
    repeated_prompts: int
    repeated_pairs: int
    near_prompts: int
    identical: int
    contradicted: int
    languages: dict[str, dict[str, float]]
    another_language: int
    lengths: dict[str, tuple[Lengths, ...]]
    baselines: tuple[LengthBaseline, ...]
    long_responses: dict[str, int]
    cut: dict[str, int]
    at_limit: dict[str, int]
    similarity: float
    rewriting: Rewriting | None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What of it would mislead."""
        return tuple(set_findings(self))


def read_set_audit(record: dict[str, Any], name: str, role: Role) -> SetAudit:
    """A set's audit from its plain values (`dataclasses.asdict`, through JSON), under this name and role."""
    own = {field.name: record[field.name] for field in dataclasses.fields(SetAudit)}
    return SetAudit(
        **{
            **own,
            "name": name,
            "role": role,
            "unreadable": tuple(record["unreadable"]),
            "lengths": {
                column: tuple(Lengths(**item) for item in items)
                for column, items in record["lengths"].items()
            },
            "baselines": tuple(LengthBaseline(**item) for item in record["baselines"]),
            "rewriting": record["rewriting"] and Rewriting(**record["rewriting"]),
        }
    )


def audit_set(
    data: AuditSet,
    *,
    tokenize: Tokenize | None = None,
    response_limit: int | None = None,
    index: Sequence[TextIndex] = (),
) -> SetAudit:
    """Audit one set of at least one pair. `response_limit` is in tokens (words without `tokenize`)."""
    pairs = data.pairs
    prompts, chosen, rejected = index or indexed(pairs)
    measured = _measured(pairs, tokenize)
    said = {"chosen": [pair.chosen for pair in pairs], "rejected": [pair.rejected for pair in pairs]}
    rows = list(zip(prompts.numbers, chosen.numbers, rejected.numbers, strict=True))
    ordered = [
        (prompt, pair.chosen, pair.rejected) for prompt, pair in zip(prompts.numbers, pairs, strict=True)
    ]
    spoken, another = _languages(pairs)
    repeated = prompts.repeats()
    return SetAudit(
        name=data.name,
        role=data.role,
        pairs=len(pairs),
        unreadable=tuple(data.unreadable),
        prompts=len(prompts.texts),
        repeated_prompts=len(repeated.exact),
        repeated_pairs=len(rows) - len(set(rows)),
        near_prompts=len(repeated.near),
        identical=sum(chosen == rejected for chosen, rejected in (pair.responses for pair in pairs)),
        contradicted=_contradicted(ordered),
        languages=spoken,
        another_language=another,
        lengths={
            column: tuple(lengths.distribution(values, unit) for unit, values in units.items())
            for column, units in measured.items()
        },
        baselines=tuple(
            lengths.length_baseline(measured["chosen"][unit], measured["rejected"][unit], unit)
            for unit in measured["chosen"]
        ),
        long_responses={
            column: sum(len(text) >= lengths.LONG for text in texts) for column, texts in said.items()
        },
        cut={column: sum(map(looks_cut, texts)) for column, texts in said.items()},
        at_limit=_at_limit(measured, response_limit),
        similarity=_mean(
            similarity(pair.chosen, pair.rejected) for pair in _sample(pairs, SIMILARITY_SAMPLE)
        ),
        rewriting=_rewriting(data, tokenize),
    )


def _measured(pairs: Sequence[Pair], tokenize: Tokenize | None) -> dict[str, dict[lengths.Unit, list[int]]]:
    """Lengths by column and unit."""
    columns = {
        "prompt": ["\n".join(turn.content for turn in pair.prompt) for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    found: dict[str, dict[lengths.Unit, list[int]]] = {}
    for column, texts in columns.items():
        found[column] = {
            "characters": [len(text) for text in texts],
            "words": [len(text.split()) for text in texts],
        }
        if tokenize is not None:
            found[column]["tokens"] = [len(tokenize(text)) for text in texts]
    return found


def _contradicted(rows: Sequence[tuple[int, str, str]]) -> int:
    """Pairs of which another row says the opposite."""
    stated = set(rows)
    return sum(
        chosen != rejected and (prompt, rejected, chosen) in stated for prompt, chosen, rejected in rows
    )


def _languages(pairs: Sequence[Pair]) -> tuple[dict[str, dict[str, float]], int]:
    """Shares of each language by column, and how many sampled pairs have responses in two languages."""
    sample = _sample(pairs, LANGUAGE_SAMPLE)
    columns = {
        "prompt": [language(pair.prompt[-1].content) for pair in sample],
        "chosen": [language(pair.chosen) for pair in sample],
        "rejected": [language(pair.rejected) for pair in sample],
    }
    both = zip(columns["chosen"], columns["rejected"], strict=True)
    another = sum(chosen != rejected and UNKNOWN not in (chosen, rejected) for chosen, rejected in both)
    shares = {
        column: {code: count / len(sample) for code, count in Counter(codes).most_common()}
        for column, codes in columns.items()
    }
    return shares, another


def _at_limit(measured: dict[str, dict[lengths.Unit, list[int]]], limit: int | None) -> dict[str, int]:
    if limit is None:
        return {}
    return {
        column: sum(value >= limit for value in list(measured[column].values())[-1])
        for column in ("chosen", "rejected")
    }


def _rewriting(data: AuditSet, tokenize: Tokenize | None) -> Rewriting | None:
    tokens: Callable[[str], Sequence[Any]] = tokenize or words
    both = [
        (original, rewritten)
        for pair, originals in zip(data.pairs, data.rewrites, strict=False)
        if originals is not None
        for original, rewritten in zip(originals, (pair.chosen, pair.rejected), strict=True)
        if original
    ]
    if not both:
        return None
    tokenised = [(tokens(original), tokens(rewritten)) for original, rewritten in both]
    return Rewriting(
        responses=len(both),
        overlap=_mean(token_overlap(original, rewritten) for original, rewritten in tokenised),
        itself=_mean(token_overlap(original, original) for original, _ in tokenised),
        unchanged=sum(original == rewritten for original, rewritten in both),
    )


def _sample(pairs: Sequence[Pair], most: int) -> Sequence[Pair]:
    if len(pairs) <= most:
        return pairs
    return [pairs[number * len(pairs) // most] for number in range(most)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
