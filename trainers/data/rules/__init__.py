"""Rewriting by rule: synonyms and turns of phrase from a file. For tests and the laptop profile, not for claims."""

import functools
import hashlib
import json
import re
from pathlib import Path

from trainers.errors import SpecError

_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[A-Za-z]+")


def rewritten_by_rules(text: str, name: str) -> str:
    """`text` with its beginning and its words exchanged as the rules `name` say. Raises SpecError."""
    beginnings, words = _rules(name)
    lowered = text.lower()
    for beginning, other in beginnings.items():
        if lowered.startswith(beginning):
            text = _like(text, other) + text[len(beginning) :]
            break
    return _WORD.sub(lambda found: _like(found[0], words.get(found[0].lower(), found[0])), text)


def rules_digest(name: str) -> str:
    """Of what the rules `name` say. Raises SpecError."""
    return hashlib.sha256(json.dumps(_rules(name)).encode()).hexdigest()


def rule_names() -> list[str]:
    """The sets of rules that there are."""
    return sorted(file.stem for file in _FOLDER.glob("*.txt"))


def _like(model: str, text: str) -> str:
    """`text` with a capital where `model` has one."""
    return text[:1].upper() + text[1:] if model[:1].isupper() else text


@functools.cache
def _rules(name: str) -> tuple[dict[str, str], dict[str, str]]:
    if name not in rule_names():
        raise SpecError(f"the rules {name} are not one of {', '.join(rule_names())}.")
    beginnings, words = {}, {}
    for line in (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        old, _, new = (part.strip() for part in line.partition("="))
        if old.startswith("^"):
            beginnings[old[1:]] = new
        else:
            words[old] = new
    return beginnings, words
