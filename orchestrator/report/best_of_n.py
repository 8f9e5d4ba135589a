"""Best of n: which answers each reward model picks among those of a policy, and among the responses of evaluation sets.

The expected quality of the pick is exact over all draws of n of the given answers. A gold curve that falls again while n
grows shows over-optimisation. Shapes: S seeds, Q prompts, C answers to a prompt, N numbers n.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.report.analysis_files import Rows, draw_lines, write_analysis
from orchestrator.report.house_style import GREY, legend
from orchestrator.report.results import ScoredTrials, results_of
from orchestrator.report.statistics import (
    Candidates,
    Estimate,
    Floats,
    Prompt,
    best_of,
    best_of_n_kl,
    by_response,
    candidates,
    holm,
    over_seeds,
    rank_correlation,
    share_within,
    spreads,
)
from orchestrator.report.studies import learned_cells, titled
from orchestrator.report.tables import Table, interval, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs
from orchestrator.store.artifacts import Attempt
from trainers.data.records import Pair
from trainers.data.verifiers import VERIFIERS
from trainers.errors import DataError
from trainers.evaluate.sampling import Answers, read_answers
from trainers.evaluate.scores import PairScores

# Raise when the analysis gives other results for the same scores.
VERSION = 1
NAME = "best_of_n"
PLACE = ("train_set", "evaluation_set", "model")
SCOPE = (
    "RL is out of scope: this says how well a reward chooses among answers that a policy gives, not what a policy that is "
    "trained on it would become."
)
KL_SAID = (
    "KL is log n − (n − 1)/n nats, an upper bound on the divergence of best of n from the policy, close to it where "
    "each single answer is improbable (Beirami et al. 2024, arXiv 2401.01879)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """The input of the analysis: the trials, the answers by their stage's key and name, their judge, and the numbers n.

    The judge is a `verifier`, or `gold` (a trial of the sweep), or else the stage's base model.
    """

    scored: ScoredTrials
    sample: str
    answers: str
    verifier: str
    gold: str
    drawn: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfCurve:
    """The picks of one reward type: by n the quality of the best, [S, Q], and its reward in standard deviations of all.

    `first` are the candidates of the first seed, by n. Quality lies in [0, 1] where it is `bounded`.
    """

    labels: Mapping[str, Any]
    quality: Mapping[int, Floats]
    proxy: Mapping[int, float]
    first: Mapping[int, Sequence[Candidates]]
    sampled: bool
    bounded: bool

    def estimate(self, values_SQ: Floats, floor: int = 0) -> Estimate:
        """Return the mean over prompts and seeds; for differences, give `floor` −1."""
        return over_seeds(values_SQ, floor=floor if self.bounded else None)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                **self.labels,
                "n": n,
                "kl": best_of_n_kl(n) if self.sampled else None,
                "prompts": values_SQ.shape[1],
                "quality": self.estimate(values_SQ),
                "proxy": self.proxy[n],
                "chance": float(np.mean([item.quality.mean() for item in self.first[n]])),
                "best": float(np.mean([best_of(item.quality, item.quality, n) for item in self.first[n]])),
            }
            for n, values_SQ in self.quality.items()
        ]

    def turn(self) -> dict[str, Any]:
        """Return where the gold curve peaks, and its change from there to the largest n.

        `p` is the smallest p of a fall from any smaller n, corrected for their number (Holm) because the peak was selected.
        """
        drawn, means_NS = list(self.quality), np.array([item.mean(axis=1) for item in self.quality.values()])
        peak = drawn[int(np.argmax(np.round(means_NS.mean(axis=1), 9)))]
        last_SQ = self.quality[drawn[-1]]
        changes = {n: self.estimate(last_SQ - self.quality[n], floor=-1) for n in drawn[:-1]}
        corrected = zip(changes.values(), holm([item.p or 0.0 for item in changes.values()]), strict=True)
        p = min((value for item, value in corrected if item.value < 0), default=1.0)
        return {
            **self.labels,
            "peak": peak,
            "kl": best_of_n_kl(peak),
            "at_peak": self.estimate(self.quality[peak]),
            "last": drawn[-1],
            "change": changes.get(peak),
            "p": p,
            "turns": p < 0.05,
            "by_seed": " ".join(str(drawn[at]) for at in np.argmax(np.round(means_NS, 9), axis=0)),
        }


def curve_of(
    seeds: Sequence[Sequence[Candidates]],
    drawn: Sequence[int],
    labels: Mapping[str, Any],
    *,
    sampled: bool = False,
    bounded: bool = True,
) -> BestOfCurve:
    """Return the picks of trainings that differ in their seed, at each n on the prompts with at least n candidates.

    Beside the numbers `drawn`, n is the number of candidates that every prompt has.
    """
    every = min(len(item.reward) for item in seeds[0])
    kept = {
        n: [at for at, item in enumerate(seeds[0]) if len(item.reward) >= n] for n in sorted({*drawn, every})
    }
    kept = {n: places for n, places in kept.items() if places}
    scaled = []
    for found in seeds:
        rewards = np.concatenate([item.reward for item in found])
        scaled.append([(item.reward - rewards.mean()) / (float(rewards.std()) or 1.0) for item in found])
    return BestOfCurve(
        labels=labels,
        quality={
            n: np.array([[best_of(found[q].reward, found[q].quality, n) for q in at] for found in seeds])
            for n, at in kept.items()
        },
        proxy={
            n: float(np.mean([best_of(found[q], found[q], n) for found in scaled for q in at]))
            for n, at in kept.items()
        },
        first={n: [seeds[0][q] for q in at] for n, at in kept.items()},
        sampled=sampled,
        bounded=bounded,
    )


def variance_within(seeds: Sequence[Sequence[Candidates]]) -> dict[str, Any]:
    """Return the share of a reward's variance within prompts, and its rank correlation with the quality of the pick."""
    spread_Q = np.mean([spreads(found) for found in seeds], axis=0)
    picked_Q = np.mean(
        [[best_of(item.reward, item.quality, len(item.reward)) for item in found] for found in seeds], axis=0
    )
    return {
        "candidates": float(np.mean([len(item.reward) for item in seeds[0]])),
        "within": float(np.mean([share_within(found) for found in seeds])),
        "spread_with_pick": rank_correlation(spread_Q, picked_Q),
    }


Rewards = Mapping[Prompt, Mapping[str, float]]


def rewards_of(pairs: Sequence[Pair], scores: PairScores) -> Rewards:
    """Return the reward of each answer that was scored, by its prompt and text."""
    return {
        prompt: {text: reward for text, (reward, _) in said.items()}
        for prompt, said in by_response(pairs, scores).items()
    }


def answered(answers: Sequence[Answers], known: Rewards, quality: Rewards) -> list[Candidates]:
    """Return the answers to each prompt as candidates; equal answers are repeated as often as they were drawn."""
    return [
        Candidates(
            reward=np.array([known[item.prompt][text] for text in item.texts]),
            quality=np.array([quality[item.prompt][text] for text in item.texts]),
        )
        for item in answers
    ]


def complete(answers: Sequence[Answers], everyone: Sequence[Rewards]) -> list[Answers]:
    """Return the prompts whose answers all have rewards from everyone; a length limit may leave some out."""
    return [
        item
        for item in answers
        if all(set(item.texts) <= known.get(item.prompt, {}).keys() for known in everyone)
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the curves, where they turn, and the variance of rewards within prompts."""
    asked, store = stage.parameters, inputs.store
    assert isinstance(asked, BestOfN)
    # A training that failed has no scores; the analysis is of the others.
    there = tuple(trial for trial in asked.scored.trials if trial.whole(store))
    scored = ScoredTrials(trials=there, missing=len(asked.scored.trials) - len(there))
    results, basis = results_of(scored, store)
    pairs = pairs_of(store, asked.sample)
    answers = read_answers(store.read_file("sample", asked.sample, "answers.jsonl"))
    rewards = {
        trial.record.name: rewards_of(pairs, item.scores)
        for trial in results
        for item in trial.final
        if item.dataset == asked.answers
    }
    quality, judge = _quality(stage, inputs, pairs, answers, rewards)
    kept = complete(answers, [*rewards.values(), quality])
    cut = sum(not ended for item in answers for ended in item.ended)
    drawn_answers = sum(len(item.texts) for item in answers)
    said = [
        SCOPE,
        f"{asked.answers.capitalize()}: {len(answers)} prompts, {drawn_answers} answers, {cut} of them cut; {len(kept)} prompts "
        f"whose answers all models could score. Gold: {judge}. {KL_SAID}",
    ]
    curves, variances = list[BestOfCurve](), list[dict[str, Any]]()
    for labels, trials in learned_cells(results):
        trials = [trial for trial in trials if trial.record.name != asked.gold]
        for dataset in [item.dataset for item in trials[0].final] if trials else []:
            here = [next(item for item in trial.final if item.dataset == dataset) for trial in trials]
            place = {**labels, "seeds": len(trials), "evaluation_set": dataset}
            if dataset == asked.answers:
                found = [answered(kept, rewards[trial.record.name], quality) for trial in trials]
            elif texts := pairs_of(store, here[0].dataset_digest):
                found = [candidates(texts, item.scores) for item in here]
            else:
                said.append(f"Not in the store, so left out: the rows of {dataset}.")
                continue
            sampled = dataset == asked.answers
            bounded = not sampled or bool(asked.verifier)
            curves.append(curve_of(found, asked.drawn, place, sampled=sampled, bounded=bounded))
            margin = None if sampled else float(np.mean([item.metrics["abs_margin"] for item in here]))
            variances.append({**place, "abs_margin": margin, **variance_within(found)})
    if not curves or not kept:
        raise DataError(
            "no trial of this sweep has learned and scored all answers to a prompt; look at its report, and at its "
            "--max-response-tokens."
        )
    rows = [row for curve in curves for row in curve.rows()]
    turns = [curve.turn() for curve in curves if curve.sampled]
    write_analysis(
        attempt,
        inputs.name,
        [basis, *dict.fromkeys(said), *_first_to_turn(turns)],
        (_turn_table(turns), _curve_table(rows), _variance_table(variances)),
        results={"name": stage.analysis, "turns": turns, "best_of": rows, "variance": variances},
        figures={NAME: lambda: _draw(rows, bounded=bool(asked.verifier))},
    )


def _quality(
    stage: AnalyseStage,
    inputs: AnalysisInputs,
    pairs: Sequence[Pair],
    answers: Sequence[Answers],
    rewards: Mapping[str, Rewards],
) -> tuple[Rewards, str]:
    """Return the quality of each answer, by the verifier or by the gold reward in standard deviations; and the judge's name."""
    asked: BestOfN = stage.parameters
    if asked.verifier:
        right = VERIFIERS[asked.verifier].right
        judged = {
            item.prompt: {text: float(right(text, item.prompt[-1].content)) for text in item.texts}
            for item in answers
        }
        return judged, f"the verifier {asked.verifier} ({VERIFIERS[asked.verifier].about})"
    if stage.base is not None:
        found, name = rewards_of(pairs, _score(inputs)), stage.base.name
    elif asked.gold in rewards:
        found, name = rewards[asked.gold], asked.gold
    else:
        raise DataError(f"the gold reward model {asked.gold} is not complete; run its trial again (`retry`).")
    every = np.array(
        [found[item.prompt][text] for item in complete(answers, [found]) for text in item.texts] or [0.0]
    )
    centre, spread = float(every.mean()), float(every.std()) or 1.0
    scaled = {
        prompt: {text: (reward - centre) / spread for text, reward in said.items()}
        for prompt, said in found.items()
    }
    return scaled, f"the reward of {name}, in standard deviations over all answers from their mean"


def _score(inputs: AnalysisInputs) -> PairScores:
    """Score the answers with the gold reward model, the analysis's base model."""
    from trainers.evaluate.scoring import score_pairs
    from trainers.models.loading import device, load_model
    from trainers.models.reward_parts import RewardModule
    from trainers.pairs.templates import load_tokenizer
    from trainers.rewards import RewardSpec

    base, pairs = inputs.base, inputs.pairs["answers"]
    assert base is not None
    model = load_model(
        inputs.location,
        tokenizer=load_tokenizer(inputs.location, base.revision, base.trust, base.template),
        output="head",
        precision=base.precision,
        revision=base.revision,
        trust=base.trust,
    )
    module = RewardModule(model.to(device()), RewardSpec(kind="ex_rm"))
    chosen, rejected = score_pairs(module, pairs, reference=None, report=lambda row: None)
    index = np.array([pair.index for pair in pairs])
    return PairScores(chosen=chosen, rejected=rejected, index=index, longer=np.zeros_like(index))


def _first_to_turn(turns: Rows) -> list[str]:
    """Say for each model and training set which reward types' gold curves turn, the earliest first."""
    said = []
    for place in dict.fromkeys((row["model"], row["train_set"]) for row in turns):
        here = [row for row in turns if (row["model"], row["train_set"]) == place]
        turned = sorted((row for row in here if row["turns"]), key=lambda row: row["peak"])
        parts = [
            f"{reward_title(row['reward'])} turns after n = {row['peak']} (KL ≤ {row['kl']:.2f}; "
            f"{interval(row['change'])} from there to n = {row['last']}, p {_p(row['p'])})"
            for row in turned
        ]
        if stays := [reward_title(row["reward"]) for row in here if not row["turns"]]:
            last, kl = here[0]["last"], best_of_n_kl(here[0]["last"])
            parts.append(f"{' and '.join(stays)} not seen to turn up to n = {last} (KL ≤ {kl:.2f})")
        said.append(f"Over-optimisation, {place[0]} trained on {place[1]}: {'; '.join(parts)}.")
    return said


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _turn_table(rows: Rows) -> Table:
    return Table(
        name="turns",
        title="Where the gold curve turns",
        note="Among the answers of the policy: the n at which the gold quality of the pick is highest, its KL bound, and the "
        "change from there to the largest n, 95 % intervals over prompts and seeds. It turns where the quality at the largest n "
        "is below that at a smaller one, p < 0.05 by Student's t, corrected for the number of n (Holm).",
        columns="train_set model reward peak kl at_peak last change p turns by_seed",
        titles={
            "peak": "peak at n",
            "kl": "KL ≤",
            "at_peak": "gold at the peak",
            "last": "largest n",
            "change": "change to it",
            "by_seed": "peak by seed",
        },
        rows=titled(rows),
        forms={"kl": ".2f", "change": "+.3f", "p": ".2g"},
    )


def _curve_table(rows: Rows) -> Table:
    return Table(
        name="best_of",
        title="Best of n by each reward",
        note="Expected quality of the pick over all draws of n of a prompt's candidates, mean over prompts and seeds ± standard "
        "deviation over seeds, 95 % intervals over prompts and seeds. Of the answers of a policy the quality is the gold's; in an "
        "evaluation set a chosen response has quality 1, a rejected one 0. Beside it the pick's own reward, in standard "
        "deviations of all rewards from their mean.",
        columns="train_set evaluation_set model reward n kl prompts quality proxy chance best",
        titles={
            "evaluation_set": "candidates of",
            "reward": "chosen by",
            "kl": "KL ≤",
            "proxy": "its reward",
            "chance": "by chance",
            "best": "best possible",
        },
        rows=titled(rows),
        forms={"kl": ".2f", "proxy": "+.2f"},
    )


def _variance_table(rows: Rows) -> Table:
    return Table(
        name="variance",
        title="Reward margins and reward variance within a prompt",
        note="The share of the variance of all candidates' rewards that lies within prompts, beside the absolute margin of the "
        "report; and the rank correlation, over prompts, of a reward's spread with the quality of its best of all candidates, "
        "– where one of them does not vary.",
        columns="train_set evaluation_set model reward candidates within abs_margin spread_with_pick",
        titles={
            "evaluation_set": "candidates of",
            "candidates": "candidates a prompt",
            "within": "variance within prompts",
            "spread_with_pick": "spread with quality of the pick",
        },
        rows=titled(rows),
        forms={"candidates": ".1f", "spread_with_pick": "+.3f"},
    )


def _draw(rows: Rows, *, bounded: bool) -> Any:
    """Draw a panel per evaluation set and model whose prompts have more than two candidates."""
    place = operator.itemgetter(*PLACE)
    many = {place(row) for row in rows if row["n"] > 2}
    if not many:
        return None
    shown = [row for row in rows if place(row) in many]
    figure, axes = draw_lines(shown, PLACE, "n", "quality", columns=len(many), width=3.4, height=2.8)
    for here, axis in axes.items():
        best = {row["n"]: row["best"] for row in shown if place(row) == here}
        axis.plot(list(best), list(best.values()), ":", color=GREY, label="best possible")
        axis.set(xlabel="n candidates", ylabel="expected quality of the pick", xscale="log")
        if not bounded:
            axis.autoscale(axis="y")
    legend(figure, axes.values())
    return figure
