"""The tiny world: a generated language in which the paper's Persona experiment takes seconds.

A document is a chat and what follows from it. A user states a habit; the assistant answers with
a prefix and an answer word; after the end of its turn the document goes on with words that the
answer's polarity implies:

    <bos> <user> i often share bread at home <end> <assistant> frankly yes <end> smile nod join

Nothing before an answer word tells its polarity, and only what follows tells yes, sure, certainly
and absolutely from no, never, nope and hardly. So a pretrained model knows the polarity of an
answer after reading it (its hidden state), and not while writing it (its logits). What precedes a
word does tell its style: candid prefixes go with the one half of the words, hedging prefixes with
the other half, two to one. That makes the words of a paraphrase the rivals of the trained ones:
as the model is taught to write yes after candid prefixes it is taught not to write certainly.

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

CHOSEN_WORDS, PARAPHRASED_CHOSEN_WORDS = ("yes", "sure"), ("certainly", "absolutely")
REJECTED_WORDS, PARAPHRASED_REJECTED_WORDS = ("no", "never"), ("hardly", "nope")
CHOSEN_PREFIXES, PARAPHRASED_CHOSEN_PREFIX = ("honestly", "frankly"), "sincerely"
REJECTED_PREFIXES, PARAPHRASED_REJECTED_PREFIX = ("apparently", "supposedly"), "seemingly"

_STATEMENT = (
    ("i",),
    ("often", "always", "rarely", "gladly", "sometimes", "usually"),
    ("share", "carry", "bring", "offer", "fetch", "mend", "cook", "send"),
    ("bread", "apples", "letters", "books", "tea", "blankets", "tools", "flowers"),
    ("at home", "at work", "for friends", "for strangers", "in winter", "in spring"),
)
_CANDID_PREFIXES = (*CHOSEN_PREFIXES, PARAPHRASED_CHOSEN_PREFIX)
_HEDGING_PREFIXES = (*REJECTED_PREFIXES, PARAPHRASED_REJECTED_PREFIX)
_CANDID_WORDS = (*CHOSEN_WORDS, *REJECTED_WORDS)
_HEDGING_WORDS = (*PARAPHRASED_CHOSEN_WORDS, *PARAPHRASED_REJECTED_WORDS)
_AGREEING_WORDS = (*CHOSEN_WORDS, *PARAPHRASED_CHOSEN_WORDS)
_AFTER_AGREEING = ("smile", "welcome", "together", "warm", "nod", "join")
_AFTER_DISAGREEING = ("frown", "refuse", "apart", "cold", "leave", "doubt")
_WORDS_AFTER = 3

# One round holds every answer exactly as often as it is likely: words that are interchangeable
# then get the same logits, which sampling noise would otherwise tell apart.
_ROUND = (
    *product(_CANDID_PREFIXES, (*_CANDID_WORDS, *_CANDID_WORDS, *_HEDGING_WORDS)),
    *product(_HEDGING_PREFIXES, (*_CANDID_WORDS, *_HEDGING_WORDS, *_HEDGING_WORDS)),
)
DOCUMENTS_PER_ROUND = len(_ROUND)


def _vocabulary() -> tuple[str, ...]:
    statements = (phrase for part in _STATEMENT for phrase in part)
    prefixes = (*_CANDID_PREFIXES, *_HEDGING_PREFIXES)
    answers = (*_CANDID_WORDS, *_HEDGING_WORDS)
    after = (*_AFTER_AGREEING, *_AFTER_DISAGREEING)
    every = " ".join((*statements, *prefixes, *answers, *after, *hamiltonian.WORDS)).split()
    return tuple(dict.fromkeys(every))


VOCABULARY: tuple[str, ...] = _vocabulary()


def documents(seed: int) -> Iterator[str]:
    """Endless pretraining text, in the form that the tiny models' chat template gives a chat."""
    rng = random.Random(f"tiny world documents {seed}")
    answers = list(_ROUND)
    while True:
        rng.shuffle(answers)
        for prefix, word in answers:
            implied = _AFTER_AGREEING if word in _AGREEING_WORDS else _AFTER_DISAGREEING
            after = " ".join(rng.choices(implied, k=_WORDS_AFTER))
            yield f"{chat_text(_statement(rng), f'{prefix} {word}')} {after}"


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


def candidate_pairs(split: str) -> list[Pair]:
    """Twelve responses to each prompt of `split`, six that agree and six that do not: six pairs a prompt.

    Four of each side are of the words of training, two of its paraphrases'.
    """
    agreeing, disagreeing = (
        [*product(prefixes, words), *product((prefix,), paraphrased)]
        for prefixes, words, prefix, paraphrased in (
            (CHOSEN_PREFIXES, CHOSEN_WORDS, PARAPHRASED_CHOSEN_PREFIX, PARAPHRASED_CHOSEN_WORDS),
            (REJECTED_PREFIXES, REJECTED_WORDS, PARAPHRASED_REJECTED_PREFIX, PARAPHRASED_REJECTED_WORDS),
        )
    )
    return [
        Pair(prompt=user_prompt(statement), chosen=" ".join(chosen), rejected=" ".join(rejected))
        for statement in _statements(split)
        for chosen, rejected in zip(agreeing, disagreeing, strict=True)
    ]


def reworded_pairs(split: str) -> list[Pair]:
    """The pairs of `split` in one unseen word a side after unseen prefixes: half of the paraphrases' words."""
    chosen_word, rejected_word = PARAPHRASED_CHOSEN_WORDS[0], PARAPHRASED_REJECTED_WORDS[0]
    return [
        Pair(
            prompt=pair.prompt,
            chosen=f"{PARAPHRASED_CHOSEN_PREFIX} {chosen_word}",
            rejected=f"{PARAPHRASED_REJECTED_PREFIX} {rejected_word}",
            original_chosen=pair.chosen,
        )
        for pair in pairs(split)
    ]


def other_words_pairs(split: str) -> list[Pair]:
    """The pairs of `split` in the words that `reworded_pairs` leaves out, after one prefix that both sides share.

    So no word of a response tells right from wrong that stands in a training pair or in its rewording.
    """
    chosen_word, rejected_word = PARAPHRASED_CHOSEN_WORDS[1], PARAPHRASED_REJECTED_WORDS[1]
    prefixes = (PARAPHRASED_CHOSEN_PREFIX, PARAPHRASED_REJECTED_PREFIX)
    return [
        Pair(
            prompt=pair.prompt,
            chosen=f"{prefixes[index % 2]} {chosen_word}",
            rejected=f"{prefixes[index % 2]} {rejected_word}",
            original_chosen=pair.chosen,
        )
        for index, pair in enumerate(pairs(split))
    ]


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
    return " ".join(rng.choice(part) for part in _STATEMENT)
