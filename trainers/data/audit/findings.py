"""From what sets hold and share to findings: thresholds, severities, and what each would do to a result."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainers.data.audit.overlaps import IndexedPairs, Overlap, overlap
from trainers.data.audit.sets import LANGUAGE_SAMPLE, AuditSet, SetAudit, Tokenize, audit_set
from trainers.data.texts import UNKNOWN

if TYPE_CHECKING:
    from trainers.pairs.tokens import Counts

Severity = Literal["error", "warn", "info"]
# Raise when what is measured changes: kept audits are then made anew.
VERSION = 3
SEVERITIES: tuple[Severity, ...] = ("error", "warn", "info")

# Accuracies of a rule that looks at lengths alone.
_SHORTCUT, _STRONG_SHORTCUT = 0.55, 0.75
_ALIKE = 0.9
_MANY, _FEW = 0.05, 0.01
# A rewriting that shares this much of what an original shares with itself is hardly one.
_HARDLY_REWRITTEN = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault of the data: what was found, where, how much of it, and what it would do to a result."""

    severity: Severity
    what: str
    where: str
    number: str
    effect: str

    @property
    def row(self) -> tuple[str, ...]:
        """The finding as a row of FINDINGS."""
        return self.severity, self.what, self.where, self.number, self.effect

    @property
    def said(self) -> str:
        """The finding as a line."""
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
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "sets": [dataclasses.asdict(item) for item in self.sets],
            "between": [dataclasses.asdict(item) for item in self.between],
        }


def audit_sets(
    train_sets: Sequence[AuditSet],
    eval_sets: Sequence[AuditSet],
    *,
    tokenize: Tokenize | None = None,
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
        yield Finding(
            severity="error" if leaked > _MANY * found.pairs else "warn",
            what="leak",
            where=where,
            number=f"{leaked} of {found.pairs} pairs ({said})",
            effect="Accuracy rewards remembering these problems, not generalising; "
            f"read it on the {found.pairs - leaked} pairs that training has not seen.",
        )
    if found.chosen_as_rejected:
        yield Finding(
            severity="warn",
            what="label flipped",
            where=where,
            number=f"{found.chosen_as_rejected} of {found.pairs} chosen responses",
            effect="Training rejects what the evaluation prefers, so a model that learned it is marked wrong.",
        )


def token_findings(where: str, counts: "Counts", pairs: int) -> Iterator[Finding]:
    """Yield what is wrong with `pairs` prepared pairs as a model reads them."""
    if counts.identical:
        yield Finding(
            severity="error" if counts.identical > _MANY * pairs else "warn",
            what="chosen = rejected in tokens",
            where=where,
            number=f"{counts.identical} of {pairs} pairs",
            effect="The model reads the same twice: a tie of one half in every accuracy, and nothing to train on.",
        )
    if counts.without_system:
        yield Finding(
            severity="info",
            what="system turns",
            where=where,
            number=f"{counts.without_system} of {pairs} pairs",
            effect="The chat template takes none: the first user turn begins with them, or they are left out (--system).",
        )
    if counts.many_unknown:
        yield Finding(
            severity="error",
            what="unknown tokens",
            where=where,
            number=f"{share(counts.unknown_tokens / counts.tokens)} of {counts.tokens} tokens",
            effect="The tokenizer gives all words that it does not know one id: texts that differ only in them are the "
            "same to the model.",
        )


def set_findings(audit: SetAudit) -> Iterator[Finding]:
    """Yield what is wrong with one set."""
    for part in (_rows, _length, _cut, _languages, _rewriting):
        for severity, what, number, effect in part(audit):
            yield Finding(severity=severity, what=what, where=audit.name, number=number, effect=effect)


# (severity, what, number, effect)
_Said = Iterator[tuple[Severity, str, str, str]]


def _rows(audit: SetAudit) -> _Said:
    of_pairs = f"of {audit.pairs} pairs"
    if audit.unreadable:
        rows = audit.pairs + len(audit.unreadable)
        number = f"{len(audit.unreadable)} of {rows} rows ({audit.unreadable[0]})"
        effect = "A run refuses the set; left out, they may not be missing at random."
        yield "error", "rows that are no pair", number, effect
    if audit.identical:
        effect = "No reward can rank them: a tie of one half in every accuracy, a loss of ln 2 without gradient in training."
        yield "warn", "chosen = rejected", f"{audit.identical} {of_pairs}", effect
    if audit.contradicted:
        effect = "Another row prefers the other response, so at most half of them can be ranked right."
        yield "warn", "contradicting pairs", f"{audit.contradicted} {of_pairs}", effect
    if audit.repeated_pairs:
        effect = "They weigh more than others, and intervals that take pairs for independent are too narrow."
        yield "warn", "repeated pairs", f"{audit.repeated_pairs} {of_pairs}", effect
    if audit.prompt_repeated:
        effect = "The model reads the prompt twice, and its tokens count as the response's; cut it off the responses."
        yield "warn", "prompt repeated in both responses", f"{audit.prompt_repeated} {of_pairs}", effect
    if audit.templated:
        effect = "The model's own template is put around these: cut the markers, and give turns as messages."
        yield "warn", "markers of a chat template in texts", f"{audit.templated} texts", effect
    if audit.repeated_prompts > _MANY * audit.pairs:
        effect = "A split by pair puts one problem on both sides; split by prompt, and resample prompts for intervals."
        yield "info", "repeated prompts", f"{audit.prompts} prompts in {audit.pairs} pairs", effect
    if audit.similarity >= _ALIKE:
        effect = (
            "Chosen and rejected differ in a few words, so margins are small and rewards summed over tokens are decided "
            "by those few."
        )
        yield "info", "responses alike", f"similarity {audit.similarity:.3f}", effect


def _length(audit: SetAudit) -> _Said:
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
    yield severity, "length shortcut", f"{least.better}: {each}; Wilson 95 %", effect


def _cut(audit: SetAudit) -> _Said:
    shares = {column: audit.cut[column] / long for column, long in audit.long_responses.items() if long}
    if not shares or max(shares.values()) <= _MANY:
        return
    number = ", ".join(f"{audit.cut[column]} of {audit.long_responses[column]} {column}" for column in shares)
    if len(shares) == 2 and abs(shares["chosen"] - shares["rejected"]) > _MANY:
        effect = "More on one side than on the other: an ending alone tells chosen from rejected."
        yield "warn", "unfinished responses", number, effect
    else:
        effect = (
            "Responses end in mid-sentence on both sides: rewards read at the last token judge a fragment."
        )
        yield "info", "unfinished responses", number, effect


def _languages(audit: SetAudit) -> _Said:
    looked_at = min(audit.pairs, LANGUAGE_SAMPLE)
    if audit.another_language > _FEW * looked_at:
        effect = "The language, not the quality, may tell chosen from rejected."
        number = f"{audit.another_language} of {looked_at} pairs looked at"
        yield "warn", "responses in two languages", number, effect
    main = {
        column: next((code for code in shares if code != UNKNOWN), UNKNOWN)
        for column, shares in audit.languages.items()
    }
    if len({*main.values()} - {UNKNOWN}) > 1:
        number = ", ".join(f"{column} {code}" for column, code in main.items())
        effect = (
            "A reward may judge the switch of language; in a translated set that is the shift that is wanted."
        )
        yield "info", "prompt and response in two languages", number, effect


def _rewriting(audit: SetAudit) -> _Said:
    found = audit.rewriting
    if found is None:
        return
    number = (
        f"{found.overlap:.3f} (the original with itself {found.itself:.3f}; {found.unchanged} of "
        f"{found.responses} responses unchanged)"
    )
    what = "token overlap with the original"
    if found.overlap > _HARDLY_REWRITTEN * found.itself:
        yield "warn", what, number, "The responses are hardly rewritten: this is no token-level shift."
    else:
        effect = "The tokens are others while the content is the same: a token-level shift, as declared."
        yield "info", what, number, effect


# Both as rows of tables.

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
