"""One rank of a training whose peak memory is measured; started by `benchmarks.memory_model`, its Case as JSON.

A tiny training of the same architecture and placement comes first, so that imports, compiled kernels and the gang's
sockets are in the baseline; the peak is the resident memory's, less that baseline.
"""

import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainers.memory import forget_peak_memory, peak_memory_gb
from trainers.pairs import TokenPair
from trainers.rewards import RewardSpec
from trainers.specs import OptimSpec, Placement
from trainers.train import TrainInputs, train

STEPS = 2


def main() -> None:
    """Train twice, the small model and the measured one; rank by rank, the peak in GB goes into `out`."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    _train(given, given["small"], [8, 8, 8])
    gc.collect()
    forget_peak_memory()
    baseline = peak_memory_gb()
    _train(given, given["model"], given["pair"])
    peak = peak_memory_gb() - baseline
    file = Path(given["out"]) / f"rank{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps({"baseline": baseline, "peak": peak}))


def _train(given: dict[str, Any], model: str, lengths: list[int]) -> None:
    reward, placement = RewardSpec(**given["reward"]), Placement(**given["placement"])
    optim = OptimSpec(epochs=1, effective_batch=placement.effective_batch)
    pairs = random_pairs(placement.effective_batch * STEPS, lengths, given["vocabulary"])
    reference = {pair.index: (-100.0, -100.0) for pair in pairs} if reward.uses_reference else None
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainInputs(
                name="random",
                location=model,
                revision=None,
                precision="fp32",
                reward=reward,
                optim=optim,
                placement=placement,
                seed=0,
                pairs=pairs,
                reference=reference,
            ),
            report=lambda row: None,
            out_dir=Path(folder),
        )


def random_pairs(count: int, lengths: list[int], vocabulary: int) -> list[TokenPair]:
    """Pairs of random tokens, all of the same lengths."""
    draws = random.Random(0)
    parts = [[[draws.randrange(1, vocabulary) for _ in range(n)] for n in lengths] for _ in range(count)]
    return [
        TokenPair(index=number, prompt=prompt, chosen=chosen, rejected=rejected)
        for number, (prompt, chosen, rejected) in enumerate(parts)
    ]


def arguments(**values: Any) -> str:
    """What `main` is given, as one word."""
    plain = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        for name, value in values.items()
    }
    return json.dumps(plain)


if __name__ == "__main__":
    main()
