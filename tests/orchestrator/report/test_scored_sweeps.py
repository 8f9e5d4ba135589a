"""The analyses of a finished sweep's scores, each once on drawn scores: nothing is trained, nothing computed twice."""

import json

import pytest
from pyarrow import parquet

from orchestrator.store.artifacts import Store
from orchestrator.store.records import write_declaration
from sweeps import domain_shift, persona_prompts, token_overlap
from tests.orchestrator.simulated import ULTRAFEEDBACK, simulated_sweep
from tests.sweep_runs import artifacts, run_analysis

SETS = (ULTRAFEEDBACK[0], ULTRAFEEDBACK[4])
# New responses on training prompts are as hard as on test prompts: what counts for an IM-RM are the responses.
PERSONA = (
    ("persona_train", "training pairs"),
    ("persona", "in-distribution"),
    ("persona_paraphrase_train", "token-level shift"),
    ("persona_paraphrase", "token-level shift"),
)
FAR = {
    (reward, category): -9.0 if reward == "im_rm" and category == "token-level shift" else 9.0
    for reward in ("ex_rm", "im_rm")
    for category in ("training pairs", "in-distribution", "token-level shift")
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A sweep of two sets, one of its trials missing, and two of persona's kind."""
    store = Store(tmp_path_factory.mktemp("grid") / "store")
    words = (("tiny_world", "in-distribution"), ("tiny_world_paraphrase", "token-level shift"))
    far = {"pairs": 40, "strengths": FAR}
    sweeps = {
        "grid": {"seeds": (0, 1), "sets": SETS, "pairs": 60, "missing": 1},
        "persona": {
            "models": ["llama-64"],
            "seeds": (0, 1),
            "train_sets": ["persona"],
            "sets": PERSONA,
            **far,
        },
        "world": {"models": ["small"], "seeds": (0,), "train_sets": ["tiny_world"], "sets": words, **far},
    }
    for name, described in sweeps.items():
        write_declaration(simulated_sweep(store, name=name, **described), store)
    return store.root


def only(storage, file):
    """The folder of the one analysis that wrote `file`."""
    (folder,) = [folder for folder in artifacts(storage).values() if (folder / file).is_file()]
    return folder


def test_domain_shift_reads_the_scores_and_ends_with_what_to_prefer(storage, capsys):
    trained = sorted(storage.glob("artifacts/train/*"))
    assert run_analysis(domain_shift, storage, "--sweep", "grid") == 0
    said = capsys.readouterr().out
    assert "When to prefer which. Trained on ultrafeedback, in-distribution: prefer EX-RM" in said
    assert "under domain shift: prefer IM-RM" in said
    assert "Missing: 1 trials" in said
    assert "rewardbench_math after ultrafeedback lacks overlap with training, similarity, leaked" in said
    folder = only(storage, "regressions.parquet")
    rows = parquet.read_table(folder / "pairs.parquet").to_pylist()
    assert len(rows) == 120
    shift = [row["gap"] for row in rows if row["evaluation_set"] == "rewardbench_math"]
    found = json.loads((folder / "results.json").read_text())["controls"]
    (domain,) = [row for row in found if (row["category"], row["model"][:4]) == ("domain shift", "mean")]
    assert domain["accuracy"]["value"] == pytest.approx(sum(shift) / 60)
    # Again: nothing is computed, nothing was trained.
    assert run_analysis(domain_shift, storage, "--sweep", "grid") == 0
    assert "1 analyses, 1 complete" in capsys.readouterr().out
    assert sorted(storage.glob("artifacts/train/*")) == trained


def test_new_prompts_are_told_from_new_responses(storage, capsys):
    assert run_analysis(persona_prompts, storage) == 0
    said = capsys.readouterr().out
    assert "IM-RM, persona_paraphrase: new responses cost more than new prompts (+1.000" in said
    assert "EX-RM, persona_paraphrase: new prompts and new responses cost the same" in said
    folder = only(storage, "persona_prompts.parquet")
    explicit, implicit = parquet.read_table(folder / "persona_prompts.parquet").to_pylist()
    cells = ("seen", "new_prompts", "new_responses", "both_new")
    assert [explicit[name] for name in cells] == [1.0, 1.0, 1.0, 1.0]
    assert [implicit[name] for name in cells] == [1.0, 1.0, 0.0, 0.0]
    # 40 prompts that agree say no more than that exceptions are rare.
    assert implicit["prompts_over_responses_low"] == pytest.approx(0.025 ** (1 / 40))
    assert explicit["prompts_over_responses_high"] == pytest.approx(1 - 0.025 ** (1 / 40))
    assert implicit["both_new_high"] == pytest.approx(1 - 0.025 ** (1 / 40))


def test_accuracy_by_token_overlap_tells_the_type_that_follows_tokens(storage, tiny_model):
    words = ("--sweep", "world", "--models", f"small={tiny_model}")
    assert run_analysis(token_overlap, storage, *words) == 0
    folder = only(storage, "deciles.parquet")
    rows = parquet.read_table(folder / "pairs.parquet").to_pylist()
    assert {row["overlap"] for row in rows if row["set"] == "tiny_world"} == {1.0}
    # Prefix and word are new on either side; the end of the turn is not.
    assert {round(row["overlap"], 9) for row in rows if row["set"] != "tiny_world"} == {round(1 / 3, 9)}
    assert all(-1.0 <= row["cosine"] <= 1.0 + 1e-9 for row in rows)
    assert {row["cosine"] < 0.999 for row in rows if row["set"] != "tiny_world"} == {True}
    found = {
        kind: [
            row["accuracy"]
            for row in parquet.read_table(folder / "deciles.parquet").to_pylist()
            if (row["set"], row["measure"], row["reward"]) == ("together", "token overlap", kind)
        ]
        for kind in ("EX-RM", "IM-RM")
    }
    assert found == {"EX-RM": [1.0, 1.0], "IM-RM": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("study", "sweep", "message"),
    [
        (token_overlap, "grid", "no complete trial of llama-64 on tiny_world"),
        (domain_shift, "nosuch", "knows no sweep of that name (it knows "),
    ],
)
def test_a_sweep_without_what_is_asked_for_is_wrong_usage(storage, capsys, study, sweep, message):
    assert run_analysis(study, storage, "--sweep", sweep) == 2
    assert message in capsys.readouterr().err
