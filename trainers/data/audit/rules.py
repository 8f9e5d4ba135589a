"""From what a set holds to findings: thresholds, severities, and what each would do to a result."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainers.data.audit.findings import Finding, Severity
from trainers.data.audit.texts import LANGUAGE_SAMPLE, UNKNOWN

if TYPE_CHECKING:
    from trainers.data.audit.sets import SetAudit
    from trainers.pairs import Counts

# Of the accuracy of a rule that looks at lengths alone.
SHORTCUT, STRONG_SHORTCUT = 0.55, 0.75
ALIKE = 0.9
MANY = 0.05
FEW = 0.01
# A rewriting that shares this much of what an original shares with itself is hardly one.
HARDLY_REWRITTEN = 0.8


def set_findings(audit: "SetAudit") -> Iterator[Finding]:
    """Everything worth saying of one set."""
    yield from _rows(audit)
    yield from _repeats(audit)
    yield from _length(audit)
    yield from _cut(audit)
    yield from _languages(audit)
    yield from _rewriting(audit)
    if audit.similarity >= ALIKE:
        yield _finding(
            audit,
            "info",
            "responses alike",
            f"similarity {audit.similarity:.3f}",
            "Chosen and rejected differ in a few words, so margins are small and rewards summed over tokens are "
            "decided by those few.",
        )


def token_findings(where: str, counts: "Counts", pairs: int) -> Iterator[Finding]:
    """What is worth saying of `pairs` prepared pairs as a model reads them."""
    if counts.identical:
        yield Finding(
            severity="error" if counts.identical > MANY * pairs else "warn",
            what="chosen = rejected in tokens",
            where=where,
            number=f"{counts.identical} of {pairs} pairs",
            effect="The model reads the same twice: a tie of one half in every accuracy, and nothing to train on.",
        )
    if counts.many_unknown:
        yield Finding(
            severity="error",
            what="unknown tokens",
            where=where,
            number=f"{share(counts.unknown_tokens / counts.tokens)} of {counts.tokens} tokens",
            effect="The tokenizer gives all words that it does not know one id: texts that differ only in them are the same to the model.",
        )


def share(value: float) -> str:
    """Three decimals, half rounded up: 127.5 of 200 is 0.638."""
    return f"{value + 1e-9:.3f}"


def _finding(audit: "SetAudit", severity: Severity, what: str, number: str, effect: str) -> Finding:
    return Finding(severity=severity, what=what, where=audit.name, number=number, effect=effect)


def _rows(audit: "SetAudit") -> Iterator[Finding]:
    if audit.unreadable:
        yield _finding(
            audit,
            "error",
            "rows that are no pair",
            f"{len(audit.unreadable)} of {audit.pairs + len(audit.unreadable)} rows ({audit.unreadable[0]})",
            "A run refuses the set; left out, they may not be missing at random.",
        )
    if audit.identical:
        yield _finding(
            audit,
            "warn",
            "chosen = rejected",
            f"{audit.identical} of {audit.pairs} pairs",
            "No reward can rank them: a tie of one half in every accuracy, a loss of ln 2 without gradient in training.",
        )
    if audit.contradicted:
        yield _finding(
            audit,
            "warn",
            "contradicting pairs",
            f"{audit.contradicted} of {audit.pairs} pairs",
            "Another row prefers the other response, so at most half of them can be ranked right.",
        )


def _repeats(audit: "SetAudit") -> Iterator[Finding]:
    if audit.repeated_pairs:
        yield _finding(
            audit,
            "warn",
            "repeated pairs",
            f"{audit.repeated_pairs} of {audit.pairs} pairs",
            "They weigh more than others, and intervals that take pairs for independent are too narrow.",
        )
    if audit.repeated_prompts > MANY * audit.pairs:
        yield _finding(
            audit,
            "info",
            "repeated prompts",
            f"{audit.prompts} prompts in {audit.pairs} pairs",
            "A split by pair puts one problem on both sides; split by prompt, and resample prompts for intervals.",
        )


def _length(audit: "SetAudit") -> Iterator[Finding]:
    # A model reads tokens: a rule that holds in characters but not in words is out of its reach.
    least = min(audit.baselines, key=lambda baseline: baseline.shortcut)
    agree = len({baseline.better for baseline in audit.baselines}) == 1
    if not agree or not least.significant or least.shortcut < SHORTCUT:
        return
    evaluated, strong = audit.role == "eval", least.shortcut >= STRONG_SHORTCUT
    longer = least.longer_wins >= 0.5
    each = ", ".join(
        f"{share(item.shortcut)} in {item.unit} ({share(item.low if longer else 1 - item.high)}–"
        f"{share(item.high if longer else 1 - item.low)})"
        for item in audit.baselines
    )
    severity: Severity = "error" if evaluated and strong else "warn" if evaluated or strong else "info"
    yield _finding(
        audit,
        severity,
        "length shortcut",
        f"{least.better}: {each}; Wilson 95 %",
        "A reward of length alone has this accuracy; compare with it, and read the length-controlled accuracy."
        if evaluated
        else "Training can learn length in the place of quality.",
    )


def _cut(audit: "SetAudit") -> Iterator[Finding]:
    for column, count in audit.at_limit.items():
        if count:
            yield _finding(
                audit,
                "warn",
                "at the length limit",
                f"{count} of {audit.pairs} {column} responses",
                "They were probably cut there: what made the response good may be missing.",
            )
    shares = {column: audit.cut[column] / long for column, long in audit.long_responses.items() if long}
    if not shares or max(shares.values()) <= MANY:
        return
    said = ", ".join(f"{audit.cut[column]} of {audit.long_responses[column]} {column}" for column in shares)
    uneven = len(shares) == 2 and abs(shares["chosen"] - shares["rejected"]) > MANY
    yield _finding(
        audit,
        "warn" if uneven else "info",
        "unfinished responses",
        said,
        "More on one side than on the other: an ending alone tells chosen from rejected."
        if uneven
        else "Responses end in mid-sentence on both sides: rewards read at the last token judge a fragment.",
    )


def _languages(audit: "SetAudit") -> Iterator[Finding]:
    main = {
        column: next((code for code in shares if code != UNKNOWN), UNKNOWN)
        for column, shares in audit.languages.items()
    }
    if audit.another_language > FEW * min(audit.pairs, LANGUAGE_SAMPLE):
        yield _finding(
            audit,
            "warn",
            "responses in two languages",
            f"{audit.another_language} of {min(audit.pairs, LANGUAGE_SAMPLE)} pairs looked at",
            "The language, not the quality, may tell chosen from rejected.",
        )
    known = {code for code in main.values() if code != UNKNOWN}
    if len(known) > 1:
        yield _finding(
            audit,
            "info",
            "prompt and response in two languages",
            ", ".join(f"{column} {code}" for column, code in main.items()),
            "A reward may judge the switch of language; in a translated set that is the shift that is wanted.",
        )


def _rewriting(audit: "SetAudit") -> Iterator[Finding]:
    found = audit.rewriting
    if found is None:
        return
    hardly = found.overlap > HARDLY_REWRITTEN * found.itself
    yield _finding(
        audit,
        "warn" if hardly else "info",
        "token overlap with the original",
        f"{found.overlap:.3f} (the original with itself {found.itself:.3f}; {found.unchanged} of "
        f"{found.responses} responses unchanged)",
        "The responses are hardly rewritten: this is no token-level shift."
        if hardly
        else "The tokens are others while the content is the same: a token-level shift, as declared.",
    )
