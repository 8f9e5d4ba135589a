"""TRL's RewardTrainer and DPOTrainer, driven by their own `.train()`, one optimiser step a turn.

A contender is named `trl[:PAIRSxFORWARDS][+precomputed]`: pairs in a forward × forwards in a step, and for DPO
whether the reference's log-probs are computed before training. As TRL would run, but: in the precision of the job (on a CPU its
default bf16 is no gain), no gradient checkpointing (its default costs a second forward), no clipping (the paper has none), nothing
cut to a maximal length, pairs in the order drawn. TRL collates a step's pairs before the turn begins, untimed.
`padding_free` is no option: DPOTrainer 1.16.0 warns that it is unavailable and pads; RewardTrainer has none.
"""

import re
import time
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from benchmarks.data import Drawn, chat_rows, parameter_bytes
from benchmarks.naive import load_policy
from benchmarks.turns import BETA, LEARNING_RATE, Job, Turns, resident_bytes


class Variant(NamedTuple):
    """How TRL lays out a step."""

    pairs: int
    forwards: int
    precomputed: bool


def variant_of(contender: str, batch: int) -> Variant:
    """The variant that a contender's name asks for. Raises ValueError."""
    found = re.fullmatch(r"trl(?::(\d+)x(\d+))?(\+precomputed)?", contender)
    if not found:
        raise ValueError(f"{contender} is not trl, trl:2x2, trl:1x4 or one of them with +precomputed.")
    variant = Variant(int(found[1] or batch), int(found[2] or 1), bool(found[3]))
    if variant.pairs * variant.forwards != batch:
        raise ValueError(f"{contender}: a step has {batch} pairs.")
    return variant


def _settings(job: Job, variant: Variant) -> dict[str, Any]:
    return {
        "output_dir": f"{job.folder}/trl",
        "per_device_train_batch_size": variant.pairs,
        "gradient_accumulation_steps": variant.forwards,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": job.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class _TimedDPOTrainer(DPOTrainer):
    """DPOTrainer that also says how long its pass over the reference took."""

    prepass_seconds = 0.0

    def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments, **options)
        self.prepass_seconds = time.perf_counter() - began
        return dataset


class _InTurns(TrainerCallback):
    """Holds the trainer before each optimiser step until the parent says go."""

    def __init__(self, turns: Turns, drawn: Drawn, batch: int) -> None:
        self._turns, self._batch = turns, batch
        self._pairs = drawn.pairs
        self._step = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn."""
        self._step = self._turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimiser has stepped: stop the clock."""
        self._turns.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Answer with the loss, which TRL tells after the step; its closing summary has none."""
        if "loss" in logs:
            start = self._step * self._batch
            self._turns.answer(self._pairs[start : start + self._batch], logs["loss"])


def _trainer(job: Job, drawn: Drawn, variant: Variant, policy: Any) -> Any:
    common = {
        "model": policy,
        "train_dataset": Dataset.from_list(chat_rows(drawn.records)),
        "processing_class": AutoTokenizer.from_pretrained(job.model),
    }
    settings = _settings(job, variant)
    if job.kind == "ex_rm":
        return RewardTrainer(args=RewardConfig(**settings), **common)
    settings |= {"beta": BETA, "precompute_ref_log_probs": variant.precomputed}
    return _TimedDPOTrainer(args=DPOConfig(**settings), **common)


def _same_tokens(trainer: Any, drawn: Drawn) -> None:
    """Raise unless TRL tokenised the pairs as we did: else the contenders would do different work."""
    for row, pair in zip(trainer.train_dataset, drawn.pairs, strict=True):
        prompt = row.get("prompt_ids", [])
        expected = ([] if prompt else pair.prompt) + pair.chosen
        if prompt not in ([], pair.prompt) or row["chosen_ids"] != expected:
            raise ValueError(f"TRL tokenises the pair of row {pair.index} differently.")


def train_in_turns(job: Job, drawn: Drawn, turns: Turns) -> None:
    """Build the trainer, say `ready`, and train; the callback gives and takes the turns."""
    variant = variant_of(job.contender, job.batch)
    before = resident_bytes()
    policy = load_policy(job.model, job.kind, job.precision)
    trainer = _trainer(job, drawn, variant, policy)
    _same_tokens(trainer, drawn)
    trainer.add_callback(_InTurns(turns, drawn, job.batch))
    turns.tell(
        prepass_seconds=getattr(trainer, "prepass_seconds", 0.0),
        parameter_bytes=parameter_bytes(policy),
        resident_before_model=before,
    )
    trainer.train()
