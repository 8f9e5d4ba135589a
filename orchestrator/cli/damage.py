"""Artifacts that are not what was written, found before they are needed, and said aloud."""

from collections.abc import Sequence

from orchestrator.cli.session import Session
from orchestrator.report.results import of_other_weights
from orchestrator.spec.stages import PrepareStage
from orchestrator.spec.trial_plan import TrialPlan
from trainers.errors import Damaged


def say_damage(session: Session, missing: Sequence[TrialPlan]) -> None:
    """Name the manifests that are not what was written, and scores of other weights; their stages count as missing."""
    stages = {(stage.kind, stage.key) for item in missing for stage in item.missing(session.store)}
    for kind, key in sorted(stages):
        fault = session.store.fault(kind, key)
        if fault is not None:
            _warn(session, f"damaged: {fault}; it is made again")
    for item in missing:
        old = [
            s.prepared.split.name
            for s in item.unscored(session.store)
            if session.store.complete(s.kind, s.key)
        ]
        if old:
            _warn(session, f"{item.spec.name}: {of_other_weights(old)}; they are made again")


def discard_damaged_scores(session: Session, plans: Sequence[TrialPlan]) -> None:
    """Take scores that are not what was written out of the store: the report would be the first to read them."""
    for stage in (stage for plan in plans for stage in plan.evaluations):
        _discard_damaged(session, stage.kind, stage.key, "scores.parquet")


def discard_damaged_rows(session: Session, plans: Sequence[TrialPlan]) -> bool:
    """Take data sets that a preparation is about to read and that are not what was written out of the store."""
    missing = (stage for plan in plans for stage in plan.missing(session.store))
    digests = sorted({stage.split.digest for stage in missing if isinstance(stage, PrepareStage)})
    # All of them, not only the first.
    discarded = [_discard_damaged(session, "dataset", digest, "pairs.jsonl") for digest in digests]
    return any(discarded)


def say_damaged_logs(session: Session, keys: Sequence[str]) -> None:
    """Name the logs of complete trainings that cannot be shown; nothing is trained again for their sake."""
    for key in keys:
        error = _damage(session, "train", key, "log.parquet")
        if error is not None:
            _warn(session, f"damaged: {error}; MLflow is not given its curve, weights and scores are sound")


def _discard_damaged(session: Session, stage: str, key: str, name: str) -> bool:
    error = _damage(session, stage, key, name)
    if error is None:
        return False
    session.store.discard(error.stage, error.key, error.attempt)
    _warn(session, f"damaged: {error}; it is made again")
    return True


def _damage(session: Session, stage: str, key: str, name: str) -> Damaged | None:
    """What is wrong with one file of a committed artifact, None where nothing is."""
    try:
        session.store.manifest_and_file(stage, key, name)
    except Damaged as error:
        # Of a manifest that is itself damaged `say_damage` tells: it names no attempt.
        return error if error.attempt else None
    return None


def _warn(session: Session, text: str) -> None:
    session.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
