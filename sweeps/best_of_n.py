"""Which reward is over-optimised first, EX-RM or IM-RM? Best of n among a policy's answers, by every reward model of a sweep.

A policy answers each prompt many times. Every reward model picks the best of n answers by its reward, and a verifier or a
gold reward model judges the pick. If its quality falls while n grows, the reward is over-optimised. The same is computed
for the responses of the evaluation sets. RL is out of scope: see docs/best_of_n.md.

python sweeps/best_of_n.py --profile laptop                    the tiny world, whose verifier knows the right answers
python sweeps/best_of_n.py --models NAME --policy ID|PATH --prompts FILE --gold ID|PATH --samples 256
python sweeps/best_of_n.py --profile laptop --gold "llama-64 · ex_rm · tiny_world · s0"     a trial of the sweep is gold
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import tyro

from orchestrator.cli.main import Grid, main
from orchestrator.cli.options import Options, flag
from orchestrator.cli.session import Session
from orchestrator.report.best_of_n import stages_of, verifier_of
from orchestrator.spec import catalog
from orchestrator.spec.selection import Selection, parse_dataset, parse_gold, parse_model
from orchestrator.spec.stages import AnalyseStage, TrialPlan
from orchestrator.spec.trials import AnswersSpec, Sweep
from trainers.errors import SpecError, nearest
from trainers.specs import SamplingSpec

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
    """The flags of a sweep, of its policy, and of the judge of the answers."""

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
    """The reward model that judges instead: the name of a trial of this sweep, or a sequence classifier."""
    best_of: Annotated[tuple[int, ...], flag("N", "1 2 4 … up to --samples")] = ()
    """The numbers of answers among which the best is picked."""


def build(options: BestOfNOptions, chosen: Selection) -> Sweep:
    """The grid, in which every trial also scores the policy's answers. Raises SpecError."""
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
    if sampling.engine == "vllm" and sampling.temperature > 2:
        raise SpecError(f"--temperature {sampling.temperature}: vLLM takes 2 at most; leave out --engine.")
    if sampling.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SpecError("--engine vllm: vllm is not installed here; install it, or leave out --engine.")
    if options.max_prompts is not None and options.max_prompts < 1:
        raise SpecError(f"--max-prompts {options.max_prompts}: give at least 1.")
    if wrong := [n for n in options.best_of if not 1 <= n <= sampling.samples]:
        raise SpecError(
            f"--best-of {wrong[0]}: choose among 1 to {sampling.samples} answers, or give --samples {max(wrong)}."
        )
    policy, prompts = first, chosen.eval_sets[0]
    if options.policy:
        policy = replace(parse_model(options.policy, "--policy"), trust=first.trust, template=first.template)
    if options.prompts:
        given_set = parse_dataset(options.prompts, "--prompts")
        place = given_set.name, given_set.source
        prompts = next((item for item in chosen.eval_sets if (item.name, item.source) == place), given_set)
    verifier_of(options.verifier, options.gold, prompts)
    gold = None
    if options.gold and " · " not in options.gold:
        gold = replace(parse_gold(options.gold), trust=policy.trust)
    most = options.max_prompts
    return AnswersSpec(policy=policy, prompts=prompts, sampling=sampling, max_prompts=most, gold=gold)


@dataclass(frozen=True, kw_only=True)
class BestOfNGrid:
    """A grid whose `build`, and whose analysis of all trials that score the same answers, take the flags."""

    options: type[BestOfNOptions] = BestOfNOptions

    def run(self, options: BestOfNOptions, session: Session) -> int:
        """Run the command and return its exit code."""

        def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
            answers, gold = plans[0].spec.answers, options.gold or ""
            verifier = verifier_of(options.verifier, gold, answers.prompts) if answers else ""
            return stages_of(plans, session.store, verifier=verifier, gold=gold, numbers=options.best_of)

        return Grid(build=partial(build, options), profiles=PROFILES, follow_up=declare).run(options, session)


EXPERIMENT = BestOfNGrid()
if __name__ == "__main__":
    main(EXPERIMENT, __file__, __doc__)
