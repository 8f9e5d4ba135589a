"""The sentences of a report, computed from its numbers: the conclusions, and when to prefer which reward type.

Three conclusions come first: who is ahead where and by how much, how sure that is, and what could be fooling us.
"""

import statistics
from collections.abc import Iterator, Sequence

from orchestrator.report.comparison import (
    CONTROLS,
    LEAK_FREE,
    LENGTH_CONTROLLED,
    MODELS_NEEDED,
    Analysis,
    Mean,
    Scope,
)
from orchestrator.report.results import TrialResult
from orchestrator.report.statistics import Estimate, half_width
from orchestrator.report.tables import interval, number_of, reward_title, sentence, span
from trainers.data.audit import Audit

PREFERENCE = "When to prefer which"
# A control is mentioned if it moves a difference by at least this much.
MOVED = 0.02
# The conclusions name this many reward types beside the baseline; a table has all.
TOLD = 3
Known = dict[tuple[Scope, str], Mean]


def conclusions(analysis: Analysis, audit: Audit | None = None) -> tuple[str, str, str]:
    """Return three sentences: the answer, its support, and its doubts."""
    known = analysis.differences()
    told = _best(known)
    doubts = _doubts(analysis, told, audit)
    if known:
        return _answer(analysis, told, known), _support(analysis, told, known), doubts
    counted = [result for result in analysis.results if result.learned and result.final]
    return _uncompared(analysis), sentence(_size(counted)), doubts


def _best(known: Known) -> Known:
    """Keep the differences from the TOLD reward types that are best on the mean of their categories."""
    behind: dict[str, list[float]] = {}
    for (_, other), item in known.items():
        behind.setdefault(other, []).append(item.value)
    best = sorted(behind, key=lambda other: statistics.fmean(behind[other]))[:TOLD]
    return {place: item for place, item in known.items() if place[1] in best}


def _answer(analysis: Analysis, told: Known, known: Known) -> str:
    """Say where each type is ahead and by how much, and where no difference can be told."""
    over = list(dict.fromkeys(item.over for item in told.values()))
    parts = []
    for other in dict.fromkeys(kind for _, kind in told):
        verdicts = []
        for train_set in analysis.train_sets:
            verdict: dict[str, list[str]] = {}
            for (scope, kind), item in told.items():
                if (scope.train_set, kind) == (train_set, other):
                    alone = f" over {item.over}" if len(over) > 1 else ""
                    place = f"{_under(scope.category)} ({interval(item.estimate)}{alone})"
                    verdict.setdefault(_verdict(analysis, other, item.estimate), []).append(place)
            said = ", ".join(f"{how} {_listed(places)}" for how, places in verdict.items())
            if said:
                verdicts.append(f"trained on {train_set}, {said}")
        parts.append(f"{analysis.title(other)}: {'; '.join(verdicts)}")
    brackets = "95 % intervals in brackets" if len(over) > 1 else f"95 % intervals over {over[0]} in brackets"
    if left := len({kind for _, kind in known} - {kind for _, kind in told}):
        parts.append(f"These are the best {TOLD}; the table of differences has {left} more")
    return f"In accuracy ({brackets}), {'. '.join(parts)}."


def _leader(analysis: Analysis, other: str, found: Estimate) -> str:
    """Return the reward type that a difference has ahead; "" if its interval has 0."""
    if not found.excludes_zero:
        return ""
    return reward_title(analysis.baseline if found.value > 0 else other)


def _verdict(analysis: Analysis, other: str, found: Estimate) -> str:
    both = {reward_title(analysis.baseline), reward_title(other)}
    if leader := _leader(analysis, other, found):
        return f"{leader} is ahead of {(both - {leader}).pop()}"
    return f"no difference of {reward_title(analysis.baseline)} from {reward_title(other)} can be told"


def _support(analysis: Analysis, told: Known, known: Known) -> str:
    """Give win-rates, what correction for comparisons leaves, and the amount of data."""
    parts = []
    for other in dict.fromkeys(kind for _, kind in told):
        won = [analysis.win_rate(scope, other) for scope, kind in told if kind == other]
        cells, ahead, ties, behind = (
            sum(getattr(item, name) for item in won) for name in ("cells", "ahead", "ties", "behind")
        )
        parts.append(
            f"of {number_of(cells, 'cell')} of model, seed and set, {reward_title(analysis.baseline)} is ahead of "
            f"{reward_title(other)} in {ahead}, tied within a point in {ties} and behind in {behind}"
        )
    apart = [place for place, item in known.items() if item.estimate.excludes_zero]
    if apart and len(known) > 1:
        left = sum(analysis.holm[place] < 0.05 for place in apart)
        parts.append(
            f"corrected for {len(known)} comparisons (Holm), {left} of {number_of(len(apart), 'lead')} "
            f"{'stands' if left == 1 else 'stand'} at 5 %"
        )
    cells = (cell for scope, other in known for cell in analysis.cells_of(scope, (analysis.baseline, other)))
    parts.append(_size([result for cell in cells for result in cell]))
    return sentence("; ".join(parts))


def _size(counted: Sequence[TrialResult]) -> str:
    """Give the amount of data, and what it cannot say about other seeds and models."""
    if not counted:
        return "no trial has been trained, learned and evaluated yet"
    models = len({result.record.model for result in counted})
    seeds = len({result.record.seed for result in counted})
    pairs = [len(item.scores.index) for result in counted for item in result.final]
    text = f"this rests on {number_of(models, 'model')}, {number_of(seeds, 'seed')} and {span(pairs, 'test pair')} a set, "
    text += f"which alone leave ± {half_width(min(pairs)):.2f} on a single accuracy of 0.75"
    if seeds == 1:
        text += ", and one seed says nothing about others"
    elif seeds < 5:
        text += f", and {seeds} seeds say little about others"
    if models < MODELS_NEEDED:
        text += f"; with fewer than {MODELS_NEEDED} models nothing can be said of a model that was not tried"
    return text


def _doubts(analysis: Analysis, known: Known, audit: Audit | None) -> str:
    doubts = [
        *_holes(analysis),
        *_chance(analysis),
        *_lengths(known, audit),
        *_controls(analysis, known),
    ]
    if doubts:
        return sentence("What could be fooling us: " + "; ".join(doubts))
    learned = "Every trial is complete and fits its training pairs"
    if not known:
        return f"{learned}."
    return f"{learned}, and neither length nor leaks move what was compared."


def _holes(analysis: Analysis) -> Iterator[str]:
    missing = sum(not result.complete for result in analysis.results)
    if missing:
        yield f"the sweep is incomplete, {missing} of {len(analysis.results)} trials are missing and not imputed"
    if any(
        result.train_left_out or any(item.left_out for item in result.evaluations)
        for result in analysis.results
    ):
        yield "pairs over the length limits are left out"
    unlearned = [result for result in analysis.results if result.trained and not result.learned]
    if unlearned:
        kinds = _listed(sorted({reward_title(result.record.reward) for result in unlearned}))
        enter = "enters" if len(unlearned) == 1 else "enter"
        yield f"{number_of(len(unlearned), 'trial')} ({kinds}) did not learn their training pairs and {enter} no mean"


def _chance(analysis: Analysis) -> Iterator[str]:
    """Say which cells fit their training pairs but are at chance in-distribution."""
    found = [
        f"{model} as {reward_title(kind)} on {scope.train_set} ({mean.value:.3f})"
        for scope in analysis.categories()
        for model in analysis.models
        for kind in analysis.rewards
        if (mean := analysis.mean(scope, kind, "accuracy", [model])) is not None and mean.at_chance
    ]
    if found:
        shown = [*found[:3], f"{len(found) - 3} more"] if len(found) > 4 else found
        verb = "fits its" if len(found) == 1 else "fit their"
        yield f"{_listed(shown)} {verb} training pairs but {'is' if len(found) == 1 else 'are'} at chance on new pairs in-distribution"


def _lengths(known: Known, audit: Audit | None) -> Iterator[str]:
    """Say where length alone ranks pairs right, by the audit; sets with equal numbers share a sentence."""
    compared = {f"{name}/test" for scope, _ in known for name in scope.sets}
    found: dict[str, list[str]] = {}
    for finding in audit.findings if audit else ():
        if finding.what == "length shortcut" and finding.where in compared:
            found.setdefault(finding.number.removesuffix("; Wilson 95 %"), []).append(finding.where)
    for number, where in found.items():
        yield f"length alone ranks pairs of {_listed(where)} right ({number})"


def _controls(analysis: Analysis, known: Known) -> Iterator[str]:
    """Say where length or leaks explain part of a difference, and where that was not measured."""
    for metric, title in CONTROLS.items():
        found = {(scope, other): analysis.control(scope, metric, other=other) for scope, other in known}
        lacking = [
            f"{_under(scope.category)} of {scope.train_set}" for (scope, _), gap in found.items() if not gap
        ]
        if lacking:
            where = "" if len(lacking) == len(known) else f" {_listed(list(dict.fromkeys(lacking)))}"
            yield f"{title} accuracy was not measured{where}"
        for (scope, other), gap in found.items():
            plain = known[scope, other].value
            if gap and abs(gap.value - plain) >= MOVED:
                where = _under(scope.category)
                where += f" of {scope.train_set}" if len(analysis.train_sets) > 1 else ""
                yield f"{title}, {analysis.title(other)} is {gap.value:+.3f} {where} where it was {plain:+.3f}"


def _uncompared(analysis: Analysis) -> str:
    """Say why nothing can be compared, and what to try."""
    trained = [result for result in analysis.results if result.trained]
    learned = [result for result in trained if result.learned]
    scored = any(result.final for result in learned)
    if scored and not analysis.others:
        return f"There is nothing to compare, as the sweep holds one reward type, {reward_title(analysis.baseline)}."
    if scored:
        why = "no model has every reward type trained, learned and evaluated on all sets of a category"
    elif learned:
        why = "no trial that fits its training pairs is evaluated; run the sweep again"
    elif not trained:
        why = "no trial has been trained; run the sweep"
    else:
        said = (result.record.parameters for result in trained)
        tried = dict.fromkeys(f"{number_of(one['epochs'], 'epoch')} at lr {one['lr']}" for one in said)
        why = f"no training fits its own pairs after {_listed([*tried], 'or')}: try a higher --lr, more --epochs, or more pairs"
    return f"Nothing can be concluded yet: {why}."


def preference(analysis: Analysis) -> str:
    """Say when to prefer which reward type, by the differences and their controls."""
    found = analysis.differences()
    if not found:
        return "Nothing can be advised: no model and seed has learned with two reward types and was evaluated with both."
    advice = (_advice(analysis, scope, other, item.estimate) for (scope, other), item in found.items())
    return " ".join(advice) + " Brackets are the 95 % intervals of the conclusion."


def _advice(analysis: Analysis, scope: Scope, other: str, plain: Estimate) -> str:
    """Say which reward type leads, and whether it still leads when length and leaks are controlled for."""
    leader = _leader(analysis, other, plain)
    said = [f"prefer {leader}" if leader else "neither is to be preferred"]
    said[0] += f" ({analysis.title(other)} {interval(plain)})"
    asked = {LENGTH_CONTROLLED: "at matched lengths", LEAK_FREE: "on pairs that training has not seen"}
    for metric, where in asked.items():
        control = analysis.control(scope, metric, other=other)
        if control is None:
            said.append(f"{where} it cannot be told")
        elif leader := _leader(analysis, other, control.estimate):
            said.append(f"{where} {leader} leads ({interval(control.estimate)})")
        else:
            said.append(f"{where} no lead can be told ({interval(control.estimate)})")
    return f"Trained on {scope.train_set}, {_under(scope.category)}: {', '.join(said)}."


def _under(category: str) -> str:
    return category if category == "in-distribution" else f"under {category}"


def _listed(items: Sequence[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
