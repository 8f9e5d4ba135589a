"""What in preference data would mislead: leaks, length shortcuts, identical and cut responses (paper §6).

    audit = audit_sets(train_sets, eval_sets)      each set, and every training set against every evaluation set
    leaked = audit.between[0].leaked               rows of the evaluation set that training has seen

All of it is pure functions of pairs.
"""

from trainers.data.audit.findings import VERSION, Audit, Finding, audit_sets, token_findings
from trainers.data.audit.overlaps import IndexedPairs, Overlap, overlap
from trainers.data.audit.sets import AuditSet, Role, SetAudit, audit_set, originals, read_set_audit

__all__ = [
    "VERSION",
    "Audit",
    "AuditSet",
    "Finding",
    "IndexedPairs",
    "Overlap",
    "Role",
    "SetAudit",
    "audit_set",
    "audit_sets",
    "originals",
    "overlap",
    "read_set_audit",
    "token_findings",
]
