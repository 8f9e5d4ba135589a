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

    Of each prompt come the likeliest answer, as sample −1, then `samples` drawn at temperature 1: a row for each, with
    the trained IM-RM's reward.
    """
    end, longest = pairs[0].chosen[-1], max(len(pair.chosen) for pair in pairs)
    model = trained.generator()
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
    # It would stay in memory beside those that score.
    del model
    asked = [
        (number, sample, tokens)
        for number, found in enumerate(zip(likeliest, drawn, strict=True))
        for sample, tokens in enumerate([*found[0], *found[1]], -1)
    ]
    # Scoring takes pairs; an answer is paired with its first token. A cut answer has no end to reward.
    ended = [tokens if len(tokens) == longest else [*tokens, end] for _, _, tokens in asked]
    scored = [
        TokenPair(index=place, prompt=pairs[number].prompt, chosen=ended[place], rejected=ended[place][:1])
        for place, (number, _, _) in enumerate(asked)
    ]
    sums = _log_prob_sums(trained, scored)
    if spec.uses_reference:
        sums = [own - other for own, other in zip(sums, _log_prob_sums(base, scored), strict=True)]
    assert spec.beta is not None
    tokenizer = trained.tokenizer()
    texts = [tokenizer.decode(tokens) for _, _, tokens in asked]
    return [
        {
            "prompt": number,
            "sample": sample,
            "answer": text,
            "correct": is_correct(text, prompts[number]),
            "reward": spec.beta * value,
        }
        for (number, sample, _), text, value in zip(asked, texts, sums, strict=True)
    ]


def _log_prob_sums(weights: Weights, pairs: Sequence[TokenPair]) -> list[float]:
    found = compute_reference(weights.model(), pairs, report=lambda row: None)
    return [found[pair.index][0] for pair in pairs]


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
