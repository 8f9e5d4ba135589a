"""How far can a reward be pressed? Best of n among a policy's own answers, by every reward model of a sweep.

A policy answers each prompt many times, once for all reward models. Each of them picks the best of n by its reward; what the
pick is worth says a verifier, or a gold reward model. Where that falls while n grows, the reward is over-optimised, and the
question is whose curve turns first, EX-RM's or IM-RM's. The same stands beside it for the responses of the evaluation sets.
RL itself is out of scope: this says how well a reward chooses, not what a policy trained on it would become.

python sweeps/best_of_n.py --profile laptop                    the tiny world, whose verifier knows the right answers
python sweeps/best_of_n.py --models NAME --policy ID|PATH --prompts FILE --gold ID|PATH --samples 256
python sweeps/best_of_n.py --profile laptop --gold "llama-64 · ex_rm · tiny_world · s0"     a trial of the sweep is gold

The trainings are those of every other sweep with the same flags, and are not computed again.
"""

import functools
import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.cli.main import Grid, main
from orchestrator.cli.options import Options, flag
from orchestrator.cli.session import Session
from orchestrator.report.best_of_n import NAME, VERSION, BestOfN, compute
from orchestrator.report.results import ScoredTrials
from orchestrator.spec import catalog
from orchestrator.spec.datasets import pairs_of
from orchestrator.spec.declaration import trial_record
from orchestrator.spec.selection import Selection, parse_dataset, parse_model
from orchestrator.spec.stages import AnalyseStage, PrepareStage, SampleStage, TrialPlan
from orchestrator.spec.trials import AnswersSpec, Sweep
from orchestrator.store.artifacts import Store
from orchestrator.store.records import CATEGORIES, TrialRecord
from trainers.data.verifiers import VERIFIERS
from trainers.errors import SpecError, nearest
from trainers.specs import BUILTIN, ModelSpec, SamplingSpec

CANDIDATES, SAMPLING = "tiny_world_candidates", SamplingSpec()
PROFILES = {
    "paper": replace(catalog.PAPER, train_sets=(catalog.dataset("ultrafeedback"),)),
    "laptop": replace(
        catalog.ONE_MODEL,
        models=(catalog.MODELS["llama-64"], catalog.MODELS["qwen2-64"]),
        eval_sets=(catalog.dataset("tiny_world"), catalog.dataset(CANDIDATES)),
        seeds=(0, 1, 2),
    ),
}


@dataclass(frozen=True, kw_only=True)
class BestOfNOptions(Options):
    """The flags of a sweep, who answers what, and who judges the answers."""

    policy: Annotated[str | None, flag("[NAME=]ID|PATH", "the first model")] = None
    """The causal language model that answers."""
    prompts: Annotated[str | None, flag("[NAME=]NAME|PATH", "the first evaluation set")] = None
    """The set whose test prompts are answered."""
    max_prompts: Annotated[int | None, flag("N", "all")] = None
    """Answer the first N prompts of a seeded permutation."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingSpec] = SAMPLING
    verifier: Annotated[str | None, flag("NAME", "that of a built-in set of prompts")] = None
    """The program that knows right answers: hamiltonian, arithmetic or tiny_world."""
    gold: Annotated[str | None, flag("TRIAL|[NAME=]ID|PATH")] = None
    """In its place the reward model that is right: the name of a trial of this sweep, or a sequence classifier."""
    best_of: Annotated[tuple[int, ...], flag("N", "1 2 4 … up to --samples")] = ()
    """The numbers of answers among which the best is picked."""


def build(options: BestOfNOptions, chosen: Selection) -> Sweep:
    """Every model with every reward type, each scoring the policy's answers, too. Raises SpecError."""
    answers = _answers(options, chosen)
    trials = [replace(trial, answers=answers) for trial in chosen.trials()]
    names = [trial.name for trial in trials]
    if options.gold and not answers.gold and options.gold not in names:
        raise SpecError(
            f"--gold {options.gold}: no trial of this sweep has that name; {nearest(options.gold, names)}"
        )
    of_words = [(item.name, CANDIDATES) for item in chosen.train_sets if item.name == "tiny_world"]
    return chosen.sweep(trials, [(*pair, "token-level shift") for pair in of_words])


def _answers(options: BestOfNOptions, chosen: Selection) -> AnswersSpec:
    first, sampling = chosen.models[0], options.sampling
    if sampling.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SpecError("--engine vllm: vllm is not installed here; install it, or leave out --engine.")
    if options.max_prompts is not None and options.max_prompts < 1:
        raise SpecError(f"--max-prompts {options.max_prompts}: give at least 1.")
    if wrong := [n for n in options.best_of if not 1 <= n <= sampling.samples]:
        raise SpecError(
            f"--best-of {wrong[0]}: of {sampling.samples} answers drawn the best of 1 to {sampling.samples} can be told; "
            f"give --samples {max(wrong)}, which draws as many, or a smaller number."
        )
    policy = first
    if options.policy:
        given = replace(parse_model(options.policy), trust=first.trust, template=first.template)
        policy = next((model for model in chosen.models if model == given), given)
    prompts = chosen.eval_sets[0]
    if options.prompts:
        given_set = parse_dataset(options.prompts, "--prompts")
        prompts = next((item for item in chosen.eval_sets if item.name == given_set.name), given_set)
    if options.verifier and options.gold:
        raise SpecError("--verifier and --gold both say what an answer is worth; give one of them.")
    if not options.gold and not _verifier(options, prompts.source):
        raise SpecError(
            f"nothing says what an answer to {prompts.name} is worth; give --gold with a reward model or a trial of the sweep, "
            f"or --verifier {' or '.join(VERIFIERS)} where it knows these prompts."
        )
    return AnswersSpec(
        policy=policy,
        prompts=prompts,
        sampling=sampling,
        max_prompts=options.max_prompts,
        gold=_gold(options.gold, policy),
    )


def _gold(word: str | None, policy: ModelSpec) -> ModelSpec | None:
    """Return the reward model that is gold; None where a verifier or a trial of the sweep is."""
    if word is None or " · " in word:
        return None
    gold = replace(parse_model(word), trust=policy.trust)
    config = Path(gold.source) / "config.json"
    if config.is_file() and "ForSequenceClassification" not in config.read_text():
        raise SpecError(
            f"--gold {word}: {config} is of no sequence classifier, so it gives an answer no reward; give the folder of an "
            "EX-RM, or the name of a trial of this sweep."
        )
    return gold


def _verifier(options: BestOfNOptions, source: str) -> str:
    """Return the verifier that is asked, or that of a built-in set; "" where a reward model is asked."""
    if options.verifier and options.verifier not in VERIFIERS:
        raise SpecError(f"--verifier {options.verifier}: {nearest(options.verifier, VERIFIERS)}")
    built_in = {
        f"{BUILTIN}{start}": name for start, name in (("hamiltonian", "hamiltonian"), ("tiny_", "tiny_world"))
    }
    usual = next((name for start, name in built_in.items() if source.startswith(start)), "")
    return options.verifier or ("" if options.gold else usual)


def declare(options: BestOfNOptions, store: Store, plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One analysis of all trials that score the same answers. Raises SpecError where the verifier knows not all prompts."""
    by_sample: dict[SampleStage, list[TrialPlan]] = {}
    for plan in plans:
        by_sample.setdefault(_sample(plan), []).append(plan)
    stages = []
    for sample, own in by_sample.items():
        spec, gold = own[0].spec, own[0].gold
        assert spec.answers is not None
        verifier = _verifier(options, spec.answers.prompts.source)
        if verifier:
            _require_known(verifier, sample, store)
        numbers = options.best_of or tuple(2**power for power in range(sample.sampling.samples.bit_length()))
        asked = BestOfN(
            scored=ScoredTrials(trials=tuple(map(_record, own)), missing=0),
            sample=sample.key,
            answers=sample.answers.name,
            verifier=verifier,
            gold="" if verifier or gold else options.gold or "",
            drawn=tuple(sorted({*numbers, sample.sampling.samples})),
        )
        prepared = gold and PrepareStage(
            base=gold, split=sample.answers, draw=replace(spec.eval_draw, max_pairs=None)
        )
        stages.append(
            AnalyseStage(
                analysis=NAME if len(by_sample) == 1 else f"{NAME} {sample.key[:8]}",
                version=VERSION,
                compute=compute,
                parameters=asked,
                base=gold,
                prepared=(("answers", prepared),) if prepared else (),
                reads=tuple(stage for plan in own for stage in plan.scored),
            )
        )
    return stages


def _sample(plan: TrialPlan) -> SampleStage:
    found = plan.answers[0].prepared.split.sampled
    assert found is not None
    return found


def _record(plan: TrialPlan) -> TrialRecord:
    """Return what the analysis reads of a trial: its last evaluations, and the scores of the answers."""
    last = plan.evaluations[-len(plan.spec.eval_sets) :]
    # No number of the analysis hangs on a category, and what a trial was trained with is in its key.
    record = trial_record(
        replace(plan, evaluations=(*last, *plan.answers)), defaultdict(lambda: CATEGORIES[0]), str
    )
    return replace(record, parameters={})


def _require_known(verifier: str, sample: SampleStage, store: Store) -> None:
    knows = VERIFIERS[verifier].knows
    unknown = [
        text for pair in pairs_of(store, sample.prompts.digest) if not knows(text := pair.prompt[-1].content)
    ]
    if unknown:
        raise SpecError(
            f"--verifier {verifier} does not know {len(unknown)} prompts of {sample.prompts.name}, the first of them "
            f"{unknown[0][:80]!r}; give the verifier of these prompts ({', '.join(VERIFIERS)}), or --gold with a reward model."
        )


@dataclass(frozen=True, kw_only=True)
class BestOfNGrid:
    """A grid whose build and analysis know the flags of the experiment."""

    options: type[BestOfNOptions] = BestOfNOptions

    def run(self, options: BestOfNOptions, session: Session) -> int:
        """Run the command and return its exit code."""
        grid = Grid(
            build=functools.partial(build, options),
            profiles=PROFILES,
            follow_up=functools.partial(declare, options, session.store),
        )
        return grid.run(options, session)


EXPERIMENT = BestOfNGrid()
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
