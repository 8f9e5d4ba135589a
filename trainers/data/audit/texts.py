"""What one text, or one pair of texts, looks like: language, whether it ends, how alike two are."""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from trainers.data.audit.lengths import LONG

WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")
UNKNOWN = "unknown"
# A share of a set settles on this many evenly spaced pairs.
LANGUAGE_SAMPLE = 200
# The classifier reads this much; with fewer letters it guesses.
_LANGUAGE_CHARACTERS = 300
_LANGUAGE_LETTERS = 40
_LANGUAGE_CERTAINTY = 0.9
_ENDS = frozenset(".!?…。！？؟।:;\"'”’»`)]}>|*_~$")
_BEGIN = object()


def words(text: str) -> list[str]:
    """Words and signs, in order."""
    return WORD_OR_SIGN.findall(text)


@functools.cache
def _identifier() -> Any:
    from py3langid import langid  # type: ignore[import-untyped]

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """ISO 639 code, or "unknown" where the text is short, has few letters or is uncertain (code, formulas)."""
    start = text[:_LANGUAGE_CHARACTERS]
    letters = sum(map(str.isalpha, start))
    if letters < _LANGUAGE_LETTERS or 2 * letters < len(start):
        return UNKNOWN
    code, certainty = _identifier().classify(start)
    return str(code) if certainty >= _LANGUAGE_CERTAINTY else UNKNOWN


def looks_cut(text: str) -> bool:
    """Whether a text of at least 100 characters ends in the middle of a sentence: in a letter, a digit or a comma.

    A formula, a number after "is" or "=", a list's last entry may end so too: a share over a set says more than one text.
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
    """How alike two texts are: 2M / T, M words and signs in matching blocks of T in both (as difflib's ratio)."""
    a, b = words(left), words(right)
    if not a and not b:
        return 1.0
    before = _common_prefix(a, b)
    after = _common_prefix(a[before:][::-1], b[before:][::-1])
    inner = difflib.SequenceMatcher(
        None, a[before : len(a) - after], b[before : len(b) - after], autojunk=False
    )
    matched = before + after + sum(block.size for block in inner.get_matching_blocks())
    return 2.0 * matched / (len(a) + len(b))


def _common_prefix(a: Sequence[str], b: Sequence[str]) -> int:
    shorter = min(len(a), len(b))
    return next((place for place in range(shorter) if a[place] != b[place]), shorter)


def token_overlap(original: Sequence[Hashable], rewritten: Sequence[Hashable]) -> float:
    """Probability that a token drawn from one text equals a token drawn from the other, each with a begin token.

    This is the measure behind the paper's figures (0.048 of a response with itself, 0.023 with its paraphrase: paper §2);
    their tokenizer adds the begin token, which counts here for any tokenizer.
    """
    left, right = Counter[Any]([_BEGIN, *original]), Counter[Any]([_BEGIN, *rewritten])
    common = sum(count * right[token] for token, count in left.items())
    return common / (left.total() * right.total())
