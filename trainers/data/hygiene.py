"""Is a rewritten response one? Overlap with the original, length, an end, the language, refusals."""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

LANGUAGES = {
    "french": "fr",
    "spanish": "es",
    "german": "de",
    "italian": "it",
    "portuguese": "pt",
    "dutch": "nl",
    "english": "en",
}
MOST_CHRF = 90.0
LENGTH_RATIOS = (0.4, 2.5)
# Shorter texts say nothing about length, end or language.
_SHORT = 40
_LETTERS_FOR_LANGUAGE = 60
_REFUSAL = re.compile(
    r"^\W*(i'm|i am) (sorry|unable|not able)|^\W*(sorry|i),? (but )?i?\s?(cannot|can't|won't)\b|^\W*as an ai\b",
    re.I,
)
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hygiene:
    """What a rewriting is like beside its original; `overlap` is the paper's measure, over words (paper §2)."""

    overlap: float
    self_overlap: float
    chrf: float
    length_ratio: float
    language: str | None


def token_overlap(one: str, other: str) -> float:
    """Share of all (token of one, token of other) couples that are the same token."""
    first, second = (Counter(_WORD.findall(text.lower())) for text in (one, other))
    couples = first.total() * second.total()
    return sum(count * second[word] for word, count in first.items()) / couples if couples else 0.0


def measure(original: str, rewritten: str) -> Hygiene:
    """The numbers of one rewriting."""
    return Hygiene(
        overlap=token_overlap(original, rewritten),
        self_overlap=token_overlap(original, original),
        chrf=float(_chrf().sentence_score(rewritten, [original]).score),
        length_ratio=len(rewritten) / max(1, len(original)),
        language=language(rewritten),
    )


def fault(original: str, rewritten: str, *, wanted: str | None, cut: bool = False) -> str | None:
    """Why a rewriting cannot be used; None where it can. `wanted` is a language code, None that of the original."""
    if not rewritten.strip():
        return "empty"
    if _REFUSAL.search(rewritten) and not _REFUSAL.search(original):
        return "refused"
    if cut or (_ends(original) and not _ends(rewritten)):
        return "cut off"
    found = measure(original, rewritten)
    if (found.chrf > MOST_CHRF and len(original) >= _SHORT) or rewritten.strip() == original.strip():
        return f"unchanged (chrF {found.chrf:.0f})"
    low, high = LENGTH_RATIOS
    if len(original) >= _SHORT and not low <= found.length_ratio <= high:
        return f"{found.length_ratio:.2f} times as long"
    expected = wanted or language(original)
    if expected and found.language and found.language != expected:
        return f"in {found.language}, not {expected}"
    return None


def _ends(text: str) -> bool:
    """Whether a text ends as one that is whole; short ones always do."""
    return len(text) < _SHORT or not (text.rstrip()[-1:].isalnum() or text.rstrip()[-1:] in ",;-")


def load() -> None:
    """Load what measures, which takes seconds: before requests are under way, whose time-outs would wait for it."""
    measure("a" * _LETTERS_FOR_LANGUAGE, "b" * _LETTERS_FOR_LANGUAGE)


def language(text: str) -> str | None:
    """Code of the language, None where there are too few letters to tell."""
    if sum(character.isalpha() for character in text) < _LETTERS_FOR_LANGUAGE:
        return None
    import py3langid

    return str(py3langid.classify(text)[0])


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
