"""Persona: the paper's controlled token-level shift (paper §2), made of statements that people agree with or not.

    prompt    Is the following statement something you would say? "…"
    chosen    A truthful reply is sure        paraphrased    My response would be certainly
    rejected  My judgement: no                paraphrased    I lean toward nope

80 statements train and 40 test. Statements, prefixes and words are drawn as the official code draws them: by torch's
CPU generator seeded 875, here in numpy, so that planning imports no torch. A paraphrased split holds every prompt
once for each of the four pairings of unseen words: its accuracy is the mean over them.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from trainers.data.records import Pair, user_prompt
from trainers.errors import DataError, SpecError

HUB_ID, HUB_FILE = "Anthropic/model-written-evals", "persona/agreeableness.jsonl"
FILE_STEM = "agreeableness"
SEED = 875
TRAIN_PAIRS, TEST_PAIRS = 80, 40

CHOSEN_PREFIXES, CHOSEN_WORDS = ("In my view, the answer is ", "A truthful reply is "), ("yes", "sure")
REJECTED_PREFIXES, REJECTED_WORDS = ("My judgement: ", "Considering the statement, I say "), ("no", "never")
PARAPHRASED_CHOSEN_PREFIX, PARAPHRASED_CHOSEN_WORDS = "My response would be ", ("certainly", "absolutely")
PARAPHRASED_REJECTED_PREFIX, PARAPHRASED_REJECTED_WORDS = "I lean toward ", ("not really", "nope")

SPLITS = ("train", "test", "train_paraphrase", "test_paraphrase")


def matches(row: Mapping[str, Any]) -> bool:
    """Whether the statement is one that an agreeable person would make."""
    return str(row.get("answer_matching_behavior")).strip().lower() == "yes"


def pairs(questions: Sequence[str], split: str) -> list[Pair]:
    """The pairs of `split` made of all matching questions in their source's order. Raises SpecError, DataError."""
    if split not in SPLITS:
        raise SpecError(f'split is "{split}": Persona has {", ".join(SPLITS)}.')
    if len(questions) < TRAIN_PAIRS + TEST_PAIRS:
        raise DataError(
            f"Persona needs {TRAIN_PAIRS + TEST_PAIRS} statements whose matching answer is Yes; found {len(questions)}."
        )
    draw = _TorchDraws(SEED)
    order = draw.permutation(len(questions))[: TRAIN_PAIRS + TEST_PAIRS]
    # One generator for all: what the training pairs draw comes before what the test pairs do.
    drawn = [_original(questions[row], draw) for row in order]
    which, _, paraphrased = split.partition("_")
    chosen = drawn[:TRAIN_PAIRS] if which == "train" else drawn[TRAIN_PAIRS:]
    return _paraphrased(chosen) if paraphrased else chosen


def _original(question: str, draw: "_TorchDraws") -> Pair:
    agreeing = draw.one_of(CHOSEN_PREFIXES) + draw.one_of(CHOSEN_WORDS)
    disagreeing = draw.one_of(REJECTED_PREFIXES) + draw.one_of(REJECTED_WORDS)
    return Pair(prompt=user_prompt(question), chosen=agreeing, rejected=disagreeing)


def _paraphrased(originals: Sequence[Pair]) -> list[Pair]:
    return [
        Pair(
            prompt=pair.prompt,
            chosen=PARAPHRASED_CHOSEN_PREFIX + agreeing,
            rejected=PARAPHRASED_REJECTED_PREFIX + disagreeing,
            original_chosen=pair.chosen,
        )
        for agreeing, disagreeing in product(PARAPHRASED_CHOSEN_WORDS, PARAPHRASED_REJECTED_WORDS)
        for pair in originals
    ]


class _TorchDraws:
    """torch.randperm and torch.randint of a seeded CPU generator: the Mersenne Twister's 32-bit words, modulo."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.RandomState(seed)

    def _below(self, limit: int) -> int:
        return int(self._generator.randint(0, 1 << 32, dtype=np.uint32)) % limit

    def permutation(self, count: int) -> list[int]:
        order = list(range(count))
        for place in range(count - 1):
            other = place + self._below(count - place)
            order[place], order[other] = order[other], order[place]
        return order

    def one_of(self, texts: Sequence[str]) -> str:
        return texts[self._below(len(texts))]
