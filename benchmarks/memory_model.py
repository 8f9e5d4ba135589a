"""The memory model (orchestrator/plan/memory.py) against measurement: peak resident memory of trainings on a CPU.

    python -m benchmarks.memory_model

Random models of 60 to 150 million parameters are built from their configs; each configuration trains two steps in
fresh processes, one a rank, from loading the model to saving it. What is compared is the peak of resident memory above
that after a tiny training of the same architecture and placement, so that imports, compiled kernels and the gang's
sockets are in neither; of two ranks the larger. None of these configurations has set a constant of the
model: all of them are counted from the code that is run. Linux only; 15 minutes of two cores.
"""

import gc
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from orchestrator.plan.memory import PairTokens, Training, footprint
from trainers.models import architecture
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement

EX_RM, IM_RM = RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.01)
TOLERANCE = 0.2
AT_LEAST_GB = 1.0
_STEPS = 2
# By itself the C library keeps freed pieces of up to 32 MB for later: what is resident is then what was alive at
# different times. Told to give them back at once, what is resident is what is alive, which is what is predicted.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def _shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner}
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 4}
    return {**sizes, **counts, "tie_word_embeddings": True}


GEMMA = {"model_type": "gemma2", "head_dim": 80, "query_pre_attn_scalar": 80, "sliding_window": 128}
MODELS = {
    "llama": {"model_type": "llama", **_shape(16_000, 768, 2048, 12, 12)},
    "gemma2": {**GEMMA, **_shape(48_000, 640, 2560, 8, 8)},
}
_SMALL = {**_shape(64, 16, 32, 2, 4), "head_dim": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: `forwards` of `pairs` pairs on each rank; `lengths` are of prompt, chosen and rejected response."""

    model: str
    reward: RewardSpec
    lengths: tuple[int, int, int]
    pairs: int
    at: dict[str, Any] = field(default_factory=dict)
    forwards: int = 1

    @property
    def placement(self) -> Placement:
        """How it is laid out."""
        return Placement(forward_tokens=self.pairs * sum(self.lengths), **self.at)

    @property
    def batch(self) -> int:
        """Pairs of a step."""
        return self.pairs * self.forwards * self.placement.world_size

    @property
    def name(self) -> str:
        """What the table calls it."""
        at = self.placement
        recomputed = ", recomputed" if at.checkpointing else ""
        batch = f"{self.pairs} × {self.forwards} × {at.world_size}"
        return f"{self.model}, {self.reward.name}, ZeRO {at.zero_stage}, {batch}{recomputed}"


CASES = (
    Case("llama", EX_RM, (128, 256, 256), 2),
    Case("llama", IM_RM, (128, 256, 256), 2, forwards=2),
    Case("llama", EX_RM, (128, 256, 256), 2, {"zero_stage": 3, "world_size": 2}),
    Case("llama", IM_RM, (256, 256, 256), 4, {"zero_stage": 3, "checkpointing": True}),
    Case("gemma2", EX_RM, (256, 384, 384), 1),
    Case("gemma2", IM_RM, (256, 256, 256), 2, {"checkpointing": True}),
    Case("gemma2", EX_RM, (64, 320, 320), 2, {"zero_stage": 3}),
    Case("gemma2", IM_RM, (256, 256, 256), 1, {"zero_stage": 3, "world_size": 2, "checkpointing": True}),
)


def main(cases: tuple[int, ...] = tuple(range(len(CASES)))) -> None:
    """Print a table: a row for each configuration, with pairs × forwards × ranks."""
    print("| configuration | pair, tokens | measured, GB | predicted, GB | predicted / measured |")
    print("|---|---|---:|---:|---:|", flush=True)
    for number in cases:
        measured, predicted = measure(number), predict(CASES[number])
        lengths = " + ".join(map(str, CASES[number].lengths))
        cells = (CASES[number].name, lengths, f"{measured:.2f}", f"{predicted:.2f}")
        print("| " + " | ".join([*cells, f"{predicted / measured:.2f}"]) + " |", flush=True)


def predict(case: Case) -> float:
    """GB of a rank by the model."""
    shapes = architecture.of_config(MODELS[case.model])
    assert shapes is not None
    prompt, chosen, rejected = case.lengths
    training = Training(
        architecture=shapes,
        reward=case.reward,
        optim=OptimSpec(effective_batch=case.batch),
        precision="fp32",
        pair=PairTokens(prompt=prompt, chosen=chosen, rejected=rejected),
    )
    return footprint(training, case.placement).total


def measure(number: int) -> float:
    """GB that the larger rank's peak lies above its baseline."""
    from benchmarks.data import random_model

    case, environment = CASES[number], {**os.environ, **_ENVIRONMENT}
    config = MODELS[case.model]
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder) / "model", config)
        random_model(Path(folder) / "small", {**config, **_SMALL})
        launcher = [sys.executable]
        if (ranks := case.placement.world_size) > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = [*launcher, "-m", "benchmarks.memory_model", "rank", str(number), folder]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])
        return max(float(file.read_text()) for file in Path(folder).glob("rank*.peak"))


def rank(case: Case, folder: Path) -> None:
    """Be one rank: train the small model and the measured one, and write the peak above the first in GB."""
    import torch

    from trainers.models.memory import forget_peak_memory, peak_memory

    torch.set_num_threads(1)
    if case.placement.world_size > 1:
        torch.distributed.init_process_group("gloo")
    _train(case, folder / "small", (8, 8, 8))
    gc.collect()
    forget_peak_memory()
    baseline = peak_memory()["peak_mem_gb"]
    _train(case, folder / "model", case.lengths)
    file = folder / f"rank{os.environ.get('RANK', '0')}.peak"
    file.write_text(str(peak_memory()["peak_mem_gb"] - baseline))


def _train(case: Case, model: Path, lengths: tuple[int, int, int]) -> None:
    from trainers.pairs.tokens import TokenPair
    from trainers.train.inputs import TrainInputs
    from trainers.train.loop import train

    draws = random.Random(0)
    pairs = []
    for number in range(case.batch * _STEPS):
        prompt, chosen, rejected = (
            [draws.randrange(1, _SMALL["vocab_size"]) for _ in range(length)] for length in lengths
        )
        pairs.append(TokenPair(index=number, prompt=prompt, chosen=chosen, rejected=rejected))
    inputs = TrainInputs(
        name="random",
        location=str(model),
        precision="fp32",
        reward=case.reward,
        optim=OptimSpec(epochs=1, effective_batch=case.batch),
        placement=case.placement,
        seed=0,
        pairs=pairs,
        reference={pair.index: (-100.0, -100.0) for pair in pairs} if case.reward.uses_reference else None,
    )
    with tempfile.TemporaryDirectory() as out:
        train(inputs, report=lambda row: None, out_dir=Path(out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(CASES[int(sys.argv[2])], Path(sys.argv[3]))
    else:
        tyro.cli(main)
