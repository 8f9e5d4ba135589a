"""Evaluation suites: a prompt with several answers, some of them right, and each suite's own numbers.

SUITES is the table. `read` turns a row of the suite's published columns into a prompt with right and wrong
answers; these are scored as pairs that share the prompt, each answer at least once. `numbers` makes the
suite's numbers of the rewards: "score" is its headline, names with a slash are its parts. They follow the
suites' own code, in which an exact tie is no success; where that code was read, it is named beside the function.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainers.data.files import Fault, Row
from trainers.data.records import Candidates

Numbers = dict[str, float]


class Item(NamedTuple):
    """The answers to one prompt; `group` is the language or the model that wrote them, `pairs` are those to score.

    Pairs are (number among the right, number among the wrong); without, the two lists take turns until every
    answer has been scored.
    """

    name: str
    subset: str
    prompt: Any
    right: Sequence[Any]
    wrong: Sequence[Any]
    group: str = ""
    pairs: Sequence[tuple[int, int]] = ()

    def scored(self) -> Sequence[tuple[int, int]]:
        """Return the pairs that are scored; none where no answer is right, or none is wrong."""
        right, wrong = len(self.right), len(self.wrong)
        turns = range(max(right, wrong) if right and wrong else 0)
        return self.pairs or [(turn % right, turn % wrong) for turn in turns]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """The rewards of the answers to one prompt, and the pairs of them that were scored."""

    name: str
    subset: str
    group: str
    right: NDArray[np.float64]
    wrong: NDArray[np.float64]
    pairs: Sequence[tuple[int, int]]

    @property
    def wins(self) -> float:
        """Whether every right answer has a higher reward than every wrong one."""
        return float(self.right.min() > self.wrong.max())

    @property
    def share_of_pairs(self) -> float:
        """The share of the scored pairs whose right answer has the higher reward."""
        return _mean(self.right[right] > self.wrong[wrong] for right, wrong in self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite on the hub: its splits there, how a row is read, its numbers, and the subsets that it cannot lack."""

    hub: str
    splits: tuple[str, ...]
    read: Callable[[Row], Item]
    numbers: Callable[[Sequence[Scored]], Numbers]
    about: str
    subsets: frozenset[str] = frozenset()
    # A row holds one answer; rows that follow each other with the same value in this column are of one prompt.
    prompt_id: str = ""

    @property
    def title(self) -> str:
        """What the suite calls itself."""
        return self.about.partition(":")[0]

    def item(self, row: Row) -> Item:
        """Return what a row holds. Raises Fault where it has not the suite's columns."""
        try:
            return self.read(row)
        except KeyError as error:
            raise Fault(f"no column {error}, which {self.title} has; found {', '.join(row)}.") from error
        except (TypeError, ValueError) as error:
            raise Fault(f"is no row of {self.title} ({error}).") from error


# Rows → items, by the columns that each suite publishes.


def _rewardbench(row: Row) -> Item:
    return Item(str(row["id"]), row["subset"], row["prompt"], [row["chosen"]], [row["rejected"]])


def _translated(row: Row) -> Item:
    """M-RewardBench calls RewardBench's subsets sources."""
    return _rewardbench({**row, "subset": row["source"]})._replace(group=row["language"])


def _rewardbench2(row: Row) -> Item:
    return Item(str(row["id"]), row["subset"], row["prompt"], _texts(row, "chosen"), _texts(row, "rejected"))


def _rm_bench(row: Row) -> Item:
    right, wrong = _texts(row, "chosen"), _texts(row, "rejected")
    if len(right) != 3 or len(wrong) != 3:
        raise Fault(
            f"{len(right)} chosen and {len(wrong)} rejected answers; each has three, one of each style."
        )
    return Item(str(row["id"]), _named(row, "domain", _RM_DOMAINS), row["prompt"], right, wrong)


def _judgebench(row: Row) -> Item:
    answers = [row["response_A"]], [row["response_B"]]
    sides = {"A>B": answers, "B>A": answers[::-1]}
    if row["label"] not in sides:
        raise Fault(f"the label {row['label']!r} is neither A>B nor B>A.")
    subset = _named(row, "source", _JUDGED)
    return Item(str(row["pair_id"]), subset, row["question"], *sides[row["label"]], row["response_model"])


def _rewardmath(row: Row) -> Item:
    sides: dict[str, list[str]] = {"chosen": [], "rejected": []}
    for number, answer in enumerate(row["answers"]):
        said, kind = answer["eval_solution"], answer["solution_type"]
        if kind not in sides:
            raise Fault(f"its answer {number}: solution_type {kind!r} is neither chosen nor rejected.")
        sides[kind].append("\n".join(said) if isinstance(said, list) else said)
    return Item(
        str(row["problem_id"]), str(row["subject"]), row["problem"], sides["chosen"], sides["rejected"]
    )


def _ppe_human(row: Row) -> Item:
    answers = [row["response_1"]], [row["response_2"]]
    winner = str(row["winner"])
    if winner not in ("model_a", "model_b") and "tie" not in winner:
        raise Fault(f"the winner {winner!r} is none of model_a, model_b, tie.")
    right, wrong = answers if winner == "model_a" else answers[::-1] if winner == "model_b" else ((), ())
    return Item(str(row["question_id"]), "human", row["prompt"], right, wrong, str(row["language"]))


def _ppe_correctness(row: Row) -> Item:
    """Two answers of 32 for each pair that the suite drew, one of them right."""
    marks, right, wrong = row["scores"], [], []
    for pair in row["sampled_conflict_pairs"]:
        if not all(0 <= place < len(marks) for place in pair) or marks[pair[0]] == marks[pair[1]]:
            raise Fault(
                f"the pair {pair} of sampled_conflict_pairs has not one right answer and one wrong one."
            )
        better, worse = sorted(pair, key=lambda place: -marks[place])
        right.append(row[f"response_{better + 1}"])
        wrong.append(row[f"response_{worse + 1}"])
    drawn = tuple((number, number) for number in range(len(right)))
    return Item(str(row["question_id"]), "correctness", row["prompt"], right, wrong, pairs=drawn)


def _texts(row: Row, column: str) -> list[Any]:
    found = row[column]
    if not isinstance(found, list) or not found:
        raise Fault(f"column {column!r} holds no list of answers.")
    return found


def _named(row: Row, column: str, names: Iterable[str]) -> str:
    """Return the name that a value begins with."""
    found = next((name for name in names if str(row[column]).startswith(name)), None)
    if found is None:
        raise Fault(f"{column} {row[column]!r} begins with none of {', '.join(names)}.")
    return found


# Rewards → numbers.


def _mean(values: Iterable[Any]) -> float:
    found = [*values]
    return float(np.mean(found)) if found else math.nan


def _by(items: Iterable[Scored], part: Callable[[Scored], str]) -> dict[str, list[Scored]]:
    found = defaultdict(list)
    for item in items:
        found[part(item)].append(item)
    return dict(sorted(found.items()))


def _accuracies(items: Iterable[Scored], part: str) -> Numbers:
    return {
        f"{part}/{name}": _mean(item.share_of_pairs for item in own)
        for name, own in _by(items, lambda item: getattr(item, part)).items()
        if name
    }


# The weights of RewardBench's subsets in their sections; math-prm, of 447 prompts, counts as much as all the code.
_CODE = ("cpp", "go", "java", "js", "python", "rust")
_SECTIONS: Mapping[str, Mapping[str, int]] = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {"math-prm": 984, **{f"hep-{language}": 164 for language in _CODE}},
}


def _rewardbench_numbers(items: Sequence[Scored]) -> Numbers:
    """The score is the mean of four sections (rewardbench/utils.py, calculate_scores_per_section)."""
    subsets = _accuracies(items, "subset")
    sections = {}
    for section, weights in _SECTIONS.items():
        found = {name: weight for name, weight in weights.items() if f"subset/{name}" in subsets}
        if found:
            values = [subsets[f"subset/{name}"] for name in found]
            sections[f"section/{section}"] = float(np.average(values, weights=[*found.values()]))
    return {"score": _mean(sections.values()), **sections, **subsets}


def _by_language(items: Sequence[Scored]) -> Numbers:
    """M-RewardBench: the means over languages of what RewardBench has in each."""
    each = {name: _rewardbench_numbers(own) for name, own in _by(items, lambda item: item.group).items()}
    names = dict.fromkeys(name for numbers in each.values() for name in numbers)
    means = {
        name: _mean(numbers[name] for numbers in each.values() if name in numbers)
        for name in names
        if not name.startswith("subset/")
    }
    return {**means, **{f"language/{name}": numbers["score"] for name, numbers in each.items()}}


def _best_of(item: Scored) -> float:
    """Return 1 where the first right answer is the best, shared among answers that are equally good."""
    both = np.concatenate([item.right, item.wrong])
    return float(item.right[0] == both.max()) / float((both == both.max()).sum())


def _rewardbench2_numbers(items: Sequence[Scored]) -> Numbers:
    """The score is the mean of the subsets (scripts/run_v2.py, reroll_and_score_dataset)."""
    subsets = {
        f"subset/{name}": _ties(own) if name.lower() == "ties" else _mean(map(_best_of, own))
        for name, own in _by(items, lambda item: item.subset).items()
    }
    return {"score": _mean(subsets.values()), **subsets}


def _ties(items: Sequence[Scored]) -> float:
    """Score prompts with several right answers (`tied:N`) beside their like with one (`ref:N`).

    Both should rank every right answer above every wrong one, and right answers should differ by less than right from
    wrong (rewardbench/utils.py, process_single_model).
    """
    sides = {"ref": dict[str, Scored](), "tied": dict[str, Scored]()}
    for item in items:
        kind, _, number = item.name.partition(":")
        sides["ref" if kind == "ref" else "tied"][number] = item
    ref, tied = sides["ref"], sides["tied"]
    both = [(ref[number], tied[number]) for number in tied if number in ref]
    if not both:
        return math.nan
    apart_ref, apart = (
        np.array([pair[side].right.min() - pair[side].wrong.max() for pair in both]) for side in (0, 1)
    )
    spread = np.array([float(np.ptp(pair[1].right)) for pair in both])
    least = np.minimum(apart_ref, apart)
    with np.errstate(divide="ignore", invalid="ignore"):
        how_far = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    accuracies = [_mean(item.wins for item in side.values()) for side in (tied, ref)]
    return (
        0.3 * sum(accuracies)
        + 0.2 * _mean(apart > spread)
        + 0.2 * _mean(least > spread)
        + 0.01 * float(how_far.mean())
    )


_RM_DOMAINS = ("chat", "code", "math", "safety")


def _rm_bench_numbers(items: Sequence[Scored]) -> Numbers:
    """Styles × styles: in `hard` ones the wrong answer has the richer style (scripts/utils.py, compute_accuracy)."""
    places = {"easy": np.tril_indices(3, -1), "normal": np.diag_indices(3), "hard": np.triu_indices(3, 1)}
    domains = {
        name: np.mean([item.right[:, None] > item.wrong[None, :] for item in own], axis=0)
        for name, own in _by(items, lambda item: item.subset).items()
    }
    styles = {
        f"style/{style}": _mean(matrix[at].mean() for matrix in domains.values())
        for style, at in places.items()
    }
    own = {
        f"subset/{name}": _mean(matrix[at].mean() for at in places.values())
        for name, matrix in domains.items()
    }
    return {"score": _mean(own.values()), **styles, **own}


_JUDGED = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def _of_pairs(items: Sequence[Scored]) -> Numbers:
    """The score is the accuracy over all pairs (JudgeBench, utils/metrics.py; PPE, whose scorers were not at hand)."""
    pairs = [item.right[right] > item.wrong[wrong] for item in items for right, wrong in item.pairs]
    return {"score": _mean(pairs), **_accuracies(items, "subset"), **_accuracies(items, "group")}


def _rewardmath_numbers(items: Sequence[Scored]) -> Numbers:
    """Wrong answers of the same reward rank first (src/evaluation/eval.py, RewardMATHEvaluation)."""
    ranks = [1 + int((item.wrong >= item.right.max()).sum()) for item in items]
    return {"score": _mean(item.wins for item in items), "mrr": _mean(1 / rank for rank in ranks)}


_PPE = {"mmlu_pro": "MMLU-Pro", "math": "MATH", "gpqa": "GPQA", "ifeval": "IFEval", "mbpp_plus": "MBPP-Plus"}

SUITES: Mapping[str, Suite] = {
    "rewardbench": Suite(
        hub="allenai/reward-bench",
        splits=("filtered",),
        read=_rewardbench,
        numbers=_rewardbench_numbers,
        about="RewardBench: pairs in 23 subsets of four sections",
        subsets=frozenset(name for weights in _SECTIONS.values() for name in weights),
    ),
    "rewardbench2": Suite(
        hub="allenai/reward-bench-2",
        splits=("test",),
        read=_rewardbench2,
        numbers=_rewardbench2_numbers,
        about="RewardBench 2: best of four, and Ties",
        subsets=frozenset({"Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"}),
    ),
    "rm_bench": Suite(
        hub="THU-KEG/RM-Bench",
        splits=("train",),
        read=_rm_bench,
        numbers=_rm_bench_numbers,
        about="RM-Bench: three right and three wrong answers in three styles",
        subsets=frozenset(_RM_DOMAINS),
    ),
    "judgebench": Suite(
        hub="ScalerLab/JudgeBench",
        splits=("gpt", "claude"),
        read=_judgebench,
        numbers=_of_pairs,
        about="JudgeBench: pairs of answers, one of them correct",
        subsets=frozenset(_JUDGED),
    ),
    "rewardmath_best_of_10": Suite(
        hub="RewardMATH/RewardMATH_direct",
        splits=("train",),
        read=_rewardmath,
        numbers=_rewardmath_numbers,
        about="RewardMATH: one right solution against nine",
        prompt_id="problem_id",
    ),
    "m_rewardbench": Suite(
        hub="C4AI-Community/multilingual-reward-bench",
        splits=("test",),
        read=_translated,
        numbers=_by_language,
        about="M-RewardBench: RewardBench in 23 languages",
    ),
    "ppe_human": Suite(
        hub="lmarena-ai/PPE-Human-Preference-V1",
        splits=("test",),
        read=_ppe_human,
        numbers=_of_pairs,
        about="PPE: votes of Chatbot Arena, without ties",
    ),
    **{
        f"ppe_{name}": Suite(
            hub=f"lmarena-ai/PPE-{title}-Best-of-K",
            splits=("train",),
            read=_ppe_correctness,
            numbers=_of_pairs,
            about=f"PPE: the drawn pairs of right and wrong answers to {title}",
        )
        for name, title in _PPE.items()
    },
}


def suite_numbers(
    places: Sequence[Candidates], chosen: NDArray[np.float64], rejected: NDArray[np.float64]
) -> Numbers:
    """Return the numbers of the suite that the pairs are of, "items" that count, and those that were "left_out".

    An item counts if all of its answers were scored. Numbers without items are left out, and so is the score where a
    subset has no items.
    """
    found: dict[int, list[tuple[Candidates, float, float]]] = defaultdict(list)
    for place, high, low in zip(places, chosen.tolist(), rejected.tolist(), strict=True):
        found[place.number].append((place, high, low))
    items = []
    for rows in found.values():
        place = rows[0][0]
        right = {row[0].chosen: row[1] for row in rows}
        wrong = {row[0].rejected: row[2] for row in rows}
        if len(right) == place.right and len(wrong) == place.wrong:
            one = Scored(
                name=place.item,
                subset=place.subset,
                group=place.group,
                right=np.array([right[number] for number in range(place.right)]),
                wrong=np.array([wrong[number] for number in range(place.wrong)]),
                pairs=[(row[0].chosen, row[0].rejected) for row in rows],
            )
            items.append(one)
    suite = SUITES[places[0].suite]
    numbers = (
        {name: value for name, value in suite.numbers(items).items() if math.isfinite(value)} if items else {}
    )
    if suite.subsets - {item.subset for item in items}:
        numbers.pop("score", None)
    # Items after the last one with a scored pair cannot be counted.
    counted = max(place.number for place in places) + 1
    return {**numbers, "items": float(len(items)), "left_out": float(counted - len(items))}
