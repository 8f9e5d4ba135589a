"""A finding, and the whole audit as plain values."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trainers.data.audit.overlaps import Overlap
    from trainers.data.audit.sets import SetAudit

Severity = Literal["info", "warn", "error"]
# Raised by hand when what is measured changes: kept audits are then made anew.
VERSION = 1
SEVERITIES: tuple[Severity, ...] = ("error", "warn", "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Every set, every (training set, evaluation set), and the findings, the worst first.

    `tokens` are findings in the sets as models read them.
    """

    sets: "tuple[SetAudit, ...]"
    between: "tuple[Overlap, ...]"
    tokens: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of sets, between them and of their tokens; errors first."""
        found = [finding for overlap in self.between for finding in overlap.findings]
        found += [*(finding for item in self.sets for finding in item.findings), *self.tokens]
        return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

    def as_json(self) -> dict[str, Any]:
        """Plain values, as audit.json holds them."""
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "sets": [dataclasses.asdict(item) for item in self.sets],
            "between": [dataclasses.asdict(item) for item in self.between],
        }
