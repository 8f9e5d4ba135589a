"""What the paper says, to stand beside what a sweep says: arXiv 2507.07981, by the reference's sections.

Marks: [C] read in the official code, [S] second-hand summary of the paper, [U] unverified recall.
"""

from collections.abc import Iterable, Sequence

from orchestrator.report.results import TrialResult
from orchestrator.report.tables import NOTHING, Table, columns
from orchestrator.spec import catalog

SOURCE = "arXiv 2507.07981 [S]"

_REWRITINGS = frozenset({"ultrafeedback_paraphrase", "ultrafeedback_french", "ultrafeedback_spanish"})
_OTHER_DOMAINS = frozenset({"rewardbench_math", "rewardbench_code", "rewardmath"})
# By training set and evaluation sets, the reference's §4: mean of six models of 1B to 8B, trained on UltraFeedback; then
# Persona. Hamiltonian cycles are left out: the built-in set has smaller graphs than the paper's.
_NUMBERS: dict[tuple[str, frozenset[str]], dict[tuple[str, str], float]] = {
    ("ultrafeedback", frozenset({"ultrafeedback"})): {
        ("ex_rm", "accuracy"): 0.752,
        ("im_rm", "accuracy"): 0.646,
        ("ex_rm", "abs_margin"): 1.014,
        ("im_rm", "abs_margin"): 0.813,
    },
    ("ultrafeedback", _REWRITINGS): {
        ("ex_rm", "accuracy"): 0.665,
        ("im_rm", "accuracy"): 0.602,
        ("ex_rm", "abs_margin"): 0.976,
        ("im_rm", "abs_margin"): 0.763,
    },
    ("ultrafeedback", _OTHER_DOMAINS): {
        ("ex_rm", "accuracy"): 0.621,
        ("im_rm", "accuracy"): 0.720,
        ("ex_rm", "abs_margin"): 0.807,
        ("im_rm", "abs_margin"): 0.726,
    },
    ("persona", frozenset({"persona"})): {("ex_rm", "accuracy"): 1.0, ("im_rm", "accuracy"): 1.0},
    ("persona", frozenset({"persona_train"})): {("ex_rm", "accuracy"): 1.0, ("im_rm", "accuracy"): 1.0},
    ("persona", frozenset({"persona_paraphrase"})): {
        ("ex_rm", "accuracy"): 1.0,
        ("im_rm", "accuracy"): 0.019,
    },
    ("persona", frozenset({"persona_paraphrase_train"})): {
        ("ex_rm", "accuracy"): 1.0,
        ("im_rm", "accuracy"): 0.022,
    },
    # The mean of the two above.
    ("persona", frozenset({"persona_paraphrase", "persona_paraphrase_train"})): {
        ("ex_rm", "accuracy"): 1.0,
        ("im_rm", "accuracy"): 0.0205,
    },
}


def number(train_set: str, sets: Iterable[str], reward: str, metric: str) -> float | None:
    """The paper's number; None where it gives none, or trained or evaluated on sets of other names."""
    return _NUMBERS.get((train_set, frozenset(sets)), {}).get((reward, metric))


# Of a trial's parameters: what the paper's official code has.
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
    """The sweep's spec beside the paper's."""
    records = [result.record for result in results]
    profile = catalog.PAPER
    rows = [
        _row("models", _names(model.name for model in profile.models), "[U]", (r.model for r in records)),
        _row("reward types", "ex_rm, im_rm", "[C]", (r.reward for r in records)),
        _row(
            "training sets",
            _names(item.name for item in profile.train_sets),
            "[C]",
            (r.train_set for r in records),
        ),
        _row(
            "evaluation sets",
            _names(item.name for item in profile.eval_sets),
            "[C]",
            (item.dataset for r in records for item in r.evaluations),
        ),
        _row("seeds a cell", "3", "[U]", [str(len({r.seed for r in records}))]),
        _row(
            "training pairs",
            "2000 UltraFeedback, 1000 RewardMATH",
            "[C]",
            (f"{r.train_pairs} {r.record.train_set}" for r in results if r.train_pairs),
        ),
        _row(
            "pairs of an evaluation set",
            "200",
            "[C]",
            (f"{len(item.scores.chosen)}" for r in results for item in r.final),
        ),
    ]
    rows += [
        _row(title, said, mark, (_plain(r.parameters[name]) for r in records if name in r.parameters))
        for title, name, said, mark in _SETTINGS
    ]
    rows += [(title, theirs, "[C]", ours, "no") for title, theirs, ours in _METHOD]
    return Table(
        name="spec_difference",
        title="This sweep's spec beside the paper's",
        note="Marks: [C] read in the paper's official code, [U] unverified recall. Where several values stand here, "
        "trials differ.",
        columns=columns(
            ("setting", "setting"),
            ("paper", "paper"),
            ("mark", "source"),
            ("here", "here"),
            ("same", "same"),
        ),
        rows=tuple(rows),
    )


def _row(title: str, said: str, mark: str, values: Iterable[str]) -> tuple[str, str, str, str, str]:
    here = _names(values)
    # Order says nothing about a list of names.
    same = sorted(here.split(", ")) == sorted(said.split(", "))
    return (title, said, mark, here or NOTHING, ("yes" if same else "no") if here else NOTHING)


def _names(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
