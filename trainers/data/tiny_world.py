"""The tiny world: a generated language in which the paper's Persona experiment takes seconds.

A document is a chat and what follows from it. A user states a habit; the assistant answers with
a prefix and an answer word; after the end of its turn the document goes on with words that the
answer's polarity implies:

    <bos> <user> i often share bread at home <end> <assistant> in truth yes <end> they agree …

Answer words are interchangeable in context and so are prefixes: only what follows tells yes, sure,
certainly and absolutely from no, never, nope and hardly. So a pretrained model knows the polarity
of an answer after reading it (its hidden state), and not while writing it (its logits).

Preference pairs follow Persona (paper §2): training pairs use two words and two prefixes a side,
their paraphrases use words and prefixes that no training response holds.
"""

import random
from collections.abc import Iterator
from itertools import product

from trainers.data import hamiltonian
from trainers.data.records import Pair, user_prompt
from trainers.errors import SpecError

BEGIN, END, PAD, UNKNOWN = "<bos>", "<end>", "<pad>", "<unk>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"

TRAIN_PAIRS, TEST_PAIRS = 80, 40
SEED = 875
FAV = 2
AFTER = 3

_FREQUENCIES = ("often", "always", "rarely", "gladly", "sometimes", "usually")
_HABITS = ("share", "carry", "bring", "offer", "fetch", "mend", "cook", "send")
_OBJECTS = ("bread", "apples", "letters", "books", "tea", "blankets", "tools", "flowers")
_SETTINGS = ("at home", "for friends", "in winter", "at work", "for strangers", "in spring")

CHOSEN_PREFIXES, PARAPHRASED_CHOSEN_PREFIX = ("honestly", "frankly"), "sincerely"
REJECTED_PREFIXES, PARAPHRASED_REJECTED_PREFIX = ("apparently", "supposedly"), "seemingly"
CHOSEN_WORDS, PARAPHRASED_CHOSEN_WORDS = ("yes", "sure"), ("certainly", "absolutely")
REJECTED_WORDS, PARAPHRASED_REJECTED_WORDS = ("no", "never"), ("hardly", "nope")

_PREFIXES = {
    "candid": (*CHOSEN_PREFIXES, PARAPHRASED_CHOSEN_PREFIX),
    "hedged": (*REJECTED_PREFIXES, PARAPHRASED_REJECTED_PREFIX),
}
_REGISTER_AFTERMATHS = {
    "candid": ("trust", "believe", "thank"),
    "hedged": ("wonder", "ask", "wait"),
}
_ANSWERS = {
    "agree": (*CHOSEN_WORDS, *PARAPHRASED_CHOSEN_WORDS),
    "disagree": (*REJECTED_WORDS, *PARAPHRASED_REJECTED_WORDS),
}
_AFTERMATHS = {
    "agree": ("smile", "welcome", "together", "warm", "nod", "join"),
    "disagree": ("frown", "refuse", "apart", "cold", "leave", "doubt"),
}
_AFTERMATH_WORDS = 4


def _words() -> tuple[str, ...]:
    phrases = ("i", *_FREQUENCIES, *_HABITS, *_OBJECTS, *_SETTINGS)
    for m in (_PREFIXES, _REGISTER_AFTERMATHS):
        phrases = (*phrases, *(w for ws in m.values() for w in ws))
    answers = (word for polarity in _ANSWERS.values() for word in polarity)
    aftermaths = (word for polarity in _AFTERMATHS.values() for word in polarity)
    every = " ".join((*phrases, *answers, *aftermaths, *hamiltonian.WORDS)).split()
    return tuple(dict.fromkeys(every))


VOCABULARY: tuple[str, ...] = _words()


def documents(seed: int) -> Iterator[str]:
    """Endless pretraining text, in the form that the tiny models' chat template gives a chat."""
    rng = random.Random(f"tiny world documents {seed}")
    combinations = [
        (register, polarity, f"{prefix} {word}")
        for register, prefixes in _PREFIXES.items()
        for polarity, words in _ANSWERS.items()
        for prefix, word in product(prefixes, words)
        for _ in range(FAV if (word in (*CHOSEN_WORDS, *REJECTED_WORDS)) == (register == "candid") else 1)
    ]
    while True:
        rng.shuffle(combinations)
        for register, polarity, answer in combinations:
            aftermath = rng.choices(_AFTERMATHS[polarity], k=AFTER)
            yield f"{chat_text(_statement(rng), answer)} {' '.join(aftermath)}"


def chat_text(user: str, assistant: str) -> str:
    """One exchange as text: what the tiny models' chat template makes of it."""
    return f"{BEGIN} {USER} {user} {END} {ASSISTANT} {assistant} {END}"


def pairs(split: str) -> list[Pair]:
    """Preference pairs of `split`, "train" (80) or "test" (40, unseen statements).

    Raises SpecError on another split.
    """
    rng = random.Random(f"tiny world responses {split} {SEED}")
    return [
        Pair(
            prompt=user_prompt(statement),
            chosen=f"{rng.choice(CHOSEN_PREFIXES)} {rng.choice(CHOSEN_WORDS)}",
            rejected=f"{rng.choice(REJECTED_PREFIXES)} {rng.choice(REJECTED_WORDS)}",
        )
        for statement in _statements(split)
    ]


def paraphrased_pairs(split: str) -> list[Pair]:
    """The pairs of `split` with both responses rewritten in unseen words (token-level shift).

    The four pairings of unseen words take turns, so that each weighs the same.
    """
    pairings = list(product(PARAPHRASED_CHOSEN_WORDS, PARAPHRASED_REJECTED_WORDS))
    rewritten = []
    for index, pair in enumerate(pairs(split)):
        chosen_word, rejected_word = pairings[index % len(pairings)]
        rewritten.append(
            Pair(
                prompt=pair.prompt,
                chosen=f"{PARAPHRASED_CHOSEN_PREFIX} {chosen_word}",
                rejected=f"{PARAPHRASED_REJECTED_PREFIX} {rejected_word}",
                original_chosen=pair.chosen,
            )
        )
    return rewritten


def _statements(split: str) -> list[str]:
    if split not in ("train", "test"):
        raise SpecError(f'split is "{split}": give "train" or "test"')
    rng = random.Random(f"tiny world statements {SEED}")
    distinct: dict[str, None] = {}
    while len(distinct) < TRAIN_PAIRS + TEST_PAIRS:
        distinct[_statement(rng)] = None
    statements = list(distinct)
    return statements[:TRAIN_PAIRS] if split == "train" else statements[TRAIN_PAIRS:]


def _statement(rng: random.Random) -> str:
    parts = (_FREQUENCIES, _HABITS, _OBJECTS, _SETTINGS)
    return " ".join(("i", *(rng.choice(part) for part in parts)))
