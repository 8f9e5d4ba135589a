"""Best of n: each reward model picks among a policy's answers, and among the responses of evaluation sets.

The expected quality of the pick is exact over all draws of n of a prompt's candidates. A gold curve that falls while n
grows shows over-optimisation. Shapes: S seeds, Q prompts, C answers to a prompt, N numbers n.
"""

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import comb, log
from typing import Any

import numpy as np

from orchestrator.report.house_style import GREY, draw_lines, legend
from orchestrator.report.results import ScoredTrials, results_of
from orchestrator.report.statistics import Estimate, Floats, holm, over_seeds, rank_correlation
from orchestrator.report.studies import Rows, learned_cells, titled, write_analysis
from orchestrator.report.tables import Table, interval, reward_title
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.declaration import trial_record
from orchestrator.spec.stages import AnalyseStage, AnalysisInputs, PrepareStage, SampleStage, TrialPlan
from orchestrator.store.artifacts import Attempt, Store
from orchestrator.store.records import CATEGORIES, TrialRecord
from trainers.data.records import Message, Pair
from trainers.data.verifiers import USUAL, VERIFIERS
from trainers.errors import DataError, SpecError, nearest
from trainers.evaluate.sampling import Answers, read_answers
from trainers.evaluate.scores import PairScores
from trainers.specs import BUILTIN, DatasetSpec

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
    """The inputs: trials, the key and name of the sample stage's answers, the judge, and the numbers n.

    The judge is a `verifier`, or the trial that `gold` names, or else the stage's base model.
    """

    scored: ScoredTrials
    sample: str
    answers: str
    verifier: str
    gold: str
    drawn: tuple[int, ...]


def verifier_of(chosen: str | None, gold: str | None, prompts: DatasetSpec) -> str:
    """Return the chosen verifier, or that of a built-in set; "" if a reward model is gold. Raises SpecError."""
    if chosen and gold:
        raise SpecError("--verifier and --gold both say what an answer is worth; give one of them.")
    if chosen and chosen not in VERIFIERS:
        raise SpecError(f"--verifier {chosen}: {nearest(chosen, VERIFIERS)}")
    usual = [name for start, name in USUAL.items() if prompts.source.startswith(f"{BUILTIN}{start}")]
    if not (chosen or gold or usual):
        raise SpecError(
            f"nothing says what an answer to {prompts.name} is worth; give --gold with a reward model or a trial of the sweep, "
            f"or --verifier {' or '.join(VERIFIERS)} if it knows these prompts."
        )
    return chosen or ("" if gold else "".join(usual))


def stages_of(
    plans: Sequence[TrialPlan], store: Store, *, verifier: str, gold: str, numbers: Sequence[int]
) -> list[AnalyseStage]:
    """Return one analysis for all trials that score the same answers. Raises SpecError for prompts the verifier does not know.

    `gold` names a trial; it is not read if there is a verifier or the plans have a gold model.
    """
    by_sample: dict[SampleStage, list[TrialPlan]] = {}
    for plan in plans:
        sampled = plan.answers[0].prepared.split.sampled
        assert sampled is not None
        by_sample.setdefault(sampled, []).append(plan)
    stages = []
    for sample, own in by_sample.items():
        model, samples = own[0].gold, sample.sampling.samples
        if verifier:
            _require_known(verifier, sample, store)
        asked = BestOfN(
            scored=ScoredTrials(trials=tuple(map(_record, own)), missing=0),
            sample=sample.key,
            answers=sample.answers.name,
            verifier=verifier,
            gold="" if verifier or model else gold,
            drawn=tuple(sorted({*(numbers or (2**at for at in range(samples.bit_length()))), samples})),
        )
        draw = replace(own[0].spec.eval_draw, max_pairs=None)
        prepared = model and PrepareStage(base=model, split=sample.answers, draw=draw)
        stages.append(
            AnalyseStage(
                analysis=NAME if len(by_sample) == 1 else f"{NAME} {sample.key[:8]}",
                version=VERSION,
                compute=compute,
                parameters=asked,
                base=model,
                prepared=(("answers", prepared),) if prepared else (),
                reads=tuple(stage for plan in own for stage in plan.scored),
            )
        )
    return stages


def _record(plan: TrialPlan) -> TrialRecord:
    """Return what the analysis reads of a trial: its last evaluations, and the scores of the answers."""
    last = plan.evaluations[-len(plan.spec.eval_sets) :]
    # No result depends on a category, and the training's settings are in its key.
    record = trial_record(
        replace(plan, evaluations=(*last, *plan.answers)), defaultdict(lambda: CATEGORIES[0]), str
    )
    return replace(record, parameters={})


def _require_known(verifier: str, sample: SampleStage, store: Store) -> None:
    prompts = [pair.prompt[-1].content for pair in pairs_of(store, sample.prompts.digest)]
    if unknown := [text for text in prompts if not VERIFIERS[verifier].knows(text)]:
        raise SpecError(
            f"--verifier {verifier} does not know {len(unknown)} prompts of {sample.prompts.name}, the first of them "
            f"{unknown[0][:80]!r}; give the verifier of these prompts ({', '.join(VERIFIERS)}), or --gold with a reward model."
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRewards:
    """The distinct responses to one prompt; `quality` is the share of a response's pairs in which it is chosen."""

    reward: Floats
    quality: Floats


Prompt = tuple[Message, ...]


def by_response(pairs: Sequence[Pair], scores: PairScores) -> dict[Prompt, dict[str, tuple[float, float]]]:
    """Return by prompt and response its mean reward and how often it is chosen; `pairs` are the rows of the split."""
    prompts: dict[Prompt, dict[str, list[tuple[float, float]]]] = {}
    for row, chosen, rejected in zip(scores.index.tolist(), scores.chosen, scores.rejected, strict=True):
        pair = pairs[row]
        said = prompts.setdefault(pair.prompt, {})
        said.setdefault(pair.chosen, []).append((chosen, 1.0))
        said.setdefault(pair.rejected, []).append((rejected, 0.0))
    # One text is scored once per pair, equal up to rounding.
    return {
        prompt: {text: tuple(np.mean(found, axis=0).tolist()) for text, found in said.items()}
        for prompt, said in prompts.items()
    }


def candidates(pairs: Sequence[Pair], scores: PairScores) -> list[PromptRewards]:
    """Return the candidates of each prompt, in the order of the scores; `pairs` are the rows of the split."""
    both = [np.array([*said.values()]).T for said in by_response(pairs, scores).values()]
    return [PromptRewards(reward=reward_C, quality=quality_C) for reward_C, quality_C in both]


def best_of(reward_C: Floats, quality_C: Floats, n: int) -> float:
    """Return the expected quality of the best by reward of n candidates drawn without replacement, 1 ≤ n ≤ C.

    Of C(C, n) draws, C(m + t, n) − C(m, n) have their best among t candidates of equal reward above m others; each of
    the t is equally likely to be picked. The estimator of Nakano et al. (2021) and Gao et al. (2023, arXiv 2210.10760), with ties.
    """
    _, group_C, count_G = np.unique(reward_C, return_inverse=True, return_counts=True)
    share_G = np.diff(_share_among(len(reward_C), n)[np.cumsum([0, *count_G])])
    return float(share_G @ (np.bincount(group_C, quality_C) / count_G))


@cache
def _share_among(candidates: int, n: int) -> Floats:
    """Return by m = 0, 1, … the share of draws of n candidates that lie entirely among m of them."""
    return np.array([comb(m, n) / comb(candidates, n) for m in range(candidates + 1)])


def best_of_n_kl(n: int) -> float:
    """Return log n − (n − 1)/n in nats, an upper bound on the KL divergence of best of n from the policy.

    The two differ if answers repeat or their rewards tie (Beirami et al. 2024, arXiv 2401.01879).
    """
    return log(n) - (n - 1) / n


def share_within(found: Sequence[PromptRewards]) -> float:
    """Return the share of the variance of all candidates' rewards that lies within prompts; 0 if rewards do not vary."""
    everything = np.concatenate([item.reward for item in found])
    total = float(everything.var() * len(everything))
    within = sum(float(item.reward.var() * len(item.reward)) for item in found)
    return within / total if total > 1e-24 * max(1.0, float(everything.mean()) ** 2) else 0.0


def spreads(found: Sequence[PromptRewards]) -> Floats:
    """Return for each prompt the standard deviation of its candidates' rewards, divided by that of all candidates."""
    spread = float(np.concatenate([item.reward for item in found]).std())
    return np.array([item.reward.std() / spread if spread > 0 else 0.0 for item in found])


@dataclass(frozen=True, kw_only=True)
class BestOfCurve:
    """Best of n by one reward type. `seeds` holds the candidates of each prompt, by the seed of the training.

    n is each of the numbers `drawn` and the number of candidates that every prompt has. Quality lies in [0, 1] if `bounded`.
    """

    labels: Mapping[str, Any]
    seeds: Sequence[Sequence[PromptRewards]]
    drawn: Sequence[int]
    sampled: bool = False
    bounded: bool = True

    def _with(self, n: int) -> list[list[PromptRewards]]:
        """Return the prompts that have n candidates or more."""
        return [[item for item in found if len(item.reward) >= n] for found in self.seeds]

    @cached_property
    def quality(self) -> dict[int, Floats]:
        """The expected quality of the pick, [S, Q], by n."""
        numbers = sorted({*self.drawn, min(len(item.reward) for item in self.seeds[0])})
        return {
            n: np.array(
                [[best_of(item.reward, item.quality, n) for item in found] for found in self._with(n)]
            )
            for n in numbers
            if self._with(n)[0]
        }

    def estimate(self, values_SQ: Floats, floor: int = 0) -> Estimate:
        """Return the mean over prompts and seeds; `floor` is −1 for differences."""
        return over_seeds(values_SQ, floor=floor if self.bounded else None)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each n."""
        rewards = [np.concatenate([item.reward for item in found]) for found in self.seeds]
        rows = []
        for n, values_SQ in self.quality.items():
            kept = self._with(n)
            picked_S = [np.mean([best_of(item.reward, item.reward, n) for item in found]) for found in kept]
            scaled_S = [
                (mean - all_C.mean()) / (all_C.std() or 1.0)
                for mean, all_C in zip(picked_S, rewards, strict=True)
            ]
            row = {
                "n": n,
                "kl": best_of_n_kl(n) if self.sampled else None,
                "prompts": values_SQ.shape[1],
                "quality": self.estimate(values_SQ),
                "proxy": float(np.mean(scaled_S)),
                "chance": float(np.mean([item.quality.mean() for item in kept[0]])),
                "best": float(np.mean([best_of(item.quality, item.quality, n) for item in kept[0]])),
            }
            rows.append({**self.labels, **row})
        return rows

    def turn(self) -> dict[str, Any]:
        """Return where the gold curve peaks, and its change from there to the largest n.

        `p` is the smallest of the falls from any smaller n, corrected for the number of these tests (Holm), and none is
        below that of a sign test, since prompts that all fall by as much have no variance.
        """
        drawn, means_NS = list(self.quality), np.array([item.mean(axis=1) for item in self.quality.values()])
        peak = drawn[int(np.argmax(np.round(means_NS.mean(axis=1), 9)))]
        last_SQ = self.quality[drawn[-1]]
        changes = {n: self.estimate(last_SQ - self.quality[n], floor=-1) for n in drawn[:-1]}
        least = 0.5 ** (last_SQ.shape[1] - 1)
        found = holm([max(item.p or 0.0, least) for item in changes.values()])
        corrected = zip(changes.values(), found, strict=True)
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

    def variance(self) -> dict[str, Any]:
        """Return the share of a reward's variance within prompts, and whether it picks well where it spreads them."""
        spread_Q = np.mean([spreads(found) for found in self.seeds], axis=0)
        picked_SQ = [
            [best_of(item.reward, item.quality, len(item.reward)) for item in found] for found in self.seeds
        ]
        return {
            **self.labels,
            "candidates": float(np.mean([len(item.reward) for item in self.seeds[0]])),
            "within": float(np.mean([share_within(found) for found in self.seeds])),
            "spread_with_pick": rank_correlation(spread_Q, np.mean(picked_SQ, axis=0)),
        }


# By prompt and answer.
Rewards = Mapping[tuple[Prompt, str], float]


def _rewards(pairs: Sequence[Pair], scores: PairScores) -> Rewards:
    """Return the reward of each answer that was scored."""
    found = by_response(pairs, scores)
    return {(prompt, text): reward for prompt, said in found.items() for text, (reward, _) in said.items()}


def _of(item: Answers, known: Rewards) -> Floats:
    return np.array([known[item.prompt, text] for text in item.texts])


def _complete(answers: Sequence[Answers], everyone: Sequence[Rewards]) -> list[Answers]:
    """Return the prompts of which everyone has rewarded all answers; a length limit may leave some out."""
    return [
        item
        for item in answers
        if all((item.prompt, text) in known for known in everyone for text in item.texts)
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Write the curves, where they turn, and the variance of rewards within prompts."""
    asked, store = stage.parameters, inputs.store
    assert isinstance(asked, BestOfN)
    # A training that failed for good has no scores.
    there = tuple(trial for trial in asked.scored.trials if trial.whole(store))
    results, basis = results_of(
        ScoredTrials(trials=there, missing=len(asked.scored.trials) - len(there)), store
    )
    pairs = pairs_of(store, asked.sample)
    answers = read_answers(store.read_file("sample", asked.sample, "answers.jsonl"))
    rewards = {
        trial.record.name: _rewards(pairs, item.scores)
        for trial in results
        for item in trial.final
        if item.dataset == asked.answers
    }
    quality, judge = _quality(stage, inputs, pairs, answers, rewards)
    kept = _complete(answers, [*rewards.values(), quality])
    cut = sum(not ended for item in answers for ended in item.ended)
    drawn_answers = sum(len(item.texts) for item in answers)
    said = [
        SCOPE,
        f"{asked.answers.capitalize()}: {len(answers)} prompts, {drawn_answers} answers, {cut} of them cut; {len(kept)} prompts "
        f"whose answers all models could score. Gold: {judge}. {KL_SAID}",
    ]
    curves, margins = list[BestOfCurve](), list[float | None]()
    for labels, every in learned_cells(results):
        trials = [trial for trial in every if trial.record.name != asked.gold]
        for dataset in [item.dataset for item in trials[0].final] if trials else []:
            here = [next(item for item in trial.final if item.dataset == dataset) for trial in trials]
            sampled = dataset == asked.answers
            if sampled:
                # An answer that was drawn twice counts twice.
                everyone = [rewards[trial.record.name] for trial in trials]
                seeds = [
                    [PromptRewards(reward=_of(item, known), quality=_of(item, quality)) for item in kept]
                    for known in everyone
                ]
            elif texts := pairs_of(store, here[0].dataset_digest):
                seeds = [candidates(texts, item.scores) for item in here]
            else:
                said.append(f"Not in the store, so left out: the rows of {dataset}.")
                continue
            curve = BestOfCurve(
                labels={**labels, "seeds": len(trials), "evaluation_set": dataset},
                seeds=seeds,
                drawn=asked.drawn,
                sampled=sampled,
                bounded=not sampled or bool(asked.verifier),
            )
            curves.append(curve)
            margins.append(None if sampled else float(np.mean([item.metrics["abs_margin"] for item in here])))
    if not curves or not kept:
        raise DataError(
            "no trial of this sweep has learned and scored all answers to a prompt; look at its report, and at its "
            "--max-response-tokens."
        )
    rows = [row for curve in curves for row in curve.rows()]
    turns = [curve.turn() for curve in curves if curve.sampled]
    variances = [
        {**curve.variance(), "abs_margin": margin} for curve, margin in zip(curves, margins, strict=True)
    ]
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
    """Return each answer's quality, by the verifier or by the gold reward in standard deviations; and the judge's name."""
    asked: BestOfN = stage.parameters
    if asked.verifier:
        judge = VERIFIERS[asked.verifier]
        judged = {
            (item.prompt, text): float(judge.right(text, item.prompt[-1].content))
            for item in answers
            for text in dict.fromkeys(item.texts)
        }
        return judged, f"the verifier {asked.verifier} ({judge.about})"
    if stage.base is not None:
        found, name = _rewards(pairs, _score(inputs)), stage.base.name
    elif asked.gold in rewards:
        found, name = rewards[asked.gold], asked.gold
    else:
        raise DataError(f"the gold reward model {asked.gold} is not complete; run its trial again (`retry`).")
    every = np.concatenate([np.zeros(0), *(_of(item, found) for item in _complete(answers, [found]))])
    centre, spread = (float(every.mean()), float(every.std()) or 1.0) if len(every) else (0.0, 1.0)
    scaled = {place: (reward - centre) / spread for place, reward in found.items()}
    return scaled, f"the reward of {name}, in standard deviations over all answers from their mean"


def _score(inputs: AnalysisInputs) -> PairScores:
    """Score the answers with the gold reward model, the analysis's base model."""
    from trainers.evaluate.scoring import score_pairs
    from trainers.models.reward_parts import RewardModule
    from trainers.rewards import RewardSpec

    base, pairs = inputs.base, inputs.pairs["answers"]
    assert base is not None
    module = RewardModule(base.weights(inputs.location).model("head"), RewardSpec(kind="ex_rm"))
    chosen, rejected = score_pairs(module, pairs, reference=None, report=lambda row: None)
    index = np.array([pair.index for pair in pairs])
    return PairScores(chosen=chosen, rejected=rejected, index=index, longer=np.zeros_like(index))


def _first_to_turn(turns: Rows) -> list[str]:
    """Say which reward types' gold curves turn, the first to turn first, for each model and training set."""
    said = []
    for place in dict.fromkeys((row["model"], row["train_set"]) for row in turns):
        here = [row for row in turns if (row["model"], row["train_set"]) == place]
        turned = sorted((row for row in here if row["turns"]), key=lambda row: row["peak"])
        parts = [
            f"{reward_title(row['reward'])} turns after n = {row['peak']} (KL ≤ {row['kl']:.2f}; "
            f"{interval(row['change'])} from there to n = {row['last']}, "
            f"p {'< 0.001' if row['p'] < 0.001 else '= ' + format(row['p'], '.3f')})"
            for row in turned
        ]
        if stays := [reward_title(row["reward"]) for row in here if not row["turns"]]:
            last, kl = here[0]["last"], best_of_n_kl(here[0]["last"])
            parts.append(f"{' and '.join(stays)} not seen to turn up to n = {last} (KL ≤ {kl:.2f})")
        said.append(f"Over-optimisation, {place[0]} trained on {place[1]}: {'; '.join(parts)}.")
    return said


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
        "deviation over seeds, 95 % intervals over prompts and seeds. The gold judges the answers of a policy; in an evaluation "
        "set a chosen response has quality 1, a rejected one 0. Beside it the pick's own reward, in standard deviations of all "
        "rewards from their mean.",
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
    """Draw a panel for each evaluation set and model with more than two candidates a prompt."""
    place = operator.itemgetter(*PLACE)
    many = {place(row) for row in rows if row["n"] > 2}
    if not many:
        return None
    shown = [row for row in rows if place(row) in many]
    figure, axes = draw_lines(shown, PLACE, "n", "quality")
    for here, axis in axes.items():
        best = {row["n"]: row["best"] for row in shown if place(row) == here}
        axis.plot(list(best), list(best.values()), ":", color=GREY, label="best possible")
        axis.set(xlabel="n candidates", ylabel="expected quality of the pick", xscale="log")
        if not bounded:
            axis.autoscale(axis="y")
    legend(figure, axes.values())
    return figure
