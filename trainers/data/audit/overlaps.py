"""What an evaluation set shares with a training set, and which of its pairs training has therefore seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainers.data.audit.duplicates import TextIndex, index_columns
from trainers.data.audit.findings import Finding
from trainers.data.audit.lengths import LONG
from trainers.data.records import Pair

_BADLY_LEAKED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Pairs of the evaluation set, counted, whose texts stand in the training split (drawn or not).

    `leaked` are the rows that training has seen: their prompt stands there, word for word or nearly, or one of their
    responses of at least 100 characters does.
    """

    train: str
    evaluated: str
    pairs: int
    prompts_exact: int
    prompts_near: int
    chosen_exact: int
    chosen_near: int
    rejected_exact: int
    rejected_near: int
    chosen_as_rejected: int
    leaked: tuple[int, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What it would do to the evaluation."""
        return tuple(_findings(self))


def indexed(pairs: Sequence[Pair]) -> tuple[TextIndex, ...]:
    """Prompts, chosen and rejected responses, searchable."""
    prompts = ("\n".join(turn.content for turn in pair.prompt) for pair in pairs)
    return index_columns(
        [prompts, (pair.chosen for pair in pairs), (pair.rejected for pair in pairs)],
    )


def overlap(train: Sequence[Pair], evaluated: Sequence[Pair], *, names: tuple[str, str]) -> Overlap:
    """Compare two lists of pairs; `names` are the training set's and the evaluation set's."""
    return overlap_of(indexed(train), indexed(evaluated), evaluated, names=names)


def overlap_of(
    train: Sequence[TextIndex],
    evaluated: Sequence[TextIndex],
    pairs: Sequence[Pair],
    *,
    names: tuple[str, str],
) -> Overlap:
    """As `overlap`, of columns that are indexed already."""
    prompts, chosen, rejected = (
        mine.repeats_of(theirs) for mine, theirs in zip(evaluated, train, strict=True)
    )
    leaked = set(prompts.rows)
    leaked |= {row for row in chosen.rows if len(pairs[row].chosen) >= LONG}
    leaked |= {row for row in rejected.rows if len(pairs[row].rejected) >= LONG}
    crossed = [row for row in evaluated[1].repeats_of(train[2]).exact if len(pairs[row].chosen) >= LONG]
    return Overlap(
        train=names[0],
        evaluated=names[1],
        pairs=len(pairs),
        prompts_exact=len(prompts.exact),
        prompts_near=len(prompts.near),
        chosen_exact=len(chosen.exact),
        chosen_near=len(chosen.near),
        rejected_exact=len(rejected.exact),
        rejected_near=len(rejected.near),
        chosen_as_rejected=len(crossed),
        leaked=tuple(sorted(leaked)),
    )


def _findings(found: Overlap) -> Iterator[Finding]:
    where = f"{found.evaluated} evaluated, {found.train} trained on"
    leaked = len(found.leaked)
    if leaked:
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
            severity="error" if leaked > _BADLY_LEAKED * found.pairs else "warn",
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
