"""The memory model (orchestrator/plan/memory.py) against measurement: peak resident memory of trainings on a CPU.

    python -m benchmarks.memory_model

Random models of 60 to 150 million parameters are built from their configs; each configuration trains two steps in
fresh processes, one a rank, from loading the model to saving it. Peak resident memory less that after imports and a
tiny training is what is compared, the larger of two ranks. None of these configurations has set a constant of the
model: all of them are counted from the code that is run. Linux only; 15 minutes of two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.memory_model_rank import arguments
from orchestrator.plan.memory import PairTokens, Training, footprint
from trainers import architecture
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement

EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.01)
TOLERANCE = 0.2
# By itself the C library keeps freed pieces of up to 32 MB for later: what is resident is then what was alive at
# different times. Told to give them back at once, what is resident is what is alive, which is what is predicted.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
AT_LEAST_GB = 1.0

LLAMA = {
    "model_type": "llama",
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
GEMMA = {
    "model_type": "gemma2",
    "vocab_size": 48_000,
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 80,
    "query_pre_attn_scalar": 80,
    "sliding_window": 128,
    "tie_word_embeddings": True,
}
MODELS = {"llama": LLAMA, "gemma2": GEMMA}
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
_SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration."""

    model: str
    reward: RewardSpec
    placement: Placement
    pair: PairTokens

    @property
    def name(self) -> str:
        """For the table."""
        at = self.placement
        recomputed = ", recomputed" if at.checkpointing else ""
        ranks = f"{at.world_size} rank{'s' if at.world_size > 1 else ''}"
        batch = f"{at.micro_batch} × {at.accumulation} × {at.world_size}"
        return f"{self.model}, {self.reward.name}, ZeRO {at.zero_stage}, {ranks}, {batch}{recomputed}"


def _case(
    model: str, reward: RewardSpec, micro_batch: int, *lengths: int, accumulation: int = 1, **at: Any
) -> Case:
    placement = Placement(micro_batch=micro_batch, accumulation=accumulation, **at)
    return Case(
        model=model,
        reward=reward,
        placement=placement,
        pair=PairTokens(prompt=lengths[0], chosen=lengths[1], rejected=lengths[2]),
    )


CASES = (
    _case("llama", EX_RM, 2, 128, 256, 256),
    _case("llama", IM_RM, 2, 128, 256, 256, accumulation=2),
    _case("llama", EX_RM, 2, 128, 256, 256, zero_stage=3, world_size=2),
    _case("llama", IM_RM, 4, 256, 256, 256, zero_stage=3, world_size=1, checkpointing=True),
    _case("gemma2", EX_RM, 1, 256, 384, 384),
    _case("gemma2", IM_RM, 2, 256, 256, 256, checkpointing=True),
    _case("gemma2", EX_RM, 2, 64, 320, 320, zero_stage=3, world_size=1),
    _case("gemma2", IM_RM, 1, 256, 256, 256, zero_stage=3, world_size=2, checkpointing=True),
)


def main(cases: tuple[int, ...] = tuple(range(len(CASES)))) -> None:
    """Print a table: a row for each configuration."""
    print("| configuration | pair, tokens | measured, GB | predicted, GB | predicted / measured |")
    print("|---|---|---:|---:|---:|", flush=True)
    for number in cases:
        case = CASES[number]
        measured, predicted = measure(case, MODELS[case.model]), predict(case, MODELS[case.model])
        lengths = f"{case.pair.prompt} + {case.pair.chosen} + {case.pair.rejected}"
        cells = (case.name, lengths, f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def training(case: Case, config: dict[str, Any]) -> Training:
    """The configuration as the memory model takes it."""
    shapes = architecture.of_config(config)
    assert shapes is not None
    optim = OptimSpec(effective_batch=case.placement.effective_batch)
    return Training(architecture=shapes, reward=case.reward, optim=optim, precision="fp32", pair=case.pair)


def predict(case: Case, config: dict[str, Any]) -> float:
    """GB of a rank by the model."""
    return footprint(training(case, config), case.placement).total


def measure(case: Case, config: dict[str, Any]) -> float:
    """GB that the larger rank's peak lies above its baseline."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _build({"model": config, "small": {**config, **_SMALL, **_SMALL_HEADS}}, out)
        word = arguments(
            model=str(out / "model"),
            small=str(out / "small"),
            vocabulary=_SMALL_HEADS["vocab_size"],
            reward=case.reward,
            placement=case.placement,
            pair=[case.pair.prompt, case.pair.chosen, case.pair.rejected],
            out=str(out),
        )
        launcher = [sys.executable]
        if case.placement.world_size > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={case.placement.world_size}"]
        done = subprocess.run(
            [*launcher, "-m", "benchmarks.memory_model_rank", word],
            capture_output=True,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])
        return max(json.loads(file.read_text())["peak"] for file in out.glob("rank*.json"))


def _build(configs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Random models with those configs, built by a process that is gone when they are measured."""
    subprocess.run(
        [sys.executable, "-c", _BUILD, json.dumps(configs), str(folder)], check=True, capture_output=True
    )


_BUILD = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from trainers.tiny import build_tokenizer
torch.manual_seed(0)
for name, config in json.loads(sys.argv[1]).items():
    made = AutoConfig.for_model(config.pop("model_type"), pad_token_id=0, **config)
    folder = f"{sys.argv[2]}/{name}"
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
"""


if __name__ == "__main__":
    tyro.cli(main)
