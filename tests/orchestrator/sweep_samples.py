"""Small values to build tests from: trials, splits, rows on disk, and artifacts as the stages would leave them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
from pyarrow import parquet

from orchestrator.report import page
from orchestrator.report.results import TrialResult, trial_states, with_scores
from orchestrator.report.summary import Written
from orchestrator.spec.stages import BaseModel, PretrainStage, Split, TrialPlan, plan_trial
from orchestrator.spec.trials import Sweep, TrialSpec, grid
from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, EvaluationRecord, TrialRecord
from trainers.models.tiny import TINY_MODELS
from trainers.rewards import RewardSpec
from trainers.specs import DatasetSpec, DrawSpec, ModelSpec, OptimSpec

EX_RM = RewardSpec(kind="ex_rm")
IM_RM = RewardSpec(kind="im_rm", beta=0.01)
LLAMA = ModelSpec(name="llama-64", source="builtin:llama-64")
QWEN = ModelSpec(name="qwen2-64", source="builtin:qwen2-64")
TINY_WORLD = DatasetSpec(name="tiny_world", source="builtin:tiny_world")
PARAPHRASE = DatasetSpec(
    name="tiny_world_paraphrase", source="builtin:tiny_world_paraphrase", rewriting_of="tiny_world"
)
HAMILTONIAN = DatasetSpec(name="hamiltonian", source="builtin:hamiltonian")


def trial(**changes: Any) -> TrialSpec:
    """One cell, with `changes` to its fields."""
    fields = {
        "model": LLAMA,
        "reward": IM_RM,
        "train_set": TINY_WORLD,
        "train_draw": DrawSpec(),
        "optim": OptimSpec(),
        "seed": 0,
        "eval_sets": (TINY_WORLD, HAMILTONIAN),
        "eval_draw": DrawSpec(),
    }
    return TrialSpec(**{**fields, **changes})


def base_model(**changes: Any) -> BaseModel:
    """A base model that no stage makes."""
    fields = {
        "name": "llama-64",
        "key": "model-key",
        "tokenizer_key": "tokenizer-key",
        "precision": "fp32",
        "location": "/models/llama-64",
        "origin": None,
    }
    return BaseModel(**{**fields, **changes})


def split(name: str, which: str) -> Split:
    """A split whose digest is its name."""
    return Split(name=name, split=which, digest=f"{name}/{which}", rows=8)


def plan(spec: TrialSpec | None = None, **changes: Any) -> TrialPlan:
    """The stages of a trial on a base model with `changes`."""
    spec = spec or trial()
    evaluated = [split(item.name, "test") for item in spec.eval_sets]
    return plan_trial(spec, base_model(**changes), split(spec.train_set.name, "train"), evaluated)


def pretrained_plan(**changes: Any) -> TrialPlan:
    """The stages of a trial on a built-in model."""
    origin = PretrainStage(model=TINY_MODELS["llama-64"], name="llama-64")
    return plan(trial(**changes), key=origin.key, origin=origin)


def sweep(
    train_sets: Sequence[DatasetSpec],
    eval_sets: Sequence[DatasetSpec],
    models: Sequence[ModelSpec] = (LLAMA,),
    **changes: Any,
) -> Sweep:
    """One EX-RM trial per model and training set."""
    trials = grid(
        models=models,
        rewards=[EX_RM],
        train_sets=train_sets,
        eval_sets=eval_sets,
        seeds=[0],
        recipe=lambda model, dataset: OptimSpec(),
        train_draw=DrawSpec(),
        eval_draw=DrawSpec(),
    )
    return Sweep(name="demo", trials=trials, **changes)


def rows(count: int, tag: str, **more: str) -> list[dict[str, Any]]:
    """Preference rows that say `tag`; the values of `more` are columns beside, numbered."""
    return [
        {
            "prompt": f"{tag} question {i}",
            "chosen": f"{tag} good answer {i}",
            "rejected": f"{tag} bad answer {i}",
            **{column: f"{text} {i}" for column, text in more.items()},
        }
        for i in range(count)
    ]


def write_jsonl(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write rows as jsonl, folders made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def dataset_folder(folder: Path, **splits: Sequence[dict[str, Any]]) -> DatasetSpec:
    """A data set with one jsonl file per split, named after its folder."""
    for name, lines in splits.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
    return DatasetSpec(name=folder.name, source=str(folder))


def commit_prepared(store: Store, key: str, *, too_long: int, pairs: int = 10) -> None:
    """The artifact of a prepared set, but for its pairs."""
    with store.write("prepare", key) as attempt:
        (attempt.directory / "pairs.arrow").touch()
        attempt.info.update(pairs=pairs, too_long=too_long)


def commit_train(
    store: Store, key: str, *, accuracy: float = 1.0, pairs: int = 100, steps: int = 3, prepared: str = ""
) -> None:
    """The artifact of a training whose last epoch ranked `accuracy` of `pairs` right."""
    log = [
        {
            "step": float(step),
            "epoch": 0.0,
            "loss": 1.0 / step,
            "accuracy": 0.5,
            "margin": 0.1 * step,
            "grad_norm": 2.0,
            "lr": 1e-4,
            "time": 1_700_000_000.0 + step,
        }
        for step in range(1, steps + 1)
    ]
    with store.write("train", key, data=prepared) as attempt:
        parquet.write_table(pa.Table.from_pylist(log), attempt.directory / "log.parquet")
        attempt.info.update(
            pairs=pairs,
            train_accuracy=accuracy,
            perf={
                "tokens_per_s": 100.0,
                "pairs_per_s": 10.0,
                "step_s": 0.5,
                "peak_mem_gb": 1.5,
                "set_up_s": 2.0,
            },
        )


def commit_scores(
    store: Store,
    key: str,
    *,
    right: int,
    pairs: int = 10,
    first: int = 0,
    prepared: str = "",
    weights: str | None = None,
) -> None:
    """The artifact of an evaluation that ranks the first `right` of `pairs` right, rows `first` and on of the split.

    `prepared` is the key of the set as it was prepared, `weights` the digest of those that it scored.
    """
    count = range(first, first + pairs)
    table = pa.table(
        {
            "dataset": ["set"] * pairs,
            "index": list(count),
            "chosen_reward": [1.0 if i - first < right else -1.0 for i in count],
            "rejected_reward": [0.0] * pairs,
            "chosen_tokens": [3] * pairs,
            "rejected_tokens": [4] * pairs,
        }
    )
    with store.write("evaluate", key, data=prepared) as attempt:
        parquet.write_table(table, attempt.directory / "scores.parquet")
        attempt.info.update(weights=weights)


def record(
    *,
    model: str = "llama-64",
    reward: str = "ex_rm",
    seed: int = 0,
    sets: Sequence[tuple[str, str]] = (("tiny_world", "in-distribution"), ("hamiltonian", "domain shift")),
    **parameters: Any,
) -> TrialRecord:
    """A trial's record; its key and those of its evaluations are made of its labels."""
    key = f"{model}-{reward}-{seed}"
    said = {
        "model": model,
        "reward": reward,
        "train_set": "tiny_world",
        "seed": seed,
        "lr": 1e-4,
        "epochs": 5,
    }
    return TrialRecord(
        name=f"{model} · {reward} · tiny_world · s{seed}",
        key=key,
        model=model,
        reward=reward,
        train_set="tiny_world",
        train_digest="d" * 64,
        seed=seed,
        parameters={**said, **parameters},
        evaluations=tuple(
            EvaluationRecord(
                dataset=name, key=f"{key}-{name}", category=category, dataset_digest=f"{number}" * 64
            )
            for number, (name, category) in enumerate(sets)
        ),
    )


def commit_trial(
    store: Store, trial: TrialRecord, *rights: int, accuracy: float = 1.0, steps: int = 3
) -> None:
    """A training, and an evaluation with `right` of 10 pairs right for each of the first sets."""
    commit_train(store, trial.key, accuracy=accuracy, steps=steps)
    for item, right in zip(trial.evaluations, rights, strict=False):
        commit_scores(store, item.key, right=right)


def declaration(*trials: TrialRecord, name: str = "demo") -> Declaration:
    """A sweep of these trials."""
    return Declaration(sweep=name, trials=trials)


def with_parameters(trial: TrialRecord, **changes: Any) -> TrialRecord:
    """The same trial, declared with other parameters."""
    return replace(trial, parameters={**trial.parameters, **changes})


def trial_result(record: TrialRecord, store: Store) -> TrialResult:
    return with_scores(trial_states([record], store), store)[0]


def write_report(declared: Declaration, store: Store) -> Written:
    """Write a report without its figures, which take most of the time, and without the curves in them."""
    with mock.patch.multiple(page, every_figure=lambda *_: (), curve_rows=lambda *_: []):
        return page.write_full_report(declared, store, anew=True)
