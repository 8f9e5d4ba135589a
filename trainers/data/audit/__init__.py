"""What in preference data would mislead: leaks, length shortcuts, identical and cut responses (paper §6).

    audit = audit_sets(train_sets, eval_sets)      per set, and between every training and evaluation set
    leaked = audit.between[0].leaked               rows of the evaluation set that training has seen

Pure functions of pairs; who reads the pairs and who prints the findings is elsewhere.
"""

from trainers.data.audit.audits import audit_sets
from trainers.data.audit.findings import VERSION, Audit, Finding
from trainers.data.audit.overlaps import Overlap, overlap
from trainers.data.audit.rules import token_findings
from trainers.data.audit.sets import AuditSet, SetAudit, audit_set, read_set_audit

__all__ = [
    "VERSION",
    "Audit",
    "AuditSet",
    "Finding",
    "Overlap",
    "SetAudit",
    "audit_set",
    "audit_sets",
    "overlap",
    "read_set_audit",
    "token_findings",
]
