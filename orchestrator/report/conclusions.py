"""The three sentences that a report begins with, computed from its numbers.

Who is ahead where and by how much; how surely; what could be fooling us.
"""

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.report import published
from orchestrator.report.answers import SIDE_METRICS
from orchestrator.report.comparison import Analysis, Difference
from orchestrator.report.results import TrialResult
from orchestrator.report.scopes import Scope
from orchestrator.report.statistics import Estimate, WinRate, half_width
from orchestrator.report.summary import COMPARED, reward_title

EXPLICIT, IMPLICIT = map(reward_title, COMPARED)
# A control that moves EX−IM by less than this says nothing new.
MOVED = 0.02


def conclusions(analysis: Analysis) -> tuple[str, str, str]:
    """The answer, its support, and its doubts."""
    found = {scope: analysis.difference(scope, "accuracy") for scope in _asked(analysis)}
    known = {scope: item for scope, item in found.items() if item is not None}
    if not known:
        counted = [result for result in analysis.results if result.learned and result.final]
        return (_uncompared(analysis), _size(counted), _doubts(analysis, known))
    return (_answer(analysis, known), _support(analysis, known), _doubts(analysis, known))


def _asked(analysis: Analysis) -> Iterator[Scope]:
    """The categories that say how a type generalises: training pairs do not."""
    return (scope for scope in analysis.categories() if scope.category != "training pairs")


def _answer(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    parts = []
    for train_set in analysis.train_sets:
        here = {scope: item for scope, item in known.items() if scope.train_set == train_set}
        if here:
            parts.append(f"trained on {train_set}, {_verdicts(here)}")
    return f"In accuracy (95 % intervals in brackets): {'; '.join(parts)}."


def _verdicts(found: dict[Scope, Difference]) -> str:
    ahead: dict[str, list[str]] = {EXPLICIT: [], IMPLICIT: [], "": []}
    for scope, item in found.items():
        winner = "" if not item.told_apart else EXPLICIT if item.estimate.value > 0 else IMPLICIT
        value = item.estimate if winner != IMPLICIT else _turned(item.estimate)
        ahead[winner].append(f"{_where(scope)} ({_shown(value)})")
    parts = [
        f"{winner} is ahead of {IMPLICIT if winner == EXPLICIT else EXPLICIT} {_listed(places)}"
        for winner, places in ahead.items()
        if winner and places
    ]
    if ahead[""]:
        parts.append(f"no difference of {EXPLICIT} from {IMPLICIT} can be told {_listed(ahead[''], 'or')}")
    return ", ".join(parts)


def _support(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    won = [analysis.win_rate(scope) for scope in known]
    total = WinRate(
        ahead=sum(item.ahead for item in won),
        ties=sum(item.ties for item in won),
        behind=sum(item.behind for item in won),
    )
    parts = [
        f"{EXPLICIT} is ahead in {total.ahead} of {total.cells} cells of model, seed and set, tied within a point "
        f"in {total.ties} and behind in {total.behind}",
        _size([result for scope in known for result in analysis.compared(scope)])
        .removesuffix(".")
        .replace("This rests", "this rests"),
    ]
    if agreed := _beside_paper(analysis, known):
        parts.append(agreed)
    return _sentence("; ".join(parts))


def _size(counted: Sequence[TrialResult]) -> str:
    if not counted:
        return "No trial has been trained, learned and evaluated yet."
    models = len({result.record.model for result in counted})
    seeds = len({result.record.seed for result in counted})
    pairs = [len(item.scores.index) for result in counted for item in result.final]
    few = min(pairs)
    text = f"This rests on {_count(models, 'model')}, {_count(seeds, 'seed')} and {_range(pairs)} test pairs a set, "
    text += f"which alone leave ± {half_width(few):.2f} on a single accuracy of 0.75"
    if seeds == 1:
        return f"{text}, and one seed says nothing about others."
    if seeds < 5:
        return f"{text}, and {seeds} seeds say little about others."
    return f"{text}."


def _beside_paper(analysis: Analysis, known: dict[Scope, Difference]) -> str:
    """In how many categories the sign is the paper's, where it gives both numbers."""
    signs = []
    for scope, item in known.items():
        theirs = [published.number(scope.train_set, scope.sets, kind, "accuracy") for kind in COMPARED]
        if theirs[0] is not None and theirs[1] is not None and theirs[0] != theirs[1]:
            signs.append((theirs[0] - theirs[1]) * item.estimate.value > 0)
    if not signs:
        return ""
    return f"the sign is the paper's ({published.SOURCE}) in {sum(signs)} of {len(signs)} categories"


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
        yield f"{_count(len(unlearned), 'trial')} ({', '.join(kinds)}) did not learn and {_enters(unlearned)} no mean"


def _enters(items: Sequence[object]) -> str:
    return "enters" if len(items) == 1 else "enter"


def _controls(analysis: Analysis, known: dict[Scope, Difference]) -> Iterator[str]:
    """Where length or leaks account for some of a difference, and where nobody looked."""
    unmeasured = []
    for metric, title in SIDE_METRICS:
        gaps = {
            scope: found for scope in known if (found := analysis.side_differences(scope, metric)) is not None
        }
        if known and not gaps:
            unmeasured.append(title)
        for scope, (gap, plain) in gaps.items():
            if abs(gap - plain) >= MOVED:
                where = (
                    _where(scope)
                    if len(analysis.train_sets) == 1
                    else f"{_where(scope)} of {scope.train_set}"
                )
                yield f"{title}, EX−IM is {gap:+.3f} {where} where it was {plain:+.3f}"
    if unmeasured:
        verb = "was" if len(unmeasured) == 1 else "were"
        yield f"{_listed(unmeasured)} accuracy {verb} not measured"


def _languages(analysis: Analysis) -> Iterator[str]:
    """Where French and Spanish, which are the same rewriting twice, answer differently."""
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
    parts = []
    for scope in _asked(analysis):
        for kind in analysis.rewards:
            found = analysis.mean_of_models(scope, kind, "accuracy")
            if found is not None:
                value = found.estimate
                parts.append(
                    f"trained on {scope.train_set}, {reward_title(kind)} ranks {value.value:.3f} "
                    f"[{value.low:.3f}, {value.high:.3f}] of the pairs right {_where(scope)}"
                )
    if not parts:
        why = "no trial has been trained, learned and evaluated"
        if any(result.learned and result.final for result in analysis.results):
            why = "no model has every reward type trained, learned and evaluated on all sets of a category"
        return f"Nothing can be concluded yet: {why}."
    return _sentence("; ".join(parts) + f"; there is nothing to compare, as {_alone(analysis)}")


def _alone(analysis: Analysis) -> str:
    if analysis.both:
        return f"no model and seed has learned with both {EXPLICIT} and {IMPLICIT}"
    return f"the sweep does not hold both {EXPLICIT} and {IMPLICIT}"


def _where(scope: Scope) -> str:
    return scope.category if scope.category == "in-distribution" else f"under {scope.category}"


def _shown(value: Estimate) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _turned(value: Estimate) -> Estimate:
    return Estimate(value=-value.value, low=-value.high, high=-value.low)


def _listed(items: Sequence[str], word: str = "and") -> str:
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {word} {items[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
