"""What in preference data would mislead: leaks, length shortcuts, identical and cut responses (paper §6).

    audit = audit_sets(train_sets, eval_sets)      each set, and every training set against every evaluation set
    leaked = audit.between[0].leaked               rows of the evaluation set that training has seen

Each set is measured first (SetAudit), and what two sets share (overlaps.py). Findings follow from these measures:
thresholds, severities, and what each would do to a result. All functions are pure functions of pairs.
"""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from trainers.data.overlaps import IndexedPairs, Overlap, overlap
from trainers.data.records import Message, Pair
from trainers.data.texts import LONG, UNKNOWN, language, looks_cut, similarity, token_overlap, words

if TYPE_CHECKING:
    from trainers.pairs.tokens import Counts

# Raise when what is measured changes: kept audits are then made anew.
VERSION = 3
Role = Literal["train", "eval"]
Unit = Literal["characters", "words", "tokens"]
Severity = Literal["error", "warn", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warn", "info")
Tokenize = Callable[[str], Sequence[int]]
# Similarities and languages are slow to compute: a share settles on this many evenly spaced pairs.
SIMILARITY_SAMPLE, LANGUAGE_SAMPLE = 50, 200
_Z = 1.959963984540054
# Markers that chat templates write around turns, and that no text of a turn should contain.
_MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|^### (?:Instruction|Response):|<｜(?:User|Assistant)｜>",
    re.MULTILINE,
)


# Accuracies of a rule that looks at lengths alone.
_SHORTCUT, _STRONG_SHORTCUT = 0.55, 0.75
_ALIKE = 0.9
_MANY, _FEW = 0.05, 0.01
# A rewriting that shares this much of what an original shares with itself is hardly one.
_HARDLY_REWRITTEN = 0.8


# What a set holds.


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
        return "longer wins" if self.longer_wins >= 0.5 else "shorter wins"

    @property
    def shortcut(self) -> float:
        return max(self.longer_wins, 1.0 - self.longer_wins)

    @property
    def significant(self) -> bool:
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
    data: AuditSet, *, tokenize: Tokenize | None = None, index: IndexedPairs | None = None
) -> SetAudit:
    """Audit one set of at least one pair; `index` is the index of its pairs, if there is one."""
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
    stated = set(zip(index.prompts.numbers, *sides.values(), strict=True))
    languages, another = _languages(pairs)
    return SetAudit(
        name=data.name,
        role=data.role,
        pairs=len(pairs),
        unreadable=tuple(data.unreadable),
        prompts=len(index.prompts),
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
        similarity=statistics.fmean(
            similarity(pair.chosen, pair.rejected) for pair in _sample(pairs, SIMILARITY_SAMPLE)
        ),
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
    names = ("prompt", "chosen", "rejected")
    sample = _sample(pairs, LANGUAGE_SAMPLE)
    found = [tuple(map(language, (pair.prompt[-1].content, pair.chosen, pair.rejected))) for pair in sample]
    another = sum(len({*codes[1:]} - {UNKNOWN}) > 1 for codes in found)
    shares = {
        name: {code: count / len(sample) for code, count in Counter(codes).most_common()}
        for name, codes in zip(names, zip(*found, strict=True), strict=True)
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


# What sets hold and share → findings.


class Finding(NamedTuple):
    """One fault of the data: what was found, where, how much of it, and what it would do to a result."""

    severity: Severity
    what: str
    where: str
    number: str
    effect: str

    @property
    def said(self) -> str:
        return f"data: {self.what}, {self.where}: {self.number}. {self.effect}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Every set, every (training set, evaluation set), and findings in the `tokens` that models read."""

    sets: tuple[SetAudit, ...]
    between: tuple[Overlap, ...]
    tokens: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, errors first."""
        found = [finding for item in self.between for finding in overlap_findings(item)]
        found += [*(finding for item in self.sets for finding in set_findings(item)), *self.tokens]
        return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as audit.json holds them."""
        return {
            "findings": [finding._asdict() for finding in self.findings],
            "sets": [dataclasses.asdict(item) for item in self.sets],
            "between": [dataclasses.asdict(item) for item in self.between],
        }


def audit_sets(
    train_sets: Sequence[AuditSet], eval_sets: Sequence[AuditSet], *, tokenize: Tokenize | None = None
) -> Audit:
    """Audit sets of at least one pair each; with `tokenize`, lengths and overlaps are measured in tokens too."""
    train, evaluated = (
        [(item, IndexedPairs(item.pairs)) for item in items] for items in (train_sets, eval_sets)
    )
    return Audit(
        sets=tuple(audit_set(item, tokenize=tokenize, index=index) for item, index in (*train, *evaluated)),
        between=tuple(
            overlap(seen, index, names=(source.name, item.name))
            for source, seen in train
            for item, index in evaluated
        ),
    )


def share(value: float) -> str:
    """Return three decimals, half rounded up: 127.5 of 200 is 0.638."""
    return f"{value + 1e-9:.3f}"


def overlap_findings(found: Overlap) -> Iterator[Finding]:
    """Yield what the overlap would do to the evaluation."""
    where = f"{found.evaluated} evaluated, {found.train} trained on"
    if leaked := len(found.leaked):
        counts = {
            "prompts": (found.prompts_exact, found.prompts_near),
            "chosen": (found.chosen_exact, found.chosen_near),
            "rejected": (found.rejected_exact, found.rejected_near),
        }
        said = ", ".join(
            f"{what} {exact}{f' + {near} nearly' if near else ''}"
            for what, (exact, near) in counts.items()
            if exact or near
        )
        effect = (
            "Accuracy rewards remembering these problems, not generalising; "
            f"read it on the {found.pairs - leaked} pairs that training has not seen."
        )
        severity: Severity = "error" if leaked > _MANY * found.pairs else "warn"
        yield Finding(severity, "leak", where, f"{leaked} of {found.pairs} pairs ({said})", effect)
    if found.chosen_as_rejected:
        effect = "Training rejects what the evaluation prefers, so a model that learned it is marked wrong."
        number = f"{found.chosen_as_rejected} of {found.pairs} chosen responses"
        yield Finding("warn", "label flipped", where, number, effect)


def token_findings(where: str, counts: "Counts", pairs: int) -> Iterator[Finding]:
    """Yield what is wrong with `pairs` prepared pairs as a model reads them."""
    if counts.identical:
        effect = "The model reads the same twice: a tie in every accuracy, and nothing to train on."
        severity: Severity = "error" if counts.identical > _MANY * pairs else "warn"
        number = f"{counts.identical} of {pairs} pairs"
        yield Finding(severity, "chosen = rejected in tokens", where, number, effect)
    if counts.without_system:
        effect = "The chat template takes none: the first user turn begins with them, or they are left out (--system)."
        yield Finding("info", "system turns", where, f"{counts.without_system} of {pairs} pairs", effect)
    if counts.many_unknown:
        effect = "Words that the tokenizer lacks have one id: texts that differ only in them read alike."
        number = f"{share(counts.unknown_tokens / counts.tokens)} of {counts.tokens} tokens"
        yield Finding("error", "unknown tokens", where, number, effect)


# Counts of a set that are findings wherever they are not 0.
_COUNTED = (
    (
        "identical",
        "chosen = rejected",
        "No reward can rank them: a tie of one half in every accuracy, a loss of ln 2 without gradient in training.",
    ),
    (
        "contradicted",
        "contradicting pairs",
        "Another row prefers the other response, so at most half of them can be ranked right.",
    ),
    (
        "repeated_pairs",
        "repeated pairs",
        "They weigh more than others, and intervals that take pairs for independent are too narrow.",
    ),
    (
        "prompt_repeated",
        "prompt repeated in both responses",
        "The model reads the prompt twice, and its tokens count as the response's; cut it off the responses.",
    ),
)


def _rows(audit: SetAudit) -> Iterator[Finding]:
    if audit.unreadable:
        rows = audit.pairs + len(audit.unreadable)
        number = f"{len(audit.unreadable)} of {rows} rows ({audit.unreadable[0]})"
        effect = "A run refuses the set; left out, they may not be missing at random."
        yield Finding("error", "rows that are no pair", audit.name, number, effect)
    for name, what, effect in _COUNTED:
        if count := getattr(audit, name):
            yield Finding("warn", what, audit.name, f"{count} of {audit.pairs} pairs", effect)
    if audit.templated:
        effect = "The model's own template is put around these: cut the markers, and give turns as messages."
        yield Finding(
            "warn", "markers of a chat template in texts", audit.name, f"{audit.templated} texts", effect
        )
    if audit.pairs - audit.prompts > _MANY * audit.pairs:
        effect = "A split by pair puts one problem on both sides; split by prompt, and resample prompts for intervals."
        yield Finding(
            "info", "repeated prompts", audit.name, f"{audit.prompts} prompts in {audit.pairs} pairs", effect
        )
    if audit.similarity >= _ALIKE:
        effect = "Chosen and rejected differ in few words: margins are small, and those few decide them."
        yield Finding("info", "responses alike", audit.name, f"similarity {audit.similarity:.3f}", effect)


def _length(audit: SetAudit) -> Iterator[Finding]:
    # A model reads tokens: a rule that holds in characters but not in words is out of its reach.
    least = min(audit.baselines, key=lambda baseline: baseline.shortcut)
    agree = len({baseline.better for baseline in audit.baselines}) == 1
    if not agree or not least.significant or least.shortcut < _SHORTCUT:
        return
    evaluated, strong = audit.role == "eval", least.shortcut >= _STRONG_SHORTCUT
    longer = least.longer_wins >= 0.5
    each = ", ".join(
        f"{share(item.shortcut)} in {item.unit} ({share(item.low if longer else 1 - item.high)}–"
        f"{share(item.high if longer else 1 - item.low)})"
        for item in audit.baselines
    )
    severity: Severity = "error" if evaluated and strong else "warn" if evaluated or strong else "info"
    effect = "Training can learn length in the place of quality."
    if evaluated:
        effect = "A reward of length alone has this accuracy; compare with it, and read the length-controlled accuracy."
    yield Finding(severity, "length shortcut", audit.name, f"{least.better}: {each}; Wilson 95 %", effect)


def _cut(audit: SetAudit) -> Iterator[Finding]:
    shares = {column: audit.cut[column] / long for column, long in audit.long_responses.items() if long}
    if not shares or max(shares.values()) <= _MANY:
        return
    number = ", ".join(f"{audit.cut[column]} of {audit.long_responses[column]} {column}" for column in shares)
    severity: Severity = "info"
    effect = "Responses end in mid-sentence on both sides: rewards read at the last token judge a fragment."
    if len(shares) == 2 and abs(shares["chosen"] - shares["rejected"]) > _MANY:
        severity = "warn"
        effect = "More on one side than on the other: an ending alone tells chosen from rejected."
    yield Finding(severity, "unfinished responses", audit.name, number, effect)


def _languages_of(audit: SetAudit) -> Iterator[Finding]:
    looked_at = min(audit.pairs, LANGUAGE_SAMPLE)
    if audit.another_language > _FEW * looked_at:
        effect = "The language, not the quality, may tell chosen from rejected."
        number = f"{audit.another_language} of {looked_at} pairs looked at"
        yield Finding("warn", "responses in two languages", audit.name, number, effect)
    main = {
        column: next((code for code in shares if code != UNKNOWN), UNKNOWN)
        for column, shares in audit.languages.items()
    }
    if len({*main.values()} - {UNKNOWN}) > 1:
        number = ", ".join(f"{column} {code}" for column, code in main.items())
        effect = "A reward may judge the switch of language; in a translated set that is what is wanted."
        yield Finding("info", "prompt and response in two languages", audit.name, number, effect)


def _rewriting_of(audit: SetAudit) -> Iterator[Finding]:
    found = audit.rewriting
    if found is None:
        return
    number = (
        f"{found.overlap:.3f} (the original with itself {found.itself:.3f}; {found.unchanged} of "
        f"{found.responses} responses unchanged)"
    )
    severity: Severity = "info"
    effect = "The tokens are others while the content is the same: a token-level shift, as declared."
    if found.overlap > _HARDLY_REWRITTEN * found.itself:
        severity, effect = "warn", "The responses are hardly rewritten: this is no token-level shift."
    yield Finding(severity, "token overlap with the original", audit.name, number, effect)


def set_findings(audit: SetAudit) -> Iterator[Finding]:
    """Yield what is wrong with one set."""
    for part in (_rows, _length, _cut, _languages_of, _rewriting_of):
        yield from part(audit)


# Sets and findings as rows of tables.

SETS = (
    *("set", "role", "pairs", "prompts", "language", "words, median"),
    *("longer (characters) wins", "95 %", "alike", "cut"),
)
FINDINGS = ("severity", "finding", "where", "how much", "what it does to a result")


def set_row(item: SetAudit) -> tuple[str, ...]:
    """Return the row of a set; "longer wins" and its Wilson interval are in characters, "cut" counts chosen / rejected."""
    codes = (next((code for code in shares if code != UNKNOWN), "–") for shares in item.languages.values())
    medians = (item.lengths[column]["words"]["median"] for column in ("prompt", "chosen", "rejected"))
    baseline = item.baselines[0]
    return (
        item.name,
        item.role,
        str(item.pairs),
        str(item.prompts),
        " → ".join(dict.fromkeys(codes)),
        " / ".join(f"{median:.0f}" for median in medians),
        share(baseline.longer_wins),
        f"{share(baseline.low)}–{share(baseline.high)}",
        f"{item.similarity:.2f}",
        f"{item.cut['chosen']} / {item.cut['rejected']}",
    )
