"""The audit as rows of tables."""

from collections.abc import Sequence

from trainers.data.audit.findings import Audit, share
from trainers.data.audit.sets import SetAudit
from trainers.data.texts import UNKNOWN

SETS = (
    *("set", "role", "pairs", "prompts", "language", "words, median"),
    *("longer (characters) wins", "95 %", "alike", "cut"),
)
FINDINGS = ("severity", "finding", "where", "how much", "what it does to a result")


def sets_rows(sets: Sequence[SetAudit]) -> list[tuple[str, ...]]:
    """Return a row per set; "longer wins" and its Wilson interval are in characters, "cut" counts chosen / rejected."""
    return [_set_row(item) for item in sets]


def _set_row(item: SetAudit) -> tuple[str, ...]:
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


def findings_rows(audit: Audit) -> list[tuple[str, ...]]:
    """Return a row per finding, the worst first."""
    return [(item.severity, item.what, item.where, item.number, item.effect) for item in audit.findings]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; signs in a cell that would divide it are escaped."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
