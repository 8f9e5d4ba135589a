"""Generated preference data for tiny models: the tiny world and Hamiltonian cycles.

The tiny world is a generated language in which the paper's Persona experiment takes seconds. A document is a
chat and what follows from it. A user states a habit; the assistant answers with a prefix and an answer word;
after the end of its turn the document goes on with words that the answer's polarity implies:

    <bos> <user> i often share bread at home <end> <assistant> frankly yes <end> smile nod join

Nothing before an answer word tells its polarity, and only what follows tells yes, sure, certainly and
absolutely from no, never, nope and hardly. So a pretrained model knows the polarity of an answer after
reading it (its hidden state), and not while writing it (its logits). What precedes a word does tell its
style: candid prefixes go with one half of the words, hedging prefixes with the other half, two to one. That
makes the words of a paraphrase the rivals of the trained ones: as the model is taught to write yes after
candid prefixes, it is taught not to write certainly.

Preference pairs follow Persona (paper §2): training pairs use two words and two prefixes a side; their
paraphrases use words and prefixes that no training response holds.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product, repeat

from trainers.data.records import Pair, user_prompt
from trainers.errors import SpecError

BEGIN, END, PAD, UNKNOWN = "<bos>", "<end>", "<pad>", "<unk>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"

TINY_TRAIN_PAIRS, TINY_TEST_PAIRS = 80, 40
# More of them, since their responses are more varied.
REQUEST_PAIRS = 160
TINY_SEED = 875

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
_UNSEEN_PREFIXES = (PARAPHRASED_CHOSEN_PREFIX, PARAPHRASED_REJECTED_PREFIX)
_CANDID_WORDS = (*CHOSEN_WORDS, *REJECTED_WORDS)
_HEDGING_WORDS = (*PARAPHRASED_CHOSEN_WORDS, *PARAPHRASED_REJECTED_WORDS)
_AGREEING_WORDS = (*CHOSEN_WORDS, *PARAPHRASED_CHOSEN_WORDS)
_AFTER_AGREEING = ("smile", "welcome", "together", "warm", "nod", "join")
_AFTER_DISAGREEING = ("frown", "refuse", "apart", "cold", "leave", "doubt")

# One round holds every answer exactly as often as it is likely: words that are interchangeable
# then get the same logits, which sampling noise would otherwise tell apart.
_ROUND = (
    *product(_CANDID_PREFIXES, (*_CANDID_WORDS, *_CANDID_WORDS, *_HEDGING_WORDS)),
    *product(_HEDGING_PREFIXES, (*_CANDID_WORDS, *_HEDGING_WORDS, *_HEDGING_WORDS)),
)
DOCUMENTS_PER_ROUND = len(_ROUND)

_GRAPH_WORDS = ("vertices", "edges", "-", ",", *map(str, range(16)))
# The separators of the paper's own text format. They are plain text: a model has them as single tokens only where its
# tokenizer is given them.
SEPARATOR, EDGE_SEPARATOR = "<sep>", "<edge_sep>"
Edge = tuple[int, int]

# Every word of the tiny models, in the order of their ids.
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        " ".join(
            (
                *(phrase for part in _STATEMENT for phrase in part),
                *(*_CANDID_PREFIXES, *_HEDGING_PREFIXES),
                *(*_CANDID_WORDS, *_HEDGING_WORDS),
                *(*_AFTER_AGREEING, *_AFTER_DISAGREEING),
                *_GRAPH_WORDS,
            )
        ).split()
    )
)


def documents(seed: int) -> Iterator[str]:
    """Yield pretraining texts without end, in the form that the tiny models' chat template gives a chat."""
    rng = random.Random(f"tiny world documents {seed}")
    answers = list(_ROUND)
    while True:
        rng.shuffle(answers)
        for prefix, word in answers:
            implied = _AFTER_AGREEING if word in _AGREEING_WORDS else _AFTER_DISAGREEING
            after = " ".join(rng.choices(implied, k=3))
            yield f"{chat_text(_statement(rng), f'{prefix} {word}')} {after}"


def chat_text(user: str, assistant: str) -> str:
    """Return one exchange as the text that the tiny models' chat template makes of it."""
    return f"{BEGIN} {USER} {user} {END} {ASSISTANT} {assistant} {END}"


def tiny_pairs(split: str) -> list[Pair]:
    """Return the preference pairs of `split`: "train" (80) or "test" (40, unseen statements). Raises SpecError."""
    rng = random.Random(f"tiny world responses {split} {TINY_SEED}")
    return [
        Pair(
            prompt=user_prompt(statement),
            chosen=f"{rng.choice(CHOSEN_PREFIXES)} {rng.choice(CHOSEN_WORDS)}",
            rejected=f"{rng.choice(REJECTED_PREFIXES)} {rng.choice(REJECTED_WORDS)}",
        )
        for statement in _statements(split)
    ]


def paraphrased_pairs(split: str) -> list[Pair]:
    """Return the pairs of `split` with both responses in unseen words (token-level shift).

    The four pairings of unseen words take turns, so that each weighs the same.
    """
    pairings = itertools.cycle(product(PARAPHRASED_CHOSEN_WORDS, PARAPHRASED_REJECTED_WORDS))
    return _in_other_words(split, repeat(_UNSEEN_PREFIXES), pairings)


def reworded_pairs(split: str) -> list[Pair]:
    """Return the pairs of `split` in one unseen word a side after unseen prefixes: half of the paraphrases' words."""
    words = PARAPHRASED_CHOSEN_WORDS[0], PARAPHRASED_REJECTED_WORDS[0]
    return _in_other_words(split, repeat(_UNSEEN_PREFIXES), repeat(words))


def pairs_with_rewording(split: str) -> list[Pair]:
    """Return the pairs of `split`, each with its rewording beside it."""
    return [
        dataclasses.replace(pair, rewritten=(other.chosen, other.rejected))
        for pair, other in zip(tiny_pairs(split), reworded_pairs(split), strict=True)
    ]


def other_words_pairs(split: str) -> list[Pair]:
    """Return the pairs of `split` in the words that `reworded_pairs` leaves out, after a prefix that both sides share.

    So no word of a response tells right from wrong that stands in a training pair or in its rewording.
    """
    words = PARAPHRASED_CHOSEN_WORDS[1], PARAPHRASED_REJECTED_WORDS[1]
    return _in_other_words(
        split, itertools.cycle((prefix, prefix) for prefix in _UNSEEN_PREFIXES), repeat(words)
    )


def request_pairs(split: str) -> list[Pair]:
    """Return pairs of another kind of prompt, a request, answered in all words of the language after any prefix.

    A model trained on the tiny world's pairs knows half of the words from them; a prefix tells nothing here.
    """
    require_split(split)
    requests = [" ".join(parts) for parts in product(*_STATEMENT[2:])]
    random.Random(f"tiny requests {TINY_SEED}").shuffle(requests)
    first, count = (0, REQUEST_PAIRS) if split == "train" else (REQUEST_PAIRS, TINY_TEST_PAIRS)
    rng = random.Random(f"tiny requests' responses {split} {TINY_SEED}")
    prefixes = (*_CANDID_PREFIXES, *_HEDGING_PREFIXES)
    disagreeing = (*REJECTED_WORDS, *PARAPHRASED_REJECTED_WORDS)
    return [
        Pair(
            prompt=user_prompt(request),
            chosen=f"{rng.choice(prefixes)} {rng.choice(_AGREEING_WORDS)}",
            rejected=f"{rng.choice(prefixes)} {rng.choice(disagreeing)}",
        )
        for request in requests[first : first + count]
    ]


def candidate_pairs(split: str) -> list[Pair]:
    """Return six pairs for each prompt of `split`: twelve responses, six that agree and six that do not.

    Four of each side are in the words of training, two in those of its paraphrases.
    """
    agreeing = [
        *product(CHOSEN_PREFIXES, CHOSEN_WORDS),
        *product((PARAPHRASED_CHOSEN_PREFIX,), PARAPHRASED_CHOSEN_WORDS),
    ]
    disagreeing = [
        *product(REJECTED_PREFIXES, REJECTED_WORDS),
        *product((PARAPHRASED_REJECTED_PREFIX,), PARAPHRASED_REJECTED_WORDS),
    ]
    return [
        Pair(prompt=user_prompt(statement), chosen=" ".join(chosen), rejected=" ".join(rejected))
        for statement in _statements(split)
        for chosen, rejected in zip(agreeing, disagreeing, strict=True)
    ]


def is_statement(prompt: str) -> bool:
    """Return whether a prompt says a habit, or asks for it, in the words of the tiny world."""
    known = {word for part in _STATEMENT for phrase in part for word in phrase.split()}
    return set(prompt.split()) <= known and bool(prompt.strip())


def is_agreeing(answer: str, prompt: str) -> bool:
    """Return whether an answer is exactly one prefix and one word that agrees."""
    prefixes = (*_CANDID_PREFIXES, *_HEDGING_PREFIXES)
    return answer.split() in [[*said] for said in product(prefixes, _AGREEING_WORDS)]


def _in_other_words(
    split: str, prefixes: Iterable[tuple[str, str]], words: Iterable[tuple[str, str]]
) -> list[Pair]:
    """Return the tiny world's pairs, each with the next prefixes and words of its (chosen, rejected) response."""
    return [
        Pair(prompt=pair.prompt, chosen=chosen, rejected=rejected, original_chosen=pair.chosen)
        for pair, *said in zip(tiny_pairs(split), prefixes, words, strict=False)
        for chosen, rejected in [map(" ".join, zip(*said, strict=True))]
    ]


def _statements(split: str) -> list[str]:
    require_split(split)
    rng = random.Random(f"tiny world statements {TINY_SEED}")
    distinct: dict[str, None] = {}
    while len(distinct) < TINY_TRAIN_PAIRS + TINY_TEST_PAIRS:
        distinct[_statement(rng)] = None
    statements = list(distinct)
    return statements[:TINY_TRAIN_PAIRS] if split == "train" else statements[TINY_TRAIN_PAIRS:]


def _statement(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in _STATEMENT)


def require_split(split: str) -> None:
    """Raise SpecError on a split that is not generated."""
    if split not in ("train", "test"):
        raise SpecError(f'split is "{split}": give "train" or "test"')


# Hamiltonian cycles: is this order of the vertices a cycle of this graph (paper §2)? Checking an answer is easy and
# finding one is hard: a reward model need not be a generator.
#
#     prompt    vertices 0 1 2 3 4 edges 3 - 1 , 0 - 4 , …      chosen    3 1 4 0 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HamiltonianSpec:
    """A generated set: `train_pairs` are drawn first and `test_pairs` after them, from one seed.

    A graph has a planted random cycle and every other edge with the given probability, below 1: some order of
    the vertices must be wrong. The tiny models have a word for each of 16 vertices.
    """

    vertices: int
    train_pairs: int
    test_pairs: int
    edge_probability: float = 0.2
    seed: int = 982


PAPER_GRAPHS = HamiltonianSpec(vertices=10, train_pairs=1000, test_pairs=200)
LAPTOP_GRAPHS = HamiltonianSpec(vertices=5, train_pairs=32, test_pairs=32)
# Enough graphs for a tiny model to learn to verify.
VERIFICATION_GRAPHS = HamiltonianSpec(vertices=5, train_pairs=1000, test_pairs=200)


def hamiltonian_pairs(split: str, spec: HamiltonianSpec = LAPTOP_GRAPHS) -> list[Pair]:
    """Return the pairs of `split`, "train" or "test"; no prompt stands in both. Raises SpecError.

    The chosen response is the planted cycle, the rejected one an order of the vertices that uses a non-edge.
    """
    require_split(split)
    rng = random.Random(f"hamiltonian pairs {spec.seed}")
    made: dict[str, Pair] = {}
    wanted = spec.train_pairs + (spec.test_pairs if split == "test" else 0)
    while len(made) < wanted:
        edges, cycle = random_graph(spec, rng)
        prompt = prompt_text(spec.vertices, edges)
        if prompt in made:
            continue
        wrong = rng.sample(range(spec.vertices), spec.vertices)
        while is_cycle(wrong, spec.vertices, edges):
            wrong = rng.sample(range(spec.vertices), spec.vertices)
        made[prompt] = Pair(
            prompt=user_prompt(prompt), chosen=" ".join(map(str, cycle)), rejected=" ".join(map(str, wrong))
        )
    pairs = list(made.values())
    return pairs if split == "train" else pairs[spec.train_pairs :]


def random_graph(spec: HamiltonianSpec, rng: random.Random) -> tuple[list[Edge], list[int]]:
    """Return the shuffled edges of a graph that is not complete, and its planted cycle."""
    every_edge = list(combinations(range(spec.vertices), 2))
    while True:
        cycle = rng.sample(range(spec.vertices), spec.vertices)
        planted = steps(cycle)
        edges = [e for e in every_edge if e in planted or rng.random() < spec.edge_probability]
        if len(edges) == len(every_edge):
            continue
        rng.shuffle(edges)
        # Either end may come first, so that the order of the ends tells nothing.
        return [edge if rng.random() < 0.5 else edge[::-1] for edge in edges], cycle


def is_cycle(order: Sequence[int], vertices: int, edges: Sequence[Edge]) -> bool:
    """Return whether `order` visits every vertex once and every step, the closing one too, is an edge."""
    known = {(min(edge), max(edge)) for edge in edges}
    return sorted(order) == list(range(vertices)) and known.issuperset(steps(order))


def steps(order: Sequence[int]) -> list[Edge]:
    """Return the edges from each vertex to the next and from the last to the first, each with its smaller end first."""
    return [(min(step), max(step)) for step in zip(order, [*order[1:], order[0]], strict=True)]


def prompt_text(vertices: int, edges: Sequence[Edge]) -> str:
    """Return the graph in words, one token each."""
    names = " ".join(str(vertex) for vertex in range(vertices))
    return f"vertices {names} edges {' , '.join(f'{u} - {v}' for u, v in edges)}"


def graph_of(prompt: str) -> tuple[int, list[Edge]]:
    """Return the number of vertices and the edges of a prompt, in words or in the paper's own format."""
    if EDGE_SEPARATOR in prompt:
        vertices, edges = prompt.removeprefix("Vertices: ").split("\nEdges: ")
        count, ends = len(vertices.split(SEPARATOR)) - 1, edges.split(SEPARATOR)[1:]
        between = EDGE_SEPARATOR
    else:
        vertices, edges = prompt.removeprefix("vertices ").split(" edges ")
        count, ends, between = len(vertices.split()), edges.split(" , "), " - "
    return count, [(int(u), int(v)) for u, v in (edge.split(between) for edge in ends)]


def is_correct(answer: str, prompt: str) -> bool:
    """Return whether a text is exactly an order of the prompt's vertices that is a cycle of its graph."""
    words = answer.strip().split(SEPARATOR) if EDGE_SEPARATOR in prompt else answer.split()
    vertices, edges = graph_of(prompt)
    # int() would read more than was asked for: 01, +1, 1_0.
    if not set(words) <= set(map(str, range(vertices))):
        return False
    return is_cycle([int(word) for word in words], vertices, edges)
