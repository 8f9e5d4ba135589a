"""A sweep whose rewards are drawn, with a known answer: how much better each type ranks each set."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from orchestrator.store.artifacts import Store
from orchestrator.store.records import Declaration, EvaluationRecord, TrialRecord

ULTRAFEEDBACK = (
    ("ultrafeedback", "in-distribution"),
    ("ultrafeedback_paraphrase", "token-level shift"),
    ("ultrafeedback_spanish", "token-level shift"),
    ("ultrafeedback_french", "token-level shift"),
    ("rewardbench_math", "domain shift"),
    ("rewardbench_code", "domain shift"),
    ("rewardmath", "domain shift"),
)
# Mean margin in standard deviations, by reward type and category: IM-RM is ahead under domain shift alone.
STRENGTHS: dict[tuple[str, str], float] = {
    ("ex_rm", "in-distribution"): 1.2,
    ("im_rm", "in-distribution"): 0.3,
    ("ex_rm", "token-level shift"): 0.9,
    ("im_rm", "token-level shift"): 0.2,
    ("ex_rm", "domain shift"): 0.2,
    ("im_rm", "domain shift"): 1.2,
}
# When the simulated trainings began: a Unix time.
STARTED = 1_700_000_000.0
REVERSED = {
    ({"ex_rm": "im_rm", "im_rm": "ex_rm"}[kind], category): value
    for (kind, category), value in STRENGTHS.items()
}


def simulated_sweep(
    store: Store,
    *,
    name: str = "demo",
    models: Sequence[str] = ("llama-64", "qwen2-64"),
    rewards: Sequence[str] = ("ex_rm", "im_rm"),
    seeds: Sequence[int] = (0, 1, 2),
    train_sets: Sequence[str] = ("ultrafeedback",),
    sets: Sequence[tuple[str, str]] = ULTRAFEEDBACK,
    pairs: int = 120,
    strengths: Mapping[tuple[str, str], float] = STRENGTHS,
    missing: int = 0,
    unlearned: int = 0,
    steps: int = 30,
) -> Declaration:
    """Commit every trial but the last `missing`; the last `unlearned` of those are at chance in training.

    Each training's log holds `steps` steps.
    """
    trials = [
        _record(name, model, kind, train_set, seed, sets)
        for seed in seeds
        for model in models
        for train_set in train_sets
        for kind in rewards
    ]
    committed = trials[: len(trials) - missing]
    for number, trial in enumerate(committed):
        learned = number < len(committed) - unlearned
        _commit_train(store, trial, 1.0 if learned else 0.5, steps)
        for item in trial.evaluations:
            _commit(store, trial, item, pairs, strengths[trial.reward, item.category])
    return Declaration(sweep=name, trials=tuple(trials))


def _record(
    sweep: str, model: str, kind: str, train_set: str, seed: int, sets: Sequence[tuple[str, str]]
) -> TrialRecord:
    key = f"{sweep}-{model}-{kind}-{train_set}-{seed}"
    said = {"model": model, "reward": kind, "train_set": train_set, "seed": seed, "lr": 1e-6, "epochs": 5}
    return TrialRecord(
        name=f"{model} · {kind} · {train_set} · s{seed}",
        key=key,
        model=model,
        reward=kind,
        train_set=train_set,
        train_digest="d" * 64,
        seed=seed,
        parameters=said,
        evaluations=tuple(
            EvaluationRecord(dataset=name, key=f"{key}-{name}", category=category, dataset_digest=name)
            for name, category in sets
        ),
    )


def _commit_train(store: Store, trial: TrialRecord, accuracy: float, steps: int) -> None:
    noise = np.random.default_rng(list(trial.key.encode())).normal(size=steps)
    progress = np.arange(1, steps + 1) / steps
    margins = (1.0 if trial.reward == "ex_rm" else 0.4) * progress + 0.05 * noise
    log = pa.table(
        {
            "step": np.arange(1.0, steps + 1),
            "epoch": np.floor(5 * progress - 1e-9),
            "loss": np.log1p(np.exp(-3 * margins)),
            "accuracy": 0.5 + (accuracy - 0.5) * progress,
            "margin": margins,
            "grad_norm": 1.0 + 0.1 * np.abs(noise),
            "lr": np.full(steps, 1e-6),
            "time": STARTED + 2.0 * np.arange(steps),
        }
    )
    perf = {"tokens_per_s": 5000.0, "pairs_per_s": 10.0 + noise[0], "step_s": 2.0, "peak_mem_gb": 30.0}
    with store.write("train", trial.key) as attempt:
        parquet.write_table(log, attempt.directory / "log.parquet")
        laid = {"device": "cuda", "world_size": 8, "zero_stage": 2}
        attempt.info.update(
            pairs=100, train_accuracy=accuracy, perf={**perf, "set_up_s": 2.0}, placement=laid
        )


def _commit(store: Store, trial: TrialRecord, item: EvaluationRecord, pairs: int, strength: float) -> None:
    # A pair that is hard is hard for every model and seed.
    hard = np.random.default_rng(len(item.dataset)).normal(size=pairs)
    noise = np.random.default_rng(list(item.key.encode())).normal(size=pairs)
    margins = strength + 0.6 * hard + 0.8 * noise
    table = pa.table(
        {
            "dataset": [item.dataset] * pairs,
            "index": range(pairs),
            "chosen_reward": margins,
            "rejected_reward": np.zeros(pairs),
            "chosen_tokens": [3] * pairs,
            "rejected_tokens": [4] * pairs,
        }
    )
    with store.write("evaluate", item.key) as attempt:
        parquet.write_table(table, attempt.directory / "scores.parquet")
