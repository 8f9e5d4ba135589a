"""The paper's verification against generation (paper §2, §4): who can tell a Hamiltonian cycle can yet write none.

Reward models are trained to tell a graph's cycle from another order of its vertices. An IM-RM is a language model, so
it is asked for a cycle as well: one answer a prompt at temperature 1 as in the paper, the likeliest answer, and the best
of k by its own reward. Beside each stands what an order of the vertices drawn at random would be worth.

python sweeps/hamiltonian.py --profile laptop                  5 vertices, a built-in model
python sweeps/hamiltonian.py --profile paper                   10 vertices, Pythia 1B; its separators are no tokens of their own
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cli.main import Grid, main
from orchestrator.report.tables import Table, write_summary
from orchestrator.spec import catalog
from orchestrator.spec.catalog import Profile
from orchestrator.spec.stages import (
    AnalyseStage,
    AnalysisInputs,
    FollowUp,
    PrepareStage,
    TrainStage,
    TrialPlan,
)
from orchestrator.store.artifacts import Attempt
from sweeps.full_grid import full_grid
from trainers.specs import BUILTIN, DatasetSpec, ModelSpec, OptimSpec

# Raise when the generation check computes something else from the same weights.
VERSION = 1
SAMPLES, SEED = 8, 0
GENERATED = f"{BUILTIN}hamiltonian"


def _recipe(model: ModelSpec, train_set: DatasetSpec) -> OptimSpec:
    """The paper's (paper §1): 15 epochs; a tiny model takes more, at a rate of its own."""
    if model.source.startswith(BUILTIN):
        return OptimSpec(lr=1e-3, epochs=40, effective_batch=32)
    return OptimSpec(epochs=15)


PAPER = Profile(
    name="paper",
    models=(ModelSpec(name="pythia-1b", source="EleutherAI/pythia-1b", parameters=1_011_781_632),),
    train_sets=(catalog.dataset("hamiltonian_paper"),),
    eval_sets=(catalog.dataset("hamiltonian_paper"),),
    seeds=(0, 1, 2),
    max_train_pairs=None,
    max_eval_pairs=None,
    recipe=_recipe,
)
LAPTOP = replace(
    PAPER,
    name="laptop",
    models=(catalog.MODELS["llama-64"],),
    train_sets=(catalog.dataset("hamiltonian_verification"),),
    eval_sets=(catalog.dataset("hamiltonian_verification"),),
    seeds=(0,),
)
PROFILES = {"paper": PAPER, "laptop": LAPTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Answers sampled at temperature 1 of each prompt, the first of them the paper's one; the seed of the draws."""

    samples: int
    seed: int


def declare(plans: Sequence[TrialPlan]) -> list[AnalyseStage]:
    """One generation check of each trained IM-RM on each set of graphs that it is evaluated on."""
    return [
        AnalyseStage(
            analysis=f"generation · {plan.spec.name} · {evaluation.prepared.split.name}",
            version=VERSION,
            parameters=Parameters(samples=SAMPLES, seed=SEED),
            base=plan.train.base,
            prepared=(("prompts", evaluation.prepared),),
            reads=(plan.train,),
        )
        for plan in plans
        if plan.spec.reward.kind == "im_rm"
        for evaluation, dataset in zip(
            plan.evaluations[-len(plan.spec.eval_sets) :], plan.spec.eval_sets, strict=True
        )
        if dataset.source.startswith(GENERATED)
    ]


def compute(stage: AnalyseStage, inputs: AnalysisInputs, attempt: Attempt) -> None:
    """Answers of the trained model and of the base model, judged by the exact parser."""
    import pyarrow as pa
    from pyarrow import parquet

    from trainers.data.worlds import cycle_share, graph_of

    (training,) = stage.reads
    assert isinstance(training, TrainStage)
    prompts = _prompts(stage.prepared[0][1], inputs)
    trained = str(inputs.store.read("train", training.key, "model") / "model")
    rows = [
        {"model": name, **row}
        for name, location in (("base", inputs.location), ("trained", trained))
        for row in _answers(location, stage, inputs, prompts)
    ]
    guessed = sum(cycle_share(*graph_of(prompt)) for prompt in prompts) / len(prompts)
    results = {
        "name": stage.analysis,
        "prompts": len(prompts),
        "random_order": guessed,
        "random_order_best": sum(1 - (1 - cycle_share(*graph_of(prompt))) ** SAMPLES for prompt in prompts)
        / len(prompts),
        **{name: _shares([row for row in rows if row["model"] == name]) for name in ("base", "trained")},
    }
    parquet.write_table(pa.Table.from_pylist(rows), attempt.directory / "answers.parquet")
    (attempt.directory / "results.json").write_text(json.dumps(results, indent=1))
    said = f"Correct cycles written, share of {results['prompts']} prompts; best of {SAMPLES} by the trained model's reward."
    write_summary(attempt.directory, stage.analysis, [said, _table(results).markdown()])
    attempt.info.update(results=results)


def _prompts(prepared: PrepareStage, inputs: AnalysisInputs) -> list[str]:
    """The text of each prepared pair's prompt."""
    from trainers.data.records import read_written_pairs

    rows = read_written_pairs(inputs.store.read("dataset", prepared.split.digest) / "pairs.jsonl")
    return [rows[pair.index].prompt[-1].content for pair in inputs.pairs["prompts"]]


def _answers(
    location: str, stage: AnalyseStage, inputs: AnalysisInputs, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each prompt and answer: the likeliest as sample −1, then those drawn at temperature 1."""
    from trainers.data.worlds import is_correct
    from trainers.models.generation import generate, load_generator
    from trainers.pairs.templates import load_tokenizer

    base, pairs, parameters = stage.base, inputs.pairs["prompts"], stage.parameters
    assert base is not None
    revision = base.revision if location == inputs.location else None
    tokenizer = load_tokenizer(location, revision, base.trust)
    model = load_generator(location, revision=revision, precision=base.precision, trust=base.trust)
    # Whoever writes longer than every right answer is wrong.
    asked: dict[str, Any] = {
        "end": pairs[0].chosen[-1],
        "max_new_tokens": max(len(pair.chosen) for pair in pairs),
        "seed": parameters.seed,
    }
    token_ids = [pair.prompt for pair in pairs]
    likeliest = generate(model, token_ids, samples=1, temperature=0.0, **asked)
    drawn = generate(model, token_ids, samples=parameters.samples, temperature=1.0, **asked)
    del model
    answers = [one + some for one, some in zip(likeliest, drawn, strict=True)]
    rewards = _rewards(stage, inputs, answers, asked)
    return [
        {
            "prompt": number,
            "sample": place - 1,
            "answer": (text := tokenizer.decode(tokens)),
            "correct": is_correct(text, prompts[number]),
            "reward": rewards[number][place],
        }
        for number, found in enumerate(answers)
        for place, tokens in enumerate(found)
    ]


def _rewards(
    stage: AnalyseStage, inputs: AnalysisInputs, answers: Sequence[Sequence[list[int]]], asked: dict[str, Any]
) -> list[list[float]]:
    """The trained IM-RM's reward of each answer; one that was cut has no end to be rewarded for."""
    from trainers.pairs.tokens import TokenPair

    (training,) = stage.reads
    assert isinstance(training, TrainStage)
    assert training.reward.beta is not None
    width = len(answers[0])
    responses = [
        tokens if len(tokens) == asked["max_new_tokens"] else [*tokens, asked["end"]]
        for found in answers
        for tokens in found
    ]
    prompts = [pair.prompt for pair in inputs.pairs["prompts"] for _ in range(width)]
    # Scoring takes pairs; an answer is paired with itself.
    pairs = [
        TokenPair(index=number, prompt=prompt, chosen=response, rejected=response[:1])
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    trained = str(inputs.store.read("train", training.key, "model") / "model")
    sums = _log_prob_sums(trained, stage, pairs, None)
    if training.reward.uses_reference:
        reference = _log_prob_sums(inputs.location, stage, pairs, training.base.revision)
        sums = [own - other for own, other in zip(sums, reference, strict=True)]
    rewards = [training.reward.beta * value for value in sums]
    return [rewards[start : start + width] for start in range(0, len(rewards), width)]


def _log_prob_sums(
    location: str, stage: AnalyseStage, pairs: Sequence[Any], revision: str | None
) -> list[float]:
    from trainers.evaluate.scoring import compute_reference
    from trainers.models.loading import device, load_model
    from trainers.pairs.templates import load_tokenizer

    base = stage.base
    assert base is not None
    model = load_model(
        location,
        tokenizer=load_tokenizer(location, revision, base.trust),
        output="unembedding",
        precision=base.precision,
        revision=revision,
        trust=base.trust,
    )
    found = compute_reference(model.to(device()), pairs, report=lambda row: None)
    return [found[pair.index][0] for pair in pairs]


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of prompts with a correct answer: the first drawn, the likeliest, the best rewarded of k, any of k."""
    by_prompt: dict[int, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {})[row["sample"]] = row
    drawn = [[found[sample] for sample in found if sample >= 0] for found in by_prompt.values()]
    picked = [max(some, key=lambda row: float(row["reward"])) for some in drawn]
    return {
        "sampled": sum(found[0]["correct"] for found in by_prompt.values()) / len(by_prompt),
        "greedy": sum(found[-1]["correct"] for found in by_prompt.values()) / len(by_prompt),
        "best_of_k": sum(row["correct"] for row in picked) / len(by_prompt),
        "any_of_k": sum(any(row["correct"] for row in some) for some in drawn) / len(by_prompt),
    }


def _table(results: dict[str, Any]) -> Table:
    rows = [{"by": name, **results[name]} for name in ("base", "trained")]
    random, best = results["random_order"], results["random_order_best"]
    rows.append({"by": "orders at random", "sampled": random, "greedy": random, "any_of_k": best})
    return Table(
        name="correct",
        title="",
        columns="by sampled greedy best_of_k any_of_k",
        rows=rows,
        titles={
            "by": "written by",
            "sampled": "one sample",
            "best_of_k": f"best of {SAMPLES} by its reward",
            "any_of_k": f"any of {SAMPLES}",
        },
    )


if __name__ == "__main__":
    follow_up = FollowUp(declare=declare, compute=compute, loads_weights=True)
    main(Grid(build=full_grid, profiles=PROFILES, follow_up=follow_up), __file__, __doc__)
