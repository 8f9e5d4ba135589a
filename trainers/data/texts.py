"""Measures of texts: language, whether a text ends, and how alike two texts or two sets of pairs are."""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "unknown"
# A response this long holds a sentence, and two such responses are not equal by chance.
LONG = 100

_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")
# The classifier reads this many characters; with fewer letters than this it guesses.
_LANGUAGE_CHARACTERS, _LANGUAGE_LETTERS, _LANGUAGE_CERTAINTY = 300, 40, 0.9
_ENDS = frozenset(".!?…。！？؟।:;\"'”’»`)]}>|*_~$")
_BEGIN = object()
# Overlaps computed at once: 64 MB.
_BLOCK = 8_000_000


def words(text: str) -> list[str]:
    """Return the words and signs of a text, in order."""
    return _WORD_OR_SIGN.findall(text)


@functools.cache
def _identifier() -> Any:
    from py3langid import langid  # type: ignore[import-untyped]

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """Return the ISO 639 code, or "unknown" where letters are few or the guess is uncertain (code, formulas)."""
    start = text[:_LANGUAGE_CHARACTERS]
    letters = sum(map(str.isalpha, start))
    if letters < _LANGUAGE_LETTERS or 2 * letters < len(start):
        return UNKNOWN
    code, certainty = _identifier().classify(start)
    return str(code) if certainty >= _LANGUAGE_CERTAINTY else UNKNOWN


def looks_cut(text: str) -> bool:
    """Return whether a text of at least 100 characters ends in a letter or a comma.

    A formula or the last entry of a list may end so too: a share over a set says more than one text.
    """
    stripped = text.rstrip()
    if len(stripped) < LONG:
        return False
    last = stripped[-1]
    if last in _ENDS or ord(last) > 0x1F000:
        return False
    last_line = stripped.rpartition("\n")[2].lstrip()
    return not last_line.startswith(("-", "*", "•", "#", "|", ">")) and not last.isdigit()


def similarity(left: str, right: str) -> float:
    """Return 2M / T: M words and signs in matching blocks, of T in both texts (difflib's ratio)."""
    return difflib.SequenceMatcher(None, words(left), words(right), autojunk=False).ratio()


def token_overlap(original: Sequence[Hashable], rewritten: Sequence[Hashable]) -> float:
    """Return the probability that a token drawn from one text equals one drawn from the other, begin tokens included.

    This is the measure behind the paper's figures (0.048 of a response with itself, 0.023 with its
    paraphrase: paper §2); their tokenizer adds the begin token, which counts here for any tokenizer.
    """
    left, right = Counter[Any]([_BEGIN, *original]), Counter[Any]([_BEGIN, *rewritten])
    common = sum(count * right[token] for token, count in left.items())
    return common / (left.total() * right.total())


Bag = frozenset[tuple[bool, Hashable]]


def bag(chosen: Iterable[Hashable], rejected: Iterable[Hashable]) -> Bag:
    """Return a pair's distinct tokens (ids or words), each with its side: a chosen yes is not a rejected yes."""
    return frozenset([*((True, token) for token in chosen), *((False, token) for token in rejected)])


def nearest_overlap(pairs: Sequence[Bag], trained: Sequence[Bag]) -> NDArray[np.float64]:
    """Return each pair's largest Dice coefficient, 2|A ∩ B| / (|A| + |B|), with one of the training pairs.

    It is the token shift within a distribution. Both sequences hold at least one bag.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]

    # Bags × tokens of training, 1 where the bag holds the token.
    counter = CountVectorizer(analyzer=tuple, binary=True, dtype=np.float64).fit(trained)
    ours, theirs = counter.transform(pairs), counter.transform(trained)
    sizes_T, sizes_P = (np.array([len(item) for item in bags], float) for bags in (trained, pairs))
    found = []
    step = max(1, _BLOCK // len(trained))
    for start in range(0, len(pairs), step):
        common = np.asarray((ours[start : start + step] @ theirs.T).todense(), dtype=np.float64)
        both = sizes_P[start : start + step, None] + sizes_T[None, :]
        found.append((2.0 * common / np.maximum(both, 1.0)).max(axis=1))
    return np.concatenate(found)
