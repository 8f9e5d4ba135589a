"""What one set holds: repeated and contradicting pairs, lengths, languages, cut responses, and what it rewrites."""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainers.data.audit.overlaps import IndexedPairs
from trainers.data.records import Message, Pair
from trainers.data.texts import LONG, UNKNOWN, language, looks_cut, similarity, token_overlap, words

Role = Literal["train", "eval"]
Unit = Literal["characters", "words", "tokens"]
Tokenize = Callable[[str], Sequence[int]]
# Similarities and languages are slow to compute: a share settles on this many evenly spaced pairs.
SIMILARITY_SAMPLE, LANGUAGE_SAMPLE = 50, 200
_Z = 1.959963984540054
# What chat templates write around turns, and no text of a turn should hold.
_MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|^### (?:Instruction|Response):|<｜(?:User|Assistant)｜>",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSet:
    """A set to audit: the pairs of one split. `unreadable` has a line for each row that is no pair.

    `rewrites` are, row by row, the (chosen, rejected) responses that the set rewrites, None where that is not
    known.
    """

    name: str
    role: Role
    pairs: Sequence[Pair]
    unreadable: Sequence[str] = ()
    rewrites: Sequence[tuple[str, str] | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBaseline:
    """The accuracy of "the longer response wins", a tie counting one half, with Wilson's 95 % interval."""

    unit: Unit
    longer_wins: float
    low: float
    high: float
    pairs: int

    @property
    def better(self) -> str:
        """Which of the two rules is above one half."""
        return "longer wins" if self.longer_wins >= 0.5 else "shorter wins"

    @property
    def shortcut(self) -> float:
        """The accuracy of the better rule."""
        return max(self.longer_wins, 1.0 - self.longer_wins)

    @property
    def significant(self) -> bool:
        """Whether one half is outside the interval."""
        return not self.low <= 0.5 <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """The mean token overlap of responses with what they rewrite; `itself` is that of the originals with themselves."""

    responses: int
    overlap: float
    itself: float
    unchanged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAudit:
    """What one set holds. Counts are of pairs; `lengths` are distributions by column and unit."""

    name: str
    role: Role
    pairs: int
    unreadable: tuple[str, ...]
    prompts: int
    repeated_prompts: int
    repeated_pairs: int
    identical: int
    contradicted: int
    prompt_repeated: int
    templated: int
    languages: dict[str, dict[str, float]]
    another_language: int
    lengths: dict[str, dict[str, dict[str, float]]]
    baselines: tuple[LengthBaseline, ...]
    long_responses: dict[str, int]
    cut: dict[str, int]
    similarity: float
    rewriting: Rewriting | None


def read_set_audit(record: dict[str, Any], name: str, role: Role) -> SetAudit:
    """Return a set's audit from its plain values (`dataclasses.asdict`, through JSON), under this name and role."""
    own = {field.name: record[field.name] for field in dataclasses.fields(SetAudit)}
    own |= {"name": name, "role": role, "unreadable": tuple(record["unreadable"])}
    own["baselines"] = tuple(LengthBaseline(**item) for item in record["baselines"])
    own["rewriting"] = record["rewriting"] and Rewriting(**record["rewriting"])
    return SetAudit(**own)


def audit_set(
    data: AuditSet,
    *,
    tokenize: Tokenize | None = None,
    index: IndexedPairs | None = None,
) -> SetAudit:
    """Audit one set of at least one pair; `index` is that of its pairs, where it is known."""
    pairs = data.pairs
    index = index or IndexedPairs(pairs)
    columns = {
        "prompt": ["\n".join(turn.content for turn in pair.prompt) for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    count: dict[Unit, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
    if tokenize is not None:
        count["tokens"] = lambda text: len(tokenize(text))
    measured = {
        column: {unit: [length(text) for text in texts] for unit, length in count.items()}
        for column, texts in columns.items()
    }
    sides = {side: columns[side] for side in ("chosen", "rejected")}
    rows = list(zip(index.prompts.numbers, index.chosen.numbers, index.rejected.numbers, strict=True))
    stated = set(zip(index.prompts.numbers, columns["chosen"], columns["rejected"], strict=True))
    languages, another = _languages(pairs)
    alike = [similarity(pair.chosen, pair.rejected) for pair in _sample(pairs, SIMILARITY_SAMPLE)]
    return SetAudit(
        name=data.name,
        role=data.role,
        pairs=len(pairs),
        unreadable=tuple(data.unreadable),
        prompts=len(index.prompts),
        repeated_prompts=len(pairs) - len(index.prompts),
        repeated_pairs=len(rows) - len(set(rows)),
        identical=sum(chosen == rejected for chosen, rejected in (pair.responses for pair in pairs)),
        contradicted=sum(
            pair.chosen != pair.rejected and (prompt, pair.rejected, pair.chosen) in stated
            for prompt, pair in zip(index.prompts.numbers, pairs, strict=True)
        ),
        prompt_repeated=sum(map(_repeats_its_prompt, pairs)),
        templated=sum(bool(_MARKERS.search(text)) for texts in columns.values() for text in texts),
        languages=languages,
        another_language=another,
        lengths={
            column: {unit: distribution(values) for unit, values in units.items()}
            for column, units in measured.items()
        },
        baselines=tuple(
            length_baseline(measured["chosen"][unit], measured["rejected"][unit], unit) for unit in count
        ),
        long_responses={side: sum(len(text) >= LONG for text in texts) for side, texts in sides.items()},
        cut={side: sum(map(looks_cut, texts)) for side, texts in sides.items()},
        similarity=statistics.fmean(alike),
        rewriting=_rewriting(data, tokenize or words),
    )


def _repeats_its_prompt(pair: Pair) -> bool:
    asked = pair.prompt[-1].content.strip()
    return len(asked) >= LONG and all(text.startswith(asked) for text in (pair.chosen, pair.rejected))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; `successes` may hold halves (ties). (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def length_baseline(chosen: Sequence[int], rejected: Sequence[int], unit: Unit) -> LengthBaseline:
    """Return how many of at least one pair length alone would rank right."""
    right = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson(right, len(chosen))
    return LengthBaseline(unit=unit, longer_wins=right / len(chosen), low=low, high=high, pairs=len(chosen))


def distribution(lengths: Sequence[int]) -> dict[str, float]:
    """Return the mean and the quantiles of at least one length."""
    names = ("least", "quartile_1", "median", "quartile_3", "percentile_95", "most")
    quantiles = np.quantile(lengths, (0.0, 0.25, 0.5, 0.75, 0.95, 1.0))
    return {"mean": float(np.mean(lengths)), **dict(zip(names, map(float, quantiles), strict=True))}


def _languages(pairs: Sequence[Pair]) -> tuple[dict[str, dict[str, float]], int]:
    """Return shares of each language by column, and how many sampled pairs have responses in two languages."""
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


def _sample(pairs: Sequence[Pair], most: int) -> Sequence[Pair]:
    if len(pairs) <= most:
        return pairs
    return [pairs[number * len(pairs) // most] for number in range(most)]


def _rewriting(data: AuditSet, tokenize: Callable[[str], Sequence[Any]]) -> Rewriting | None:
    both = [
        (original, rewritten)
        for pair, texts in zip(data.pairs, data.rewrites, strict=False)
        if texts is not None
        for original, rewritten in zip(texts, (pair.chosen, pair.rejected), strict=True)
        if original
    ]
    if not both:
        return None
    tokens = [(tokenize(original), tokenize(rewritten)) for original, rewritten in both]
    return Rewriting(
        responses=len(both),
        overlap=statistics.fmean(token_overlap(original, rewritten) for original, rewritten in tokens),
        itself=statistics.fmean(token_overlap(original, original) for original, _ in tokens),
        unchanged=sum(original == rewritten for original, rewritten in both),
    )


def originals(
    pairs: Sequence[Pair], candidates: Iterable[Pair], *, declared: bool
) -> list[tuple[str, str] | None]:
    """Return the (chosen, rejected) responses that each pair rewrites; "" for one that is not known, None for neither.

    A row may name its original's chosen response. A set that is `declared` a rewriting without naming them
    keeps its originals' prompts: where only one candidate has the prompt, that is the original.
    """
    if not (declared or any(pair.original_chosen is not None for pair in pairs)):
        return []
    by_prompt: dict[tuple[Message, ...], list[Pair]] = {}
    for candidate in dict.fromkeys(candidates):
        by_prompt.setdefault(candidate.prompt, []).append(candidate)
    found: list[tuple[str, str] | None] = []
    for pair in pairs:
        same = by_prompt.get(pair.prompt, [])
        if pair.original_chosen is not None:
            rejected = {item.rejected for item in same if item.chosen == pair.original_chosen}
            found.append((pair.original_chosen, rejected.pop() if len(rejected) == 1 else ""))
        else:
            found.append((same[0].chosen, same[0].rejected) if declared and len(same) == 1 else None)
    return found
