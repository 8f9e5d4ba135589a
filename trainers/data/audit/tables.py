"""The audit for a terminal and for a document."""

from collections.abc import Sequence

from rich.table import Table

from trainers.data.audit.findings import Audit
from trainers.data.audit.rules import share
from trainers.data.audit.sets import SetAudit
from trainers.data.audit.texts import UNKNOWN

_STYLES = {"error": "red", "warn": "yellow", "info": ""}
SETS = (
    "set",
    "role",
    "pairs",
    "prompts",
    "language",
    "words, median",
    "longer (characters) wins",
    "95 %",
    "alike",
    "cut",
)
FINDINGS = ("severity", "finding", "where", "how much", "what it does to a result")


def sets_rows(sets: Sequence[SetAudit]) -> list[tuple[str, ...]]:
    """One line per set; "longer wins" and its Wilson interval are in characters, "cut" counts chosen / rejected."""
    return [_set_row(item) for item in sets]


def _set_row(item: SetAudit) -> tuple[str, ...]:
    codes = (
        next((code for code in item.languages[column] if code != UNKNOWN), "–") for column in item.languages
    )
    medians = (
        next(length.median for length in item.lengths[column] if length.unit == "words")
        for column in ("prompt", "chosen", "rejected")
    )
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


def findings_rows(audit: Audit) -> list[tuple[str, ...]]:
    """One line per finding, the worst first."""
    return [(item.severity, item.what, item.where, item.number, item.effect) for item in audit.findings]


def sets_table(audit: Audit) -> Table:
    """For a terminal."""
    table = Table(title="sets", title_justify="left")
    for number, name in enumerate(SETS):
        table.add_column(name, overflow="fold", justify="left" if number < 2 else "right")
    for row in sets_rows(audit.sets):
        table.add_row(*row)
    return table


def findings_table(audit: Audit) -> Table:
    """For a terminal."""
    table = Table(title="findings", title_justify="left", show_lines=True)
    for name in FINDINGS:
        table.add_column(name, overflow="fold")
    for row in findings_rows(audit):
        table.add_row(*row, style=_STYLES[row[0]])
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a document; what a cell holds is shown, not rendered as columns."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
