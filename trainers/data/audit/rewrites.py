"""What a rewritten set rewrites, row by row."""

from collections.abc import Iterable, Sequence

from trainers.data.records import Message, Pair


def originals(
    pairs: Sequence[Pair], candidates: Iterable[Pair], *, declared: bool
) -> list[tuple[str, str] | None]:
    """The (chosen, rejected) responses that each pair rewrites; "" for one that is not known, None where neither is.

    A row may name its original's chosen response; a set that is `declared` a rewriting without naming them keeps its
    originals' prompts: where one candidate has the prompt, it is the original.
    """
    by_prompt: dict[tuple[Message, ...], list[Pair]] = {}
    for candidate in dict.fromkeys(candidates):
        by_prompt.setdefault(candidate.prompt, []).append(candidate)
    return [_original(pair, by_prompt.get(pair.prompt, []), declared) for pair in pairs]


def _original(pair: Pair, known: Sequence[Pair], declared: bool) -> tuple[str, str] | None:
    if pair.original_chosen is not None:
        rejected = {item.rejected for item in known if item.chosen == pair.original_chosen}
        return pair.original_chosen, rejected.pop() if len(rejected) == 1 else ""
    if declared and len(known) == 1:
        return known[0].chosen, known[0].rejected
    return None
