"""The data sets that are known by name, and how the paper's sets are filtered, drawn and made (paper §2).

Every draw comes from one torch generator in the order of the official code: a set of one split is divided
first, then the train rows are drawn, then the test rows. Importing this module imports neither torch nor
transformers.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trainers.data import worlds
from trainers.data.files import Located, Row
from trainers.data.records import Pair, as_row, user_prompt
from trainers.data.worlds import EDGE_SEPARATOR, PAPER_GRAPHS, SEPARATOR, is_cycle, steps
from trainers.errors import DataError, SpecError
from trainers.evaluate.suites import SUITES
from trainers.specs import BUILTIN, FETCHED, DatasetSpec, DrawSpec

if TYPE_CHECKING:
    from torch import Generator

Drawn = TypeVar("Drawn")

# The seeds of the paper's draws from the sources, and from the prepared pairs (paper §1).
SEED, SUBSET_SEED = 982, 517

# The rewritten responses, which are files of a git repository.
REWRITES_VARIABLE = "RMSWEEP_REWRITES_URL"
REWRITES_COMMIT = "58357b566814ea51d4e54bae8ace751889a22c14"
_REWRITES_URL = f"https://raw.githubusercontent.com/princeton-pli/exrm-vs-imrm/{REWRITES_COMMIT}"
_REWRITTEN_FROM = (
    "gpt-4.1_ultrafeedback_seed_982_ntrain_2000_ntest_200_no_translate_prompts_2025_04_19-17_01_44"
)
# The folder of each rewriting in that repository.
REWRITES = {
    "ultrafeedback_paraphrase": f"data_files/rewritten/rewrite_{_REWRITTEN_FROM}_2025_04_19-19_21_58",
    "ultrafeedback_french": f"data_files/rewritten/translate_french_{_REWRITTEN_FROM}_2025_04_19-19_37_54",
    "ultrafeedback_spanish": f"data_files/rewritten/translate_spanish_{_REWRITTEN_FROM}_2025_04_19-19_38_08",
}


def rewrites_base() -> str:
    """Return the address of the repository of rewritings, or of its mirror $RMSWEEP_REWRITES_URL."""
    return (os.environ.get(REWRITES_VARIABLE) or _REWRITES_URL).rstrip("/")


# Persona: statements that people agree with or not, and the words of both answers.
PERSONA, PERSONA_HUB_ID = "persona", "Anthropic/model-written-evals"
# The statements, which are read as a split of that name.
PERSONA_STATEMENTS, PERSONA_FILE = "agreeableness", "persona/agreeableness.jsonl"
PERSONA_SEED, PERSONA_TRAIN, PERSONA_TEST = 875, 80, 40
PERSONA_SPLITS = ("train", "test", "train_paraphrase", "test_paraphrase")
CHOSEN_PREFIXES, CHOSEN_WORDS = ("In my view, the answer is ", "A truthful reply is "), ("yes", "sure")
REJECTED_PREFIXES, REJECTED_WORDS = ("My judgement: ", "Considering the statement, I say "), ("no", "never")
PARAPHRASED_CHOSEN_PREFIX, PARAPHRASED_CHOSEN_WORDS = "My response would be ", ("certainly", "absolutely")
PARAPHRASED_REJECTED_PREFIX, PARAPHRASED_REJECTED_WORDS = "I lean toward ", ("not really", "nope")


# Name, source, and what it is.
_SETS = (
    ("ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized", "2000 and 200, the paper's draw"),
    *((name, FETCHED, "its responses rewritten by gpt-4.1-2025-04-14, 200 and 200") for name in REWRITES),
    ("rewardmath", "RewardMATH/RewardMATH_pairwise", "2000 and 200, the test leaks; trains on 1000"),
    ("rewardbench_math", "allenai/reward-bench", "subset math-prm, 34 and 200"),
    ("rewardbench_code", "allenai/reward-bench", "subsets hep-*, 84 and 200"),
    ("persona", PERSONA_HUB_ID, "agreeableness, 80 and 40, seed 875"),
    ("persona_paraphrase", PERSONA_HUB_ID, "in other words, four pairs for each"),
    ("hamiltonian_paper", BUILTIN, "10 vertices, p = 0.2, seed 982, 1000 and 200"),
    ("tiny_world", BUILTIN, "80 and 40"),
    ("tiny_world_paraphrase", BUILTIN, "80 and 40"),
    ("tiny_world_candidates", BUILTIN, "12 responses a prompt"),
    ("tiny_requests", BUILTIN, "another kind of prompt, 160 and 40"),
    ("hamiltonian", BUILTIN, "5 vertices, 32 and 32"),
    ("hamiltonian_verification", BUILTIN, "5 vertices, 1000 and 200"),
    *((name, suite.hub, suite.about) for name, suite in SUITES.items()),
)
_MORE: Mapping[str, Mapping[str, Any]] = {
    # A hub set without a revision takes the hub's newest at the first fetch; the store remembers it (paper §2 names one).
    "ultrafeedback": {"revision": "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"},
    **{name: {"revision": REWRITES_COMMIT} for name in REWRITES},
    # The paper prepared 2000 pairs and trained on 1000 of them.
    "rewardmath": {"train_draw": DrawSpec(max_pairs=1000, seed=SUBSET_SEED, permutation="torch")},
    "persona_paraphrase": {"train_split": "train_paraphrase", "test_split": "test_paraphrase"},
}


def _known(name: str, source: str) -> DatasetSpec:
    original, _, kind = name.rpartition("_")
    is_own = source in (BUILTIN, FETCHED)
    return DatasetSpec(
        name=name,
        source=f"{source}{name}" if is_own else source,
        selection=None if is_own else PERSONA if source == PERSONA_HUB_ID else name,
        rewriting_of=original if kind in ("paraphrase", "french", "spanish") else None,
        **_MORE.get(name, {}),
    )


# Each set that has a name, and a line about it.
KNOWN = {_known(name, source): about for name, source, about in _SETS}
DATASETS = tuple(KNOWN)


def named_set(name: str) -> DatasetSpec | None:
    """Return the set of that name, if there is one."""
    return next((spec for spec in DATASETS if spec.name == name), None)


# Draws.


def generator(seed: int) -> "Generator":
    """Return the generator that every draw of a set is taken from, in turn."""
    import torch

    return torch.Generator().manual_seed(seed)


def permutation(count: int, source: "Generator") -> list[int]:
    """Return the next permutation of `count` rows."""
    import torch

    order: list[int] = torch.randperm(count, generator=source).tolist()
    return order


def draw(rows: Sequence[Drawn], most: int | None, source: "Generator") -> list[Drawn]:
    """Return the first `most` of the next permutation of `rows`; all of it where None."""
    return [rows[place] for place in permutation(len(rows), source)[:most]]


# The paper's length filter: texts of at most 512 tokens, as one gated tokenizer counts them.

LENGTH_TOKENIZER = "meta-llama/Llama-3.2-1B"
LENGTH_TOKENIZER_VARIABLE = "RMSWEEP_LENGTH_TOKENIZER"
MAX_TOKENS = 512


def length_tokenizer() -> str:
    """Return the hub id or folder of the tokenizer that the length filter counts with."""
    return os.environ.get(LENGTH_TOKENIZER_VARIABLE) or LENGTH_TOKENIZER


@functools.cache
def _load_length_tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the paper's length filter needs the tokenizer {location}, which could not be loaded "
            f"({(str(error).splitlines() or [repr(error)])[0]}). Accept its licence on the hub and set HF_TOKEN, or set "
            f"{LENGTH_TOKENIZER_VARIABLE} to a folder that holds a copy of it."
        ) from error


def short_enough(texts: Sequence[str]) -> list[bool]:
    """Return whether each text has at most 512 tokens, the begin-of-sequence token counted."""
    if not texts:
        return []
    ids = _load_length_tokenizer(length_tokenizer())(list(texts))["input_ids"]
    return [len(tokens) <= MAX_TOKENS for tokens in ids]


# Selections: from the rows of a hub set to the pairs that the paper used, as rows of prompt, chosen, rejected.

# Returns the rows of a split of the source, from the start at each call.
RowsOf = Callable[[str], Iterator[Located]]
Texts = tuple[str, str, str]
# How many rows were left after each step of reading.
Funnel = list[tuple[str, int]]


def said_funnel(funnel: Funnel) -> str:
    """Return the steps as a line: 12 rows, read as HelpSteer3 → 10 with a preference."""
    return " → ".join(f"{count:,} {what}" for what, count in funnel)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperDraw:
    """One of the paper's draws. `texts` returns prompt, chosen and rejected of a row, or None where it is dropped.

    `splits` are the source's splits that train and test come
    from. With `test_rows`, the source's one split is divided, and the last of a permutation are for testing.
    """

    texts: Callable[[Row], Texts | None]
    splits: Mapping[str, str]
    test_rows: int | None = None
    pairs: Mapping[str, int | None] = field(default_factory=lambda: {"train": None, "test": 200})


def _ultrafeedback(row: Row) -> Texts | None:
    asked = row["prompt"].lower()
    if row["score_chosen"] <= row["score_rejected"] or "translate" in asked or "translation" in asked:
        return None
    return row["prompt"], row["chosen"][1]["content"], row["rejected"][1]["content"]


def _rewardmath(row: Row) -> Texts:
    solutions = [" ".join(row[f"eval_solution_{side}"]) for side in "AB"]
    chosen, rejected = solutions if row["chosen_position"] == "A" else reversed(solutions)
    return row["problem"], chosen, rejected


def _rewardbench(row: Row, prefix: str) -> Texts | None:
    return (row["prompt"], row["chosen"], row["rejected"]) if row["subset"].startswith(prefix) else None


PAPER_DRAWS: Mapping[str, PaperDraw] = {
    "ultrafeedback": PaperDraw(
        texts=_ultrafeedback,
        splits={"train": "train_prefs", "test": "test_prefs"},
        pairs={"train": 2000, "test": 200},
    ),
    "rewardmath": PaperDraw(
        texts=_rewardmath,
        splits=dict.fromkeys(("train", "test"), "test"),
        test_rows=1000,
        pairs={"train": 2000, "test": 200},
    ),
    **{
        name: PaperDraw(
            texts=functools.partial(_rewardbench, prefix=prefix),
            splits=dict.fromkeys(("train", "test"), "filtered"),
            test_rows=test_rows,
        )
        for name, prefix, test_rows in (
            ("rewardbench_math", "math-prm", 400),
            # 900 for testing gives the paper's 84 training pairs; the official code's last version says 492.
            ("rewardbench_code", "hep", 900),
        )
    },
}


def selected_splits(selection: str) -> tuple[str, ...]:
    """Return the splits that a selection gives; a suite is only for testing."""
    return PERSONA_SPLITS if selection == PERSONA else ("test",) if selection in SUITES else ("train", "test")


def selected_rows(selection: str, rows_of: RowsOf, side: str) -> Iterator[Located]:
    """Yield the rows of a selection's split, in the order of the draw."""
    if selection == PERSONA:
        rows = [item.sound() for item in rows_of(PERSONA_STATEMENTS)]
        # Those that an agreeable person would make.
        matching = [row for row in rows if row["answer_matching_behavior"].strip().lower() == "yes"]
        for number, pair in enumerate(persona_pairs([row["question"] for row in matching], side)):
            yield Located(PERSONA, number, as_row(pair))
        return
    paper = PAPER_DRAWS[selection]
    # Read a second time: the texts of all rows together would take a gigabyte.
    drawn = [item[:2] for item in paper_draw(paper, rows_of)[side]]
    wanted = set(drawn)
    found = {item[:2]: item for item in rows_of(paper.splits[side]) if item[:2] in wanted}
    for place in drawn:
        texts = paper.texts(found[place].sound())
        assert texts is not None
        yield found[place]._replace(row=dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))


def paper_draw(paper: PaperDraw, rows_of: RowsOf) -> dict[str, list[Located]]:
    """Return the rows that each side's draw takes, in its order, without what is in them. Raises DataError."""
    source = generator(SEED)
    found = {split: _filtered(paper, rows_of(split)) for split in dict.fromkeys(paper.splits.values())}
    rows = {side: found[split] for side, split in paper.splits.items()}
    if for_testing := paper.test_rows:
        order = draw(rows["train"], None, source)
        if len(order) <= for_testing:
            raise DataError(
                f"{len(order)} rows are left, of which {for_testing} are for testing: is this the whole set?"
            )
        rows = {"train": order[:-for_testing], "test": order[-for_testing:]}
    return {
        side: draw([row for row, fits in rows[side] if fits], paper.pairs[side], source)
        for side in ("train", "test")
    }


def _filtered(paper: PaperDraw, rows: Iterator[Located]) -> list[tuple[Located, bool]]:
    """Return the rows of `texts`, and whether each is short enough."""
    found: list[tuple[Located, bool]] = []
    while group := list(itertools.islice(rows, 256)):
        kept = [(item, texts) for item in group if (texts := paper.texts(item.sound())) is not None]
        short = short_enough([text for _, texts in kept for text in texts])
        for place, (item, _) in enumerate(kept):
            found.append((item._replace(row={}), all(short[3 * place : 3 * place + 3])))
    return found


# Persona, the paper's controlled token-level shift:
#
#     prompt    Is the following statement something you would say? "…"
#     chosen    A truthful reply is sure        paraphrased    My response would be certainly
#     rejected  My judgement: no                paraphrased    I lean toward nope


def persona_pairs(questions: Sequence[str], split: str) -> list[Pair]:
    """Return the pairs of `split`, made of all matching questions in their source's order.

    A paraphrased split holds every prompt once for each of the four pairings of unseen words: its accuracy is
    the mean over them. Raises SpecError, DataError.
    """
    import torch

    most = PERSONA_TRAIN + PERSONA_TEST
    if split not in PERSONA_SPLITS:
        raise SpecError(f'split is "{split}": Persona has {", ".join(PERSONA_SPLITS)}.')
    if len(questions) < most:
        raise DataError(
            f"Persona needs {most} statements whose matching answer is Yes; found {len(questions)}."
        )
    source = generator(PERSONA_SEED)

    def one_of(texts: Sequence[str]) -> str:
        return texts[int(torch.randint(len(texts), (1,), generator=source))]

    # One generator for all: what the training pairs draw comes before what the test pairs do.
    drawn = [
        Pair(
            prompt=user_prompt(questions[row]),
            chosen=one_of(CHOSEN_PREFIXES) + one_of(CHOSEN_WORDS),
            rejected=one_of(REJECTED_PREFIXES) + one_of(REJECTED_WORDS),
        )
        for row in permutation(len(questions), source)[:most]
    ]
    which, _, paraphrased = split.partition("_")
    taken = drawn[:PERSONA_TRAIN] if which == "train" else drawn[PERSONA_TRAIN:]
    if not paraphrased:
        return taken
    return [
        Pair(
            prompt=pair.prompt,
            chosen=PARAPHRASED_CHOSEN_PREFIX + agreeing,
            rejected=PARAPHRASED_REJECTED_PREFIX + disagreeing,
            original_chosen=pair.chosen,
        )
        for agreeing, disagreeing in itertools.product(PARAPHRASED_CHOSEN_WORDS, PARAPHRASED_REJECTED_WORDS)
        for pair in taken
    ]


# The paper's Hamiltonian-cycle pairs, in its own text format; worlds.py has the task in the words of the tiny models.


def paper_hamiltonian_pairs(split: str) -> list[Pair]:
    """Return the 1000 training or 200 test pairs. Raises SpecError on another split."""
    worlds.require_split(split)
    train, test = _paper_splits()
    return train if split == "train" else test


@functools.cache
def _paper_splits() -> tuple[list[Pair], list[Pair]]:
    source = generator(PAPER_GRAPHS.seed)
    # The official code generates 5000 training pairs and draws from them.
    train, test = ([_paper_pair(source) for _ in range(count)] for count in (5000, 200))
    return draw(train, PAPER_GRAPHS.train_pairs, source), draw(test, PAPER_GRAPHS.test_pairs, source)


def _paper_pair(source: "Generator") -> Pair:
    import torch

    count = PAPER_GRAPHS.vertices
    cycle = permutation(count, source)
    planted = steps(cycle)
    others = [edge for edge in itertools.combinations(range(count), 2) if edge not in planted]
    chance = PAPER_GRAPHS.edge_probability
    edges = [*planted, *(edge for edge in others if torch.rand(1, generator=source).item() < chance)]
    edges = [edges[place] for place in permutation(len(edges), source)]
    wrong = permutation(count, source)
    while is_cycle(wrong, count, edges):
        wrong = permutation(count, source)
    vertices = "".join(f"{SEPARATOR}{vertex}" for vertex in range(count))
    joined = "".join(f"{SEPARATOR}{u}{EDGE_SEPARATOR}{v}" for u, v in edges)
    return Pair(
        prompt=user_prompt(f"Vertices: {vertices}\nEdges: {joined}"),
        chosen=SEPARATOR.join(map(str, cycle)),
        rejected=SEPARATOR.join(map(str, wrong)),
    )


# The sets that are generated: the function that returns the pairs of a split.
BUILTIN_SETS: Mapping[str, Callable[[str], list[Pair]]] = {
    "tiny_world": worlds.tiny_pairs,
    "tiny_world_paraphrase": worlds.paraphrased_pairs,
    "tiny_world_candidates": worlds.candidate_pairs,
    "tiny_world_reworded": worlds.reworded_pairs,
    "tiny_world_other_words": worlds.other_words_pairs,
    "tiny_world_with_rewording": worlds.pairs_with_rewording,
    "tiny_requests": worlds.request_pairs,
    "hamiltonian": worlds.hamiltonian_pairs,
    "hamiltonian_verification": functools.partial(worlds.hamiltonian_pairs, spec=worlds.VERIFICATION_GRAPHS),
    "hamiltonian_paper": paper_hamiltonian_pairs,
}
