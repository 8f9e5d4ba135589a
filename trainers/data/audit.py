"""What in preference data would mislead: leaks, length shortcuts, equal and contradicting pairs (paper §6).

    audit = audit_sets(train_sets, eval_sets)      each set, and every training set against every evaluation set
    leaked = audit.between[0].leaked               rows of the evaluation set that training has seen

Each set is measured first (SetAudit), and what two sets share (overlaps.py). Findings follow from these measures:
thresholds, severities, and what each would do to a result. All functions are pure functions of pairs.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainers.data.overlaps import IndexedPairs, Overlap, overlap
from trainers.data.records import Message, Pair
from trainers.data.texts import LONG, token_overlap, words

if TYPE_CHECKING:
    from trainers.pairs.tokens import Counts

# Raise when what is measured changes: kept audits are then made anew.
VERSION = 4
Role = Literal["train", "eval"]
Severity = Literal["error", "warn", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warn", "info")
_Z = 1.959963984540054
# Markers that chat templates write around turns, and that no text of a turn should contain.
_MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|end)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|^### (?:Instruction|Response):|<｜(?:User|Assistant)｜>",
    re.MULTILINE,
)
_COLUMNS = ("prompt", "chosen", "rejected")


# Accuracies of a rule that looks at lengths alone.
_SHORTCUT, _STRONG_SHORTCUT = 0.55, 0.75
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


class LongerWins(NamedTuple):
    """The accuracy of "the longer response wins", a tie counting one half, with Wilson's 95 % interval."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAudit:
    """What one set holds. Counts are of pairs; `medians` are of lengths, by column and unit; `longer_wins` is by unit.

    `rewriting` has the mean token overlap of `responses` with what they rewrite, that of the originals with
    `itself`, and how many are `unchanged`; it is empty where nothing is rewritten.
    """

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
    medians: dict[str, dict[str, float]]
    longer_wins: dict[str, LongerWins]
    rewriting: dict[str, float]


def read_set_audit(record: dict[str, Any], name: str, role: Role) -> SetAudit:
    """Return a set's audit from its plain values (`dataclasses.asdict`, through JSON), under this name and role."""
    own = {field.name: record[field.name] for field in dataclasses.fields(SetAudit)}
    own |= {"name": name, "role": role, "unreadable": tuple(record["unreadable"])}
    own["longer_wins"] = {unit: LongerWins(*found) for unit, found in record["longer_wins"].items()}
    return SetAudit(**own)


def audit_set(data: AuditSet, *, index: IndexedPairs | None = None) -> SetAudit:
    """Audit one set of at least one pair; `index` is the index of its pairs, if there is one."""
    pairs = data.pairs
    index = index or IndexedPairs(pairs)
    texts = [("\n".join(turn.content for turn in pair.prompt), pair.chosen, pair.rejected) for pair in pairs]
    columns = dict(zip(_COLUMNS, zip(*texts, strict=True), strict=True))
    count: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
    lengths = {
        column: {unit: [length(text) for text in found] for unit, length in count.items()}
        for column, found in columns.items()
    }
    rows = list(zip(index.prompts.numbers, index.chosen.numbers, index.rejected.numbers, strict=True))
    stated = set(zip(index.prompts.numbers, columns["chosen"], columns["rejected"], strict=True))
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
        templated=sum(any(map(_MARKERS.search, found)) for found in texts),
        medians={
            column: {unit: float(statistics.median(values)) for unit, values in units.items()}
            for column, units in lengths.items()
        },
        longer_wins={unit: longer_wins(lengths["chosen"][unit], lengths["rejected"][unit]) for unit in count},
        rewriting=_rewriting(data),
    )


def _repeats_its_prompt(pair: Pair) -> bool:
    asked = pair.prompt[-1].content.strip()
    return len(asked) >= LONG and all(text.startswith(asked) for text in (pair.chosen, pair.rejected))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of n > 0; `successes` may hold halves (ties)."""
    share, z2 = successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def longer_wins(chosen: Sequence[int], rejected: Sequence[int]) -> LongerWins:
    """Return how many of at least one pair length alone would rank right."""
    right = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    return LongerWins(right / len(chosen), *wilson(right, len(chosen)))


def _rewriting(data: AuditSet) -> dict[str, float]:
    both = [
        (original, rewritten)
        for pair, texts in zip(data.pairs, data.rewrites, strict=False)
        if texts is not None
        for original, rewritten in zip(texts, (pair.chosen, pair.rejected), strict=True)
        if original
    ]
    if not both:
        return {}
    tokens = [(words(original), words(rewritten)) for original, rewritten in both]
    return {
        "responses": len(both),
        "overlap": statistics.fmean(token_overlap(original, rewritten) for original, rewritten in tokens),
        "itself": statistics.fmean(token_overlap(original, original) for original, _ in tokens),
        "unchanged": sum(original == rewritten for original, rewritten in both),
    }


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

# What each fault would do to a result.
_EFFECTS = {
    "leak": "Accuracy rewards remembering these problems, not generalising: read the leak-free accuracy.",
    "label flipped": "Training rejects what the evaluation prefers: a model that learned it is marked wrong.",
    "rows that are no pair": "A run refuses the set; left out, they may not be missing at random.",
    "chosen = rejected": "No reward can rank them: a tie of one half in every accuracy, a loss of ln 2 without "
    "gradient in training.",
    "contradicting pairs": "Another row prefers the other response: at most half of them can be ranked right.",
    "repeated pairs": "They weigh more than others, and intervals that take pairs for independent are too narrow.",
    "prompt repeated in both responses": "The model reads the prompt twice, and its tokens count as the response's; "
    "cut it off the responses.",
    "markers of a chat template in texts": "The model's own template is put around these: cut the markers, and give "
    "turns as messages.",
    "repeated prompts": "A split by pair puts one problem on both sides; split by prompt, and resample prompts for "
    "intervals.",
    "length shortcut": "Length alone ranks this well, and training can learn it in the place of quality: read the "
    "length-controlled accuracy.",
    "token overlap with the original": "A token-level shift has other tokens and the same content; near the overlap "
    "of the original with itself, it is none.",
    "chosen = rejected in tokens": "The model reads the same twice: a tie of one half in every accuracy, and nothing "
    "to train on.",
    "system turns": "The chat template takes none: the first user turn begins with them, or they are left out "
    "(--system).",
    "unknown tokens": "The tokenizer gives all words that it does not know one id: texts that differ only in them "
    "are the same to the model.",
}


class Finding(NamedTuple):
    """One fault of the data: what was found, where, how much of it, and what it would do to a result."""

    severity: Severity
    what: str
    where: str
    number: str
    effect: str

    @property
    def said(self) -> str:
        """The finding as a line."""
        return f"data: {self.what}, {self.where}: {self.number}. {self.effect}"


def _finding(severity: Severity, what: str, where: str, number: str) -> Finding:
    return Finding(severity, what, where, number, _EFFECTS[what])


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


def audit_sets(train_sets: Sequence[AuditSet], eval_sets: Sequence[AuditSet]) -> Audit:
    """Audit sets of at least one pair each."""
    train, evaluated = (
        [(item, IndexedPairs(item.pairs)) for item in items] for items in (train_sets, eval_sets)
    )
    return Audit(
        sets=tuple(audit_set(item, index=index) for item, index in (*train, *evaluated)),
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
        said = ", ".join(
            f"{what} {exact}{f' + {near} nearly' if near else ''}"
            for what, (exact, near) in found.repeats.items()
            if exact or near
        )
        yield _finding(
            "error" if leaked > _MANY * found.pairs else "warn",
            "leak",
            where,
            f"{leaked} of {found.pairs} pairs ({said})",
        )
    if found.chosen_as_rejected:
        number = f"{found.chosen_as_rejected} of {found.pairs} chosen responses"
        yield _finding("warn", "label flipped", where, number)


def token_findings(where: str, counts: "Counts", pairs: int) -> Iterator[Finding]:
    """Yield what is wrong with `pairs` prepared pairs as a model reads them."""
    if same := counts.identical:
        severity: Severity = "error" if same > _MANY * pairs else "warn"
        yield _finding(severity, "chosen = rejected in tokens", where, f"{same} of {pairs} pairs")
    if counts.without_system:
        yield _finding("info", "system turns", where, f"{counts.without_system} of {pairs} pairs")
    if counts.many_unknown:
        number = f"{share(counts.unknown_tokens / counts.tokens)} of {counts.tokens} tokens"
        yield _finding("error", "unknown tokens", where, number)


def set_findings(audit: SetAudit) -> Iterator[Finding]:
    """Yield what is wrong with one set."""
    where, pairs = audit.name, audit.pairs
    if bad := audit.unreadable:
        number = f"{len(bad)} of {pairs + len(bad)} rows ({bad[0]})"
        yield _finding("error", "rows that are no pair", where, number)
    for what, count in (
        ("chosen = rejected", audit.identical),
        ("contradicting pairs", audit.contradicted),
        ("repeated pairs", audit.repeated_pairs),
        ("prompt repeated in both responses", audit.prompt_repeated),
        ("markers of a chat template in texts", audit.templated),
    ):
        if count:
            yield _finding("warn", what, where, f"{count} of {pairs} pairs")
    if pairs - audit.prompts > _MANY * pairs:
        yield _finding("info", "repeated prompts", where, f"{audit.prompts} prompts in {pairs} pairs")
    yield from _length(audit)
    if found := audit.rewriting:
        yield _finding(
            "warn" if found["overlap"] > _HARDLY_REWRITTEN * found["itself"] else "info",
            "token overlap with the original",
            where,
            f"{found['overlap']:.3f} (the original with itself {found['itself']:.3f}; {found['unchanged']} of "
            f"{found['responses']} responses unchanged)",
        )


def _length(audit: SetAudit) -> Iterator[Finding]:
    longer = all(found.accuracy >= 0.5 for found in audit.longer_wins.values())
    better = {
        unit: found if longer else LongerWins(1 - found.accuracy, 1 - found.high, 1 - found.low)
        for unit, found in audit.longer_wins.items()
    }
    # A model reads tokens: a rule that holds in characters but not in words is out of its reach.
    least = min(better.values())
    if least.low <= 0.5 or least.accuracy < _SHORTCUT:
        return
    each = ", ".join(
        f"{share(found.accuracy)} in {unit} ({share(found.low)}–{share(found.high)})"
        for unit, found in better.items()
    )
    rank = (audit.role == "train") + (least.accuracy < _STRONG_SHORTCUT)
    rule = "longer wins" if longer else "shorter wins"
    yield _finding(SEVERITIES[rank], "length shortcut", audit.name, f"{rule}: {each}; Wilson 95 %")


# Sets and findings as rows of tables.

SETS = (
    *("set", "role", "pairs", "prompts", "words, median"),
    *("longer (characters) wins", "95 %"),
)
FINDINGS = ("severity", "finding", "where", "how much", "what it does to a result")


def set_row(item: SetAudit) -> tuple[str, ...]:
    """Return the row of a set; "longer wins" and its Wilson interval are in characters."""
    longer = item.longer_wins["characters"]
    return (
        item.name,
        item.role,
        str(item.pairs),
        str(item.prompts),
        " / ".join(f"{item.medians[column]['words']:.0f}" for column in _COLUMNS),
        share(longer.accuracy),
        f"{share(longer.low)}–{share(longer.high)}",
    )
