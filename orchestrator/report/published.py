"""What the paper says, to stand beside what a sweep says: arXiv 2507.07981, by the reference's sections.

Marks: [C] read in the official code, [S] second-hand summary of the paper, [U] unverified recall.
"""

from collections.abc import Iterable, Sequence

from orchestrator.report.results import TrialResult
from orchestrator.report.tables import Table, Value
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


# What the paper's official code has, by the name of a trial's parameter.
_SETTINGS = {
    "lr": "1e-06",
    "epochs": "5",
    "effective_batch": "32",
    "weight_decay": "0",
    "beta": "0.01",
    "precision": "fp32, bf16 for the 8B",
}


def spec_difference(results: Sequence[TrialResult]) -> Table:
    """Return the paper's settings beside those of the sweep's trials, and whether they are the same."""
    records, profile = [result.record for result in results], catalog.PAPER
    evaluated = (item.dataset for record in records for item in record.evaluations)
    trained = (f"{item.train_pairs} {item.record.train_set}" for item in results if item.train_pairs)
    scored = (len(item.scores.chosen) for result in results for item in result.final)
    here: dict[str, tuple[Iterable[object], str, Iterable[object]]] = {
        "models": ((model.name for model in profile.models), "[U]", (record.model for record in records)),
        "reward types": (COMPARED, "[C]", (record.reward for record in records)),
        "training sets": (
            (item.name for item in profile.train_sets),
            "[C]",
            (record.train_set for record in records),
        ),
        "evaluation sets": ((item.name for item in profile.eval_sets), "[C]", evaluated),
        "seeds": (["3"], "[U]", [len({record.seed for record in records})]),
        "training pairs": (["2000 ultrafeedback", "1000 rewardmath"], "[C]", trained),
        "pairs of an evaluation set": (["200"], "[C]", scored),
    }
    for name, value in _SETTINGS.items():
        declared = [record.parameters[name] for record in records if name in record.parameters]
        here[name.replace("_", " ")] = ([value], "[C]", declared)
    rows: list[dict[str, Value]] = []
    for setting, (said, mark, values) in here.items():
        # Order says nothing about a list of names.
        theirs, ours = (sorted({_plain(value) for value in side}) for side in (said, values))
        shown = {"paper": ", ".join(theirs), "source": mark, "here": ", ".join(ours) or None}
        rows.append({"setting": setting, **shown, "same": theirs == ours if ours else None})
    return Table(
        name="spec_difference",
        title="This sweep's spec beside the paper's",
        note="Marks: [C] read in the paper's official code, [U] unverified recall. Where several values stand here, "
        "trials differ.",
        columns="setting paper source here same",
        rows=rows,
    )


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
