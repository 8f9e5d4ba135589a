"""The contenders that a measurement compares: our trainer, the paper's recipe as one would write it, and TRL's trainers.

Each runs on the GPU where there is one.

Shapes: P pairs of a step, R = 2P rows (chosen rows first), T tokens of the longest row, V vocabulary.
"""

import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.turns import COMPILED, OURS, Job, Turns
from trainers.evaluate.scoring import compute_reference, score_pairs
from trainers.models.layouts import layout_of
from trainers.models.loading import DTYPES, device, initialise_head, load_model
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import collate
from trainers.pairs.templates import load_tokenizer
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement
from trainers.train.engine import make_engine, process_group
from trainers.train.inputs import TrainInputs
from trainers.train.loop import optimiser_step

BETA = 0.01
LEARNING_RATE = 1e-6
HEAD_SEED = 0
# Where a trained model is scored, its weights differ from the reference's: margins of 0 would compare nothing.
_TRAINED = 1.001


def contend(job: Job, turns: Turns) -> None:
    """Become the contender of that name, say `ready`, and run as the parent asks."""
    if job.contender.startswith("trl"):
        _train_trl(job, turns)
        return
    contender = (Ours if job.contender in (OURS, COMPILED) else Naive)(job)
    turns.ready(contender.model, contender.prepass_s)
    run = contender.step if job.task == "train" else contender.mean_margin
    with process_group():
        while True:
            value = run(turns.wait())
            turns.stop()
            turns.answer(value)


def _pretend_trained(model: Any) -> None:
    """Change the weights a little, the same way for every contender."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(_TRAINED)


class Ours:
    """`batch` pairs a step in one packed forward, as `trainers.train.loop` runs it; the reference is computed beforehand."""

    def __init__(self, job: Job) -> None:
        # Imported by the engine when it is needed; here, so that it is not counted as the model's memory.
        import deepspeed  # noqa: F401

        reward = RewardSpec(kind=job.kind, beta=BETA if job.kind == "im_rm" else None)
        model, pairs = job.drawn.model, job.drawn.pairs
        self.model = load_model(
            model,
            tokenizer=load_tokenizer(model),
            output=reward.type.output,
            precision=job.precision,
            head_seed=HEAD_SEED,
        ).to(device())
        began = time.perf_counter()
        reference = (
            compute_reference(self.model, pairs, report=lambda row: None) if reward.uses_reference else None
        )
        self.prepass_s = time.perf_counter() - began
        self._inputs = TrainInputs(
            name="benchmark",
            location=model,
            precision=job.precision,
            reward=reward,
            optim=OptimSpec(lr=LEARNING_RATE, effective_batch=job.batch),
            placement=Placement(
                forward_tokens=2 * sum(pair.tokens for pair in pairs), compile=job.contender == COMPILED
            ),
            seed=HEAD_SEED,
            pairs=pairs,
            reference=reference,
        )
        self._module, self._engine = RewardModule(self.model, reward), None
        self._position = {pair.index: position for position, pair in enumerate(pairs)}
        if job.task == "score":
            _pretend_trained(self.model)

    def step(self, pairs: Sequence[TokenPair]) -> float:
        """One optimiser step; its loss. The first makes the engine, in the process group that is there."""
        if self._engine is None:
            named = {name: getattr(self._inputs, name) for name in ("optim", "placement", "precision")}
            self._engine = make_engine(self._module, **named)
        positions = [self._position[pair.index] for pair in pairs]
        sums, _ = optimiser_step(self._engine, self._inputs, positions, layout_of(self.model), (0.0, 0.0))
        return sums[0] / len(pairs)

    def mean_margin(self, pairs: Sequence[TokenPair]) -> float:
        """Score the pairs; the mean margin."""
        chosen, rejected = score_pairs(
            self._module, pairs, reference=self._inputs.reference, report=lambda row: None
        )
        return float((chosen - rejected).mean())


def _plain_model(job: Job, kind: str) -> Any:
    """The model as transformers has it, with fused attention; every contender starts from these weights."""
    if job.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    options: dict[str, Any] = {"dtype": DTYPES[job.precision], "attn_implementation": "sdpa"}
    if kind == "im_rm":
        return AutoModelForCausalLM.from_pretrained(job.drawn.model, **options).to(device())
    model = AutoModelForSequenceClassification.from_pretrained(job.drawn.model, num_labels=1, **options)
    model.config.pad_token_id = model.config.pad_token_id or 0
    initialise_head(model, HEAD_SEED)
    return model.to(device())


class Naive:
    """Padded rows, whole-vocabulary logits, a reference model in memory: `batch` pairs a forward, in the order given.

    In bf16 the weights themselves are bf16, as where a script loads the model so and trains it.
    """

    # The reference runs with every batch, so nothing is done beforehand.
    prepass_s = 0.0

    def __init__(self, job: Job) -> None:
        self._batch = job.batch
        self.model = _plain_model(job, job.kind)
        self._pad_id = self.model.config.pad_token_id or 0
        self._reference = None
        if job.kind == "im_rm":
            self._reference = _plain_model(job, "im_rm").eval().requires_grad_(False)
        if job.task == "train":
            self.model.train()
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        else:
            self.model.eval()
            _pretend_trained(self.model)

    def _margins(self, pairs: Sequence[TokenPair]) -> Tensor:
        batch = collate(pairs, layout="rows", pad_id=self._pad_id, device=device())

        def outputs(model: Any) -> Tensor:
            ids_RT, mask_RT = batch.input_ids_BT, batch.attention_mask_BT
            return model(input_ids=ids_RT, attention_mask=mask_RT, use_cache=False).logits

        def log_prob_sums(model: Any) -> Tensor:
            log_probs_NV = torch.log_softmax(outputs(model).float(), dim=-1).flatten(0, 1)
            log_prob_M = log_probs_NV[batch.predictor_M, batch.target_M]
            return log_prob_M.new_zeros(2 * len(pairs)).index_add(0, batch.owner_M, log_prob_M)

        if self._reference is None:
            reward_R = outputs(self.model).squeeze(1).float()
        else:
            with torch.no_grad():
                reference_R = log_prob_sums(self._reference)
            reward_R = BETA * (log_prob_sums(self.model) - reference_R)
        chosen_P, rejected_P = reward_R.chunk(2)
        return chosen_P - rejected_P

    def step(self, pairs: Sequence[TokenPair]) -> float:
        """One optimiser step; its loss."""
        loss = -F.logsigmoid(self._margins(pairs)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def mean_margin(self, pairs: Sequence[TokenPair]) -> float:
        """Score the pairs; the mean margin."""
        groups = [pairs[start : start + self._batch] for start in range(0, len(pairs), self._batch)]
        with torch.no_grad():
            return float(torch.cat([self._margins(group) for group in groups]).mean())


def _train_trl(job: Job, turns: Turns) -> None:
    """TRL's RewardTrainer or DPOTrainer, driven by its own `.train()`, one optimiser step a turn.

    `trl[:PAIRSxFORWARDS][+precomputed]`: pairs in a forward × forwards in a step, and for DPO whether the reference's
    log-probs are computed before training. As TRL would run, but: in the precision of the job (on a CPU its default bf16 is
    no gain), no gradient checkpointing (its default costs a second forward), no clipping (the paper has none), nothing cut
    to a maximal length, pairs in the order drawn. TRL collates a step's pairs before the turn begins, untimed.
    `padding_free` is no option: DPOTrainer 1.16.0 warns that it is unavailable and pads; RewardTrainer has none.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    class TimedDPOTrainer(DPOTrainer):
        prepass_s = 0.0

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments, **options)
            self.prepass_s = time.perf_counter() - began
            return dataset

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            # The loss is told after the step; TRL's closing summary has none.
            if "loss" in logs:
                turns.answer(logs["loss"])

    found = re.fullmatch(r"trl(?::(\d+)x(\d+))?(\+precomputed)?", job.contender)
    if not found or int(found[1] or job.batch) * int(found[2] or 1) != job.batch:
        raise ValueError(
            f"{job.contender} is not trl, or trl:PAIRSxFORWARDS of {job.batch} pairs, or one with +precomputed."
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": int(found[1] or job.batch),
            "gradient_accumulation_steps": int(found[2] or 1),
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
        model = _plain_model(job, job.kind)
        common = {
            "model": model,
            "train_dataset": Dataset.from_list([_chat_row(record) for record in job.drawn.records]),
            "processing_class": AutoTokenizer.from_pretrained(job.drawn.model),
        }
        if job.kind == "ex_rm":
            trainer = RewardTrainer(args=RewardConfig(**settings), **common)
        else:
            own = {"beta": BETA, "precompute_ref_log_probs": bool(found[3])}
            trainer = TimedDPOTrainer(args=DPOConfig(**settings, **own), **common)
        for row, pair in zip(trainer.train_dataset, job.drawn.pairs, strict=True):
            prompt = row.get("prompt_ids", [])
            expected = ([] if prompt else pair.prompt) + pair.chosen
            if prompt not in ([], pair.prompt) or row["chosen_ids"] != expected:
                raise ValueError(f"TRL tokenises the pair of row {pair.index} differently.")
        trainer.add_callback(InTurns())
        turns.ready(model, getattr(trainer, "prepass_s", 0.0))
        trainer.train()


def _chat_row(record: Any) -> dict[str, Any]:
    """A record as TRL wants it: prompt, chosen and rejected as chat messages."""
    sides = {side: getattr(record, side) for side in ("chosen", "rejected")}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": [message.as_dict() for message in record.prompt], **answers}
