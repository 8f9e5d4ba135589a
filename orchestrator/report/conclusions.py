"""The conclusions of a report, computed from its numbers: who is ahead where and by how much, how sure that is, and what
could be fooling us.
"""

import statistics
from collections.abc import Iterator, Sequence

from orchestrator.report.comparison import CONTROLS, MODELS_NEEDED, Analysis, Mean, Scope
from orchestrator.report.results import TrialResult
from orchestrator.report.tables import interval, number_of, reward_title, sentence

# A control is mentioned if it moves a difference by at least this much.
MOVED = 0.02
# The conclusions name this many reward types beside the baseline; a table has all.
TOLD = 3
Known = dict[tuple[Scope, str], Mean]


def conclusions(analysis: Analysis) -> tuple[str, str, str]:
    """Return three sentences: the answer, its support, and its doubts."""
    known = analysis.differences()
    doubts = _doubts(analysis, _best(known))
    if known:
        return _answer(analysis, known), _support(analysis, known), doubts
    counted = [result for result in analysis.results if result.learned and result.final]
    return _why_nothing(analysis), sentence(_size(counted)), doubts


def _best(known: Known) -> Known:
    """Keep the differences from the TOLD reward types that are best on the mean of their categories."""
    behind: dict[str, list[float]] = {}
    for (_, other), item in known.items():
        behind.setdefault(other, []).append(item.value)
    best = sorted(behind, key=lambda other: statistics.fmean(behind[other]))[:TOLD]
    return {place: item for place, item in known.items() if place[1] in best}


def _answer(analysis: Analysis, known: Known) -> str:
    """Say where each type is ahead and by how much, and where no difference can be told."""
    told = _best(known)
    verdicts: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (scope, other), item in told.items():
        first, second = reward_title(analysis.baseline), reward_title(other)
        how = f"no difference of {first} from {second} can be told"
        if item.estimate.excludes_zero:
            how = f"{first} is ahead of {second}" if item.value > 0 else f"{second} is ahead of {first}"
        of_type = verdicts.setdefault((other, scope.train_set), {})
        of_type.setdefault(how, []).append(f"{_under(scope.category)} ({interval(item.estimate)})")
    parts = [
        f"{analysis.title(other)}: trained on {train_set}, "
        + ", ".join(f"{how} {_listed(places)}" for how, places in of_type.items())
        for (other, train_set), of_type in verdicts.items()
    ]
    if left := len({kind for _, kind in known} - {kind for _, kind in told}):
        parts.append(f"These are the best {TOLD}; the table of differences has {left} more")
    over = " or ".join(dict.fromkeys(item.over for item in told.values()))
    return f"In accuracy (95 % intervals over {over} in brackets), {'. '.join(parts)}."


def _support(analysis: Analysis, known: Known) -> str:
    """Say what correction for comparisons leaves, and give the amount of data."""
    parts = []
    apart = [place for place, item in known.items() if item.estimate.excludes_zero]
    if apart and len(known) > 1:
        left = sum(analysis.holm[place] < 0.05 for place in apart)
        parts.append(
            f"corrected for {len(known)} comparisons (Holm), {left} of {number_of(len(apart), 'lead')} remain at 5 %"
        )
    compared = [
        item
        for scope, other in known
        for cell in analysis.cells_of(scope, (analysis.baseline, other))
        for item in cell
    ]
    return sentence("; ".join([*parts, _size(compared)]))


def _size(counted: Sequence[TrialResult]) -> str:
    """Give the amount of data, and what it cannot say about other seeds and models."""
    if not counted:
        return "no trial has been trained, learned and evaluated yet"
    models = len({result.record.model for result in counted})
    seeds = len({result.record.seed for result in counted})
    pairs = sorted({len(item.scores.index) for result in counted for item in result.final})
    span = " to ".join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))
    text = (
        f"this rests on {number_of(models, 'model')}, {number_of(seeds, 'seed')} and {span} test pairs a set"
    )
    if seeds == 1:
        text += "; one seed says nothing about others"
    if models < MODELS_NEEDED:
        text += f"; with fewer than {MODELS_NEEDED} models nothing can be said of a model that was not tried"
    return text


def _doubts(analysis: Analysis, known: Known) -> str:
    if doubts := [*_holes(analysis), *_controls(analysis, known)]:
        return sentence("What could be fooling us: " + "; ".join(doubts))
    learned = "Every trial is complete and fits its training pairs"
    return f"{learned}, and neither length nor leaks move what was compared." if known else f"{learned}."


def _holes(analysis: Analysis) -> Iterator[str]:
    """Say which trials are missing or did not learn, and whether pairs are left out."""
    results = analysis.results
    if missing := sum(not result.complete for result in results):
        yield f"the sweep is incomplete, {missing} of {len(results)} trials are missing and not imputed"
    if any(item.train_left_out or any(one.left_out for one in item.evaluations) for item in results):
        yield "pairs over the length limits are left out"
    if unlearned := [result for result in results if result.trained and not result.learned]:
        kinds = _listed(sorted({reward_title(result.record.reward) for result in unlearned}))
        yield f"{number_of(len(unlearned), 'trial')} ({kinds}) did not learn the training pairs, so no mean has them"


def _controls(analysis: Analysis, known: Known) -> Iterator[str]:
    """Say where length or leaks explain part of a difference, and whether that was measured of all."""
    for metric, title in CONTROLS.items():
        found = {(scope, other): analysis.control(scope, metric, other=other) for scope, other in known}
        if not all(found.values()):
            yield f"{title} accuracy was not measured {'everywhere' if any(found.values()) else ''}".rstrip()
        for (scope, other), gap in found.items():
            plain = known[scope, other].value
            if gap and abs(gap.value - plain) >= MOVED:
                where = f"{_under(scope.category)} of {scope.train_set}"
                yield f"{title}, {analysis.title(other)} is {gap.value:+.3f} {where} where it was {plain:+.3f}"


def _why_nothing(analysis: Analysis) -> str:
    """Say why nothing can be compared, and what to try."""
    trained = [result for result in analysis.results if result.trained]
    if not trained:
        why = "no trial has been trained; run the sweep"
    elif not any(result.learned for result in trained):
        why = "no training fits its own pairs: try a higher --lr, more --epochs, or more pairs"
    elif not analysis.others:
        return f"There is nothing to compare, as the sweep holds one reward type, {reward_title(analysis.baseline)}."
    else:
        why = "no model has every reward type trained, learned and evaluated on all sets of a category"
    return f"Nothing can be concluded yet: {why}."


def _under(category: str) -> str:
    return category if category == "in-distribution" else f"under {category}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
