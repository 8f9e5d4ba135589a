"""One rank of the ZeRO test: trains every stage and reward type in one process, so that imports are paid once.

python -m torch.distributed.run --nproc-per-node 2 tests/trainers/zero_rank.py MODEL OUT
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from trainers.data import tiny_world
from trainers.models import load_model, load_tokenizer, pad_token
from trainers.pairs import TokenPair, tokenize_pairs
from trainers.reference import compute_reference
from trainers.specs import DrawSpec, OptimSpec, Placement, RewardSpec
from trainers.train import TrainInputs, train

OPTIM = OptimSpec(lr=1e-3, epochs=2, effective_batch=4)
REWARDS = (RewardSpec(kind="ex_rm"), RewardSpec(kind="im_rm", beta=0.1))
SEED = 3


def pairs_for(model: Path) -> list[TokenPair]:
    """Eleven pairs: two full steps an epoch and a short one of three."""
    pairs, _ = tokenize_pairs(tiny_world.pairs("train"), load_tokenizer(str(model)), DrawSpec(max_pairs=11))
    # Lengths 10:1 between pairs, so that ranks have uneven work.
    return [dataclasses.replace(pair, prompt=pair.prompt * (1 + 9 * (n % 2))) for n, pair in enumerate(pairs)]


def main(model: Path, out: Path) -> None:
    """Write {zero stage/reward: {losses, grad norms}} and the final models."""
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        # As Ray Train does: the launcher makes the group, and each training joins it.
        torch.distributed.init_process_group("gloo")
    pairs = pairs_for(model)
    tokenizer = load_tokenizer(str(model))
    policy = load_model(str(model), kind="im_rm", precision="fp32")
    reference = compute_reference(policy, pairs, pad_id=pad_token(tokenizer), report=lambda row: None)
    found = {}
    for zero_stage in range(4):
        for reward in REWARDS:
            folder = out / f"zero{zero_stage}-{reward.kind}"
            inputs = TrainInputs(
                location=str(model),
                revision=None,
                precision="fp32",
                reward=reward,
                optim=OPTIM,
                placement=Placement(
                    world_size=world_size, zero_stage=zero_stage, micro_batch=1, accumulation=4 // world_size
                ),
                seed=SEED,
                pairs=pairs,
                reference=reference if reward.kind == "im_rm" else None,
            )
            result = train(inputs, report=lambda row: None, out_dir=folder)
            found[f"zero{zero_stage}-{reward.kind}"] = {
                "loss": [row["loss"] for row in result.log],
                "grad_norm": [row["grad_norm"] for row in result.log],
            }
    if os.environ.get("RANK", "0") == "0":
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
