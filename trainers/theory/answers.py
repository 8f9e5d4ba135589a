"""A language model's own answers, and how the IM-RM made of it rewards them (paper §2, §4).

The pairs whose prompts are asked say what ends an answer, and how long one may get: longer than every right answer is wrong.
"""

from collections.abc import Sequence
from typing import Any

from trainers.data.worlds import is_correct
from trainers.evaluate.scoring import compute_reference
from trainers.models.generation import Weights, generate
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec

Answers = list[list[list[int]]]


def ask(weights: Weights, pairs: Sequence[TokenPair], *, samples: int, seed: int) -> Answers:
    """Return for each prompt the likeliest answer, then `samples` drawn at temperature 1, as tokens without the end token."""
    model = weights.generator()
    end, longest = _limits(pairs)
    likeliest, drawn = (
        generate(
            model,
            [pair.prompt for pair in pairs],
            end=end,
            samples=count,
            temperature=temperature,
            max_new_tokens=longest,
            seed=seed,
        )
        for count, temperature in ((1, 0.0), (samples, 1.0))
    )
    return [one + some for one, some in zip(likeliest, drawn, strict=True)]


def rewards(
    answers: Answers, pairs: Sequence[TokenPair], spec: RewardSpec, trained: Weights, base: Weights
) -> list[list[float]]:
    """Return the trained IM-RM's reward of each answer to each prompt; the end token of a cut answer is not rewarded."""
    assert spec.beta is not None
    end, longest = _limits(pairs)
    # Scoring takes pairs; an answer is paired with itself.
    asked = [
        (pair.prompt, tokens if len(tokens) == longest else [*tokens, end])
        for pair, found in zip(pairs, answers, strict=True)
        for tokens in found
    ]
    scored = [
        TokenPair(index=number, prompt=prompt, chosen=response, rejected=response[:1])
        for number, (prompt, response) in enumerate(asked)
    ]
    sums = _log_prob_sums(trained, scored)
    if spec.uses_reference:
        sums = [own - other for own, other in zip(sums, _log_prob_sums(base, scored), strict=True)]
    found = iter(spec.beta * value for value in sums)
    return [[next(found) for _ in some] for some in answers]


def _limits(pairs: Sequence[TokenPair]) -> tuple[int, int]:
    """Return the token that ends an answer, and the most tokens that an answer may have."""
    return pairs[0].chosen[-1], max(len(pair.chosen) for pair in pairs)


def _log_prob_sums(weights: Weights, pairs: Sequence[TokenPair]) -> list[float]:
    found = compute_reference(weights.model(), pairs, report=lambda row: None)
    return [found[pair.index][0] for pair in pairs]


def verified(
    trained: Weights,
    base: Weights,
    pairs: Sequence[TokenPair],
    prompts: Sequence[str],
    spec: RewardSpec,
    *,
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Ask the trained model for a cycle of each prompt's graph, and judge the answers by the exact parser.

    Returns a row for each prompt and answer, the likeliest as sample −1.
    """
    answers = ask(trained, pairs, samples=samples, seed=seed)
    rewarded = rewards(answers, pairs, spec, trained, base)
    tokenizer = trained.tokenizer()
    return [
        {
            "prompt": number,
            "sample": place - 1,
            "answer": (text := tokenizer.decode(tokens)),
            "correct": is_correct(text, prompts[number]),
            "reward": rewarded[number][place],
        }
        for number, found in enumerate(answers)
        for place, tokens in enumerate(found)
    ]


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of prompts with a correct answer: the first drawn, the likeliest, the best rewarded of k, any of k."""
    prompts = len({row["prompt"] for row in rows})
    drawn: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["sample"] >= 0:
            drawn.setdefault(row["prompt"], []).append(row)
    best = [max(some, key=lambda row: float(row["reward"])) for some in drawn.values()]
    return {
        "sampled": sum(row["correct"] for row in rows if row["sample"] == 0) / prompts,
        "greedy": sum(row["correct"] for row in rows if row["sample"] == -1) / prompts,
        "best_of_k": sum(row["correct"] for row in best) / prompts,
        "any_of_k": sum(any(row["correct"] for row in some) for some in drawn.values()) / prompts,
    }
