"""The sentences of a report, computed from its numbers: what is concluded, and when to prefer which reward type.

It begins with three: who is ahead where and by how much; how surely; what could be fooling us.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orchestrator.report import published
from orchestrator.report.comparison import CONTROLS, Analysis, Controlled, Difference, Scope
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import Estimate, half_width
from orchestrator.report.tables import COMPARED, EXPLICIT, IMPLICIT, interval, reward_title

PREFERENCE = "When to prefer which"
# A control that moves EX−IM by less than this says nothing new.
MOVED = 0.02


def conclusions(analysis: Analysis) -> tuple[str, str, str]:
    """Return three sentences: the answer, its support, and its doubts."""
    known = {
        scope: found
        for scope in _asked(analysis)
        if (found := analysis.difference(scope, "accuracy")) is not None
    }
    if not known:
        counted = [result for result in analysis.results if result.learned and result.final]
        return (_uncompared(analysis), f"{_size(counted)}.", _doubts(analysis, known))
    return (_answer(analysis, known), _support(analysis, known), _doubts(analysis, known))


def _asked(analysis: Analysis) -> list[Scope]:
    """Return the categories that say how a type generalises: all but training pairs."""
    return [scope for scope in analysis.categories() if scope.category != "training pairs"]


def _answer(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    parts = []
    for train_set in analysis.train_sets:
        here = {scope: item for scope, item in known.items() if scope.train_set == train_set}
        if here:
            parts.append(f"trained on {train_set}, {_verdicts(here)}")
    return f"In accuracy (95 % intervals in brackets): {'; '.join(parts)}."


def _verdicts(found: dict[Scope, Difference]) -> str:
    """Say where each reward type is ahead, by how much, and where that cannot be told."""
    ahead: dict[str, list[str]] = {EXPLICIT: [], IMPLICIT: [], "": []}
    for scope, item in found.items():
        value = item.estimate
        winner = "" if not item.told_apart else EXPLICIT if value.value > 0 else IMPLICIT
        if winner == IMPLICIT:
            value = replace(value, value=-value.value, low=-value.high, high=-value.low)
        ahead[winner].append(f"{_under(scope.category)} ({interval(value)})")
    parts = [
        f"{winner} is ahead of {other} {_listed(ahead[winner])}"
        for winner, other in ((EXPLICIT, IMPLICIT), (IMPLICIT, EXPLICIT))
        if ahead[winner]
    ]
    if ahead[""]:
        parts.append(f"no difference of {EXPLICIT} from {IMPLICIT} can be told {_listed(ahead[''], 'or')}")
    return ", ".join(parts)


def _support(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    """Say the win-rates, how much there is to go by, and whether the signs are the paper's where it gives both numbers."""
    won = [analysis.win_rate(scope) for scope in known]
    size = _size([result for scope in known for result in analysis.compared(scope)])
    parts = [
        f"{EXPLICIT} is ahead in {sum(item.ahead for item in won)} of {sum(item.cells for item in won)} cells of model, "
        f"seed and set, tied within a point in {sum(item.ties for item in won)} and behind in "
        f"{sum(item.behind for item in won)}",
        size[:1].lower() + size[1:],
    ]
    signs = []
    for scope, item in known.items():
        theirs = [published.number(scope.train_set, scope.sets, kind, "accuracy") for kind in COMPARED]
        if theirs[0] is not None and theirs[1] is not None and theirs[0] != theirs[1]:
            signs.append((theirs[0] - theirs[1]) * item.estimate.value > 0)
    if signs:
        parts.append(
            f"the sign is the paper's ({published.SOURCE}) in {sum(signs)} of {len(signs)} categories"
        )
    return _sentence("; ".join(parts))


def _size(counted: Sequence[TrialResult]) -> str:
    if not counted:
        return "No trial has been trained, learned and evaluated yet"
    models = len({result.record.model for result in counted})
    seeds = len({result.record.seed for result in counted})
    pairs = sorted({len(item.scores.index) for result in counted for item in result.final})
    few = pairs[0]
    span = str(few) if len(pairs) == 1 else f"{few} to {pairs[-1]}"
    text = f"This rests on {_count(models, 'model')}, {_count(seeds, 'seed')} and {span} test pairs a set, "
    text += f"which alone leave ± {half_width(few):.2f} on a single accuracy of 0.75"
    if seeds == 1:
        return f"{text}, and one seed says nothing about others"
    return f"{text}, and {seeds} seeds say little about others" if seeds < 5 else text


def _doubts(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    doubts = [*_holes(analysis), *_controls(analysis, known), *_languages(analysis)]
    if doubts:
        return _sentence("What could be fooling us: " + "; ".join(doubts))
    if not known:
        return "Every trial is complete and learned."
    return "Every trial is complete and learned, and neither length nor leaks move what was compared."


def _holes(analysis: Analysis) -> Iterator[str]:
    missing = sum(not result.complete for result in analysis.results)
    if missing:
        yield (
            f"the sweep is incomplete, {missing} of {len(analysis.results)} trials are missing and nothing stands in "
            "for them"
        )
    if any(
        result.train_left_out or any(item.left_out for item in result.evaluations)
        for result in analysis.results
    ):
        yield "pairs over the length limits are left out"
    unlearned = [result for result in analysis.results if result.trained and not result.learned]
    if unlearned:
        kinds = sorted({reward_title(result.record.reward) for result in unlearned})
        enter = "enters" if len(unlearned) == 1 else "enter"
        yield f"{_count(len(unlearned), 'trial')} ({', '.join(kinds)}) did not learn and {enter} no mean"


def _controls(analysis: Analysis, known: dict[Scope, Difference]) -> Iterator[str]:
    """Say where length or leaks account for some of a difference, and where that was not checked."""
    unmeasured = []
    for metric, title in CONTROLS.items():
        found = {scope: analysis.control(scope, metric) for scope in known}
        if known and not any(found.values()):
            unmeasured.append(title)
        for scope, gap in found.items():
            plain = known[scope].value
            if gap and abs(gap.value - plain) >= MOVED:
                where = _under(scope.category)
                where += f" of {scope.train_set}" if len(analysis.train_sets) > 1 else ""
                yield f"{title}, EX−IM is {gap.value:+.3f} {where} where it was {plain:+.3f}"
    if unmeasured:
        verb = "was" if len(unmeasured) == 1 else "were"
        yield f"{_listed(unmeasured)} accuracy {verb} not measured"


def _languages(analysis: Analysis) -> Iterator[str]:
    """Say where French and Spanish, which are the same rewriting twice, answer differently."""
    if not analysis.both:
        return
    by_name = {(scope.train_set, scope.dataset): scope for scope in analysis.single_sets()}
    for (train_set, name), scope in by_name.items():
        other = by_name.get((train_set, f"{name.removesuffix('french')}spanish"))
        if not name.endswith("french") or other is None:
            continue
        french, spanish = (analysis.difference(item, "accuracy") for item in (scope, other))
        if french and spanish and french.estimate.value * spanish.estimate.value < 0:
            yield (
                f"trained on {train_set}, EX−IM is {french.estimate.value:+.3f} in French but "
                f"{spanish.estimate.value:+.3f} in Spanish"
            )


def _uncompared(analysis: Analysis) -> str:
    """Say how each type does by itself, and why there is nothing to compare."""
    parts = []
    for scope in _asked(analysis):
        for kind in analysis.rewards:
            found = analysis.mean_of_models(scope, kind, "accuracy")
            if found is not None:
                value = found.estimate
                parts.append(
                    f"trained on {scope.train_set}, {reward_title(kind)} ranks {value.value:.3f} "
                    f"[{value.low:.3f}, {value.high:.3f}] of the pairs right {_under(scope.category)}"
                )
    if not parts:
        why = "no trial has been trained, learned and evaluated"
        if any(result.learned and result.final for result in analysis.results):
            why = "no model has every reward type trained, learned and evaluated on all sets of a category"
        return f"Nothing can be concluded yet: {why}."
    alone = f"the sweep does not hold both {EXPLICIT} and {IMPLICIT}"
    if analysis.both:
        alone = f"no model and seed has learned with both {EXPLICIT} and {IMPLICIT}"
    return _sentence("; ".join(parts) + f"; there is nothing to compare, as {alone}")


def preference(found: Sequence[Controlled]) -> str:
    """Say when to prefer which reward type: what EX−IM and its controls advise, and what is not known."""
    asked = [item for item in found if item.category != "training pairs"]
    if not asked:
        return (
            f"Nothing can be advised: no model and seed has learned with both {EXPLICIT} and {IMPLICIT} "
            "and was evaluated with both."
        )
    return " ".join(_advice(item) for item in asked) + (
        " Brackets are 95 % intervals over test pairs and seeds, given these models."
    )


def _advice(item: Controlled) -> str:
    """Say which reward type leads, and whether the lead stays once length and leaks are controlled for."""
    where, plain = f"Trained on {item.train_set}, {_under(item.category)}", item.plain
    controls = {"at matched lengths": item.length, "on pairs that training has not seen": item.leak_free}
    if item.told_apart:
        said = [f"{title} {_survives(value, plain)}" for title, value in controls.items()]
        return f"{where}: prefer {_ahead(plain)} (EX−IM {interval(plain)}); {', '.join(said)}."
    shown = [
        f"{title} {_ahead(value)} leads ({interval(value)})"
        for title, value in controls.items()
        if value is not None and value.excludes_zero
    ]
    masked = f"; {', '.join(shown)}" if shown else ""
    return f"{where}: neither is to be preferred (EX−IM {interval(plain)}){masked}."


def _survives(value: Estimate | None, plain: Estimate) -> str:
    if value is None:
        return "it cannot be told"
    if not value.excludes_zero:
        return f"no lead can be told ({interval(value)})"
    if value.value * plain.value > 0:
        return f"the lead stays ({interval(value)})"
    return f"the other one leads ({interval(value)}), so the lead is not one of quality"


def _ahead(value: Estimate) -> str:
    return EXPLICIT if value.value > 0 else IMPLICIT


def _under(category: str) -> str:
    return category if category == "in-distribution" else f"under {category}"


def _listed(items: Sequence[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
