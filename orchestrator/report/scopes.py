"""What is averaged together: the evaluation sets of a category, or one of them alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.report.results import TrialResult
from orchestrator.spec.trials import CATEGORIES, Category


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Evaluation sets that are averaged: those of a category, or one set alone (`dataset`) of a category."""

    train_set: str
    category: Category
    sets: tuple[str, ...]
    dataset: str = ""

    def alone(self, name: str) -> "Scope":
        """One of its sets."""
        return replace(self, sets=(name,), dataset=name)


def category_scopes(results: Sequence[TrialResult]) -> Iterator[Scope]:
    """Each training set's categories."""
    for train_set in dict.fromkeys(result.record.train_set for result in results):
        for category in CATEGORIES:
            sets = _declared_sets(results, train_set, category)
            if sets:
                yield Scope(train_set=train_set, category=category, sets=sets)


def set_scopes(results: Sequence[TrialResult]) -> Iterator[Scope]:
    """Each training set's evaluation sets, Spanish beside French."""
    for scope in category_scopes(results):
        for name in scope.sets:
            yield scope.alone(name)


def _declared_sets(results: Sequence[TrialResult], train_set: str, category: Category) -> tuple[str, ...]:
    found = dict.fromkeys(
        item.dataset
        for result in results
        if result.record.train_set == train_set
        for item in result.record.evaluations
        if item.category == category
    )
    return tuple(spanish_beside_french(list(found)))


def spanish_beside_french(names: Sequence[str]) -> list[str]:
    """The names in their order, but `…_french` and `…_spanish` together, where the first of them stands."""
    placed: list[str] = []
    for name in names:
        stem = name.removesuffix("french").removesuffix("spanish")
        partners = [name] if stem == name else [f"{stem}french", f"{stem}spanish"]
        placed += [item for item in partners if item in names and item not in placed]
    return placed
