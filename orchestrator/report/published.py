"""What the paper says, to stand beside what a sweep says: arXiv 2507.07981, by the reference's sections.

Marks: [C] read in the official code, [S] second-hand summary of the paper, [U] unverified recall.
"""

from collections.abc import Iterable, Sequence

from orchestrator.report.results import TrialResult
from orchestrator.report.tables import NOTHING, Table, table_of
from orchestrator.spec import catalog

# The types that the paper compares.
COMPARED = ("ex_rm", "im_rm")
SOURCE = "arXiv 2507.07981 [S]"

_REWRITINGS = frozenset({"ultrafeedback_paraphrase", "ultrafeedback_french", "ultrafeedback_spanish"})
_OTHER_DOMAINS = frozenset({"rewardbench_math", "rewardbench_code", "rewardmath"})
# By training set and evaluation sets, of EX-RM and IM-RM, the reference's §4: mean of six models of 1B to 8B, trained on
# UltraFeedback; then Persona. Hamiltonian cycles are left out: the built-in set has smaller graphs than the paper's.
_NUMBERS: dict[tuple[str, frozenset[str]], dict[str, tuple[float, float]]] = {
    ("ultrafeedback", frozenset({"ultrafeedback"})): {
        "accuracy": (0.752, 0.646),
        "abs_margin": (1.014, 0.813),
    },
    ("ultrafeedback", _REWRITINGS): {"accuracy": (0.665, 0.602), "abs_margin": (0.976, 0.763)},
    ("ultrafeedback", _OTHER_DOMAINS): {"accuracy": (0.621, 0.720), "abs_margin": (0.807, 0.726)},
    ("persona", frozenset({"persona"})): {"accuracy": (1.0, 1.0)},
    ("persona", frozenset({"persona_train"})): {"accuracy": (1.0, 1.0)},
    ("persona", frozenset({"persona_paraphrase"})): {"accuracy": (1.0, 0.019)},
    ("persona", frozenset({"persona_paraphrase_train"})): {"accuracy": (1.0, 0.022)},
    # The mean of the two above.
    ("persona", frozenset({"persona_paraphrase", "persona_paraphrase_train"})): {"accuracy": (1.0, 0.0205)},
}


def number(train_set: str, sets: Iterable[str], reward: str, metric: str) -> float | None:
    """Return the paper's number; None where it gives none for a training set and evaluation sets of these names."""
    found = _NUMBERS.get((train_set, frozenset(sets)), {}).get(metric)
    return found[COMPARED.index(reward)] if found and reward in COMPARED else None


# What the paper's official code has: title, name of a trial's parameter, value, mark.
_SETTINGS = (
    ("learning rate", "lr", "1e-06", "[C]"),
    ("epochs", "epochs", "5", "[C]"),
    ("effective batch, pairs", "effective_batch", "32", "[C]"),
    ("weight decay", "weight_decay", "0", "[C]"),
    ("β of im_rm", "beta", "0.01", "[C]"),
    ("precision", "precision", "fp32, bf16 for the 8B", "[C]"),
)
_METHOD = (
    ("last token of a micro-batch's longest row", "dropped by the padding trim", "kept"),
    ("short last accumulation of an epoch", "weighted too low, or dropped", "every pair counts the same"),
    ("date in Llama-3.2's chat template", "today's", "pinned"),
    ("training runs", "unseeded", "seeded"),
)


def spec_difference(results: Sequence[TrialResult]) -> Table:
    records, profile = [result.record for result in results], catalog.PAPER
    here: tuple[tuple[str, str, str, Iterable[object]], ...] = (
        ("models", _names(model.name for model in profile.models), "[U]", (r.model for r in records)),
        ("reward types", "ex_rm, im_rm", "[C]", (r.reward for r in records)),
        (
            "training sets",
            _names(item.name for item in profile.train_sets),
            "[C]",
            (r.train_set for r in records),
        ),
        (
            "evaluation sets",
            _names(item.name for item in profile.eval_sets),
            "[C]",
            (item.dataset for r in records for item in r.evaluations),
        ),
        ("seeds a cell", "3", "[U]", [len({r.seed for r in records})]),
        (
            "training pairs",
            "2000 UltraFeedback, 1000 RewardMATH",
            "[C]",
            (f"{r.train_pairs} {r.record.train_set}" for r in results if r.train_pairs),
        ),
        (
            "pairs of an evaluation set",
            "200",
            "[C]",
            (len(item.scores.chosen) for r in results for item in r.final),
        ),
        *(
            (title, said, mark, [r.parameters[name] for r in records if name in r.parameters])
            for title, name, said, mark in _SETTINGS
        ),
    )
    rows = [(title, said, mark, *_beside(said, values)) for title, said, mark, values in here]
    rows += [(title, theirs, "[C]", ours, "no") for title, theirs, ours in _METHOD]
    return table_of(
        ("setting", "paper", "source", "here", "same"),
        rows,
        name="spec_difference",
        title="This sweep's spec beside the paper's",
        note="Marks: [C] read in the paper's official code, [U] unverified recall. Where several values stand here, "
        "trials differ.",
    )


def _beside(said: str, values: Iterable[object]) -> tuple[str, str]:
    """Return the sweep's values, and whether they are the paper's."""
    here = _names(values)
    # Order says nothing about a list of names.
    same = sorted(here.split(", ")) == sorted(said.split(", "))
    return (here, "yes" if same else "no") if here else (NOTHING, NOTHING)


def _names(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(_plain, values)))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
