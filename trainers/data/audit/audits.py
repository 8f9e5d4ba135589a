"""All sets, and every training set against every evaluation set."""

from collections.abc import Sequence

from trainers.data.audit.findings import Audit
from trainers.data.audit.overlaps import indexed, overlap_of
from trainers.data.audit.sets import AuditSet, Tokenize, audit_set


def audit_sets(
    train_sets: Sequence[AuditSet],
    eval_sets: Sequence[AuditSet],
    *,
    tokenize: Tokenize | None = None,
    response_limit: int | None = None,
) -> Audit:
    """Audit sets of at least one pair each; `response_limit` is in tokens (words without `tokenize`)."""
    train = [(item, indexed(item.pairs)) for item in train_sets]
    evaluated = [(item, indexed(item.pairs)) for item in eval_sets]
    return Audit(
        sets=tuple(
            audit_set(item, tokenize=tokenize, response_limit=response_limit, index=index)
            for item, index in (*train, *evaluated)
        ),
        between=tuple(
            overlap_of(seen, index, item.pairs, names=(source.name, item.name))
            for source, seen in train
            for item, index in evaluated
        ),
    )
