"""`python -m trainers.train`: one training without Ray, in one process or under torchrun or the deepspeed launcher."""

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch.distributed as dist
from pyarrow import parquet

from trainers.command import OnPairs, command, dump, make_folder, model_folder
from trainers.errors import SpecError
from trainers.evaluate.scoring import compute_reference
from trainers.models.adapters import linear_names
from trainers.models.architecture import without_weights
from trainers.models.hub import open_repository, push, require_base_on_hub
from trainers.models.loading import device
from trainers.models.products import settle_products
from trainers.pairs.packing import References
from trainers.pairs.templates import given_template
from trainers.pairs.tokens import TokenPair
from trainers.rewards.losses import require_columns
from trainers.specs import LoraSpec, Loss, LossSpec, OptimSpec, Placement
from trainers.train.checkpoints import Checkpoints, together
from trainers.train.engine import import_deepspeed, process_group
from trainers.train.inputs import TrainInputs
from trainers.train.loop import train
from trainers.train.stopping import GRACE_S, StopRequest

_ALPHA = LoraSpec(rank=1).alpha


@dataclass(frozen=True, kw_only=True)
class Train(OnPairs):
    """Train a reward model, on the ranks of the launcher. Run again, it resumes from its last checkpoint."""

    model: str
    out: Path
    """Folder for model/, log.parquet and, during training, checkpoints/."""
    split: str = "train"
    """Split of a folder or hub set."""
    optim: OptimSpec = field(default_factory=OptimSpec)
    loss: Loss = "bradley_terry"
    """Loss of a pair, a function of the difference of its rewards."""
    margin: float = 0.0
    """The difference of rewards must exceed this times the pair's own margin, a column of the data."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    centring: float = 0.0
    """Add this times the squared sum of a pair's two rewards to its loss."""
    consistency: float = 0.0
    """Add this times the squared differences between rewards of a pair and of its rewriting (columns rewritten_chosen, rewritten_rejected)."""
    ties: bool = False
    """Also train on answers of equal rating, with a label of ½."""
    lora_rank: int = 0
    """Rank of a low-rank adapter, trained instead of the backbone's weights; 0: none."""
    lora_alpha: float = _ALPHA
    """Scale the adapter's update by this divided by its rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as q_proj v_proj (default: all of the backbone)."""
    merge: bool = False
    """Save the whole model with the adapter merged into its weights."""
    push: str | None = None
    """Push the finished model to ORG/NAME on the hub, a private repository unless --public is given."""
    public: bool = False
    """Make the repository of --push public."""
    zero_stage: int = 0
    """ZeRO stage of DeepSpeed."""
    forward_tokens: int = 4096
    """Most tokens of a forward: a step is split into as few forwards as possible; a longer pair gets one of its own."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory."""
    compile: bool = False
    """Compile the model's layers around their attention: takes minutes at the first step, speeds up later ones."""
    checkpoint_steps: int | None = None
    """Optimiser steps between checkpoints (default: by time, every ten minutes or ten times the duration of a write)."""
    grace_s: float = GRACE_S
    """Seconds for a last checkpoint after SIGINT or SIGTERM."""
    # Also in the environment.
    local_rank: int = 0
    """Given by the deepspeed launcher."""


def run(arguments: Train) -> None:
    """Train, and put the finished model into `out`. Raises SweepError."""
    world_size, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    final, draft = arguments.out / "model", arguments.out / "draft"
    if final.exists():
        raise SpecError(f"{final} is there already; give another --out.")
    settle_products(arguments.precision)
    reward, optim = arguments.reward_spec(), arguments.optim
    for name, by in OptimSpec.READ_BY.items():
        if getattr(optim, name) != getattr(OptimSpec(), name) and optim.optimizer not in by:
            raise SpecError(f"--{name}: {optim.optimizer} has none; give --optimizer {' or '.join(by)}, too.")
    placed = ("zero_stage", "forward_tokens", "checkpointing", "offload_optimizer", "compile")
    placement = Placement(world_size=world_size, **{name: getattr(arguments, name) for name in placed})
    more = ("margin", "label_smoothing", "centring", "consistency")
    loss = LossSpec(kind=arguments.loss, **{name: getattr(arguments, name) for name in more})
    reward.type.require_takes(loss, ties=arguments.ties)
    lora = _lora(arguments)
    if arguments.public and arguments.push is None:
        raise SpecError("--public makes the repository of --push public; give --push ORG/NAME, too.")
    if arguments.push is not None and lora and not arguments.merge:
        require_base_on_hub(arguments.model)
    name, rows = arguments.read_pairs(ties=arguments.ties)
    require_columns(
        loss,
        f"data set {name}",
        len(rows),
        without_margin=sum(row.margin is None for row in rows),
        without_rewriting=sum(row.rewritten is None for row in rows),
    )
    if arguments.push is not None and first:
        open_repository(arguments.push, public=arguments.public)
    make_folder(arguments.out)
    checkpoints = Checkpoints(folder=arguments.out / "checkpoints", every_steps=arguments.checkpoint_steps)
    request = StopRequest(arguments.grace_s)
    # DeepSpeed prints to stdout, which is for the result.
    with redirect_stdout(sys.stderr):
        import_deepspeed()
    with model_folder(arguments.model) as location, redirect_stdout(sys.stderr), process_group():
        converted = location not in (arguments.model, str(Path(arguments.model).expanduser()))
        if converted and lora and not arguments.merge:
            raise SpecError(
                f"--model {arguments.model} is a GGUF file, which an adapter cannot name as its base; give --merge, too."
            )
        if lora and not arguments.trust_remote_code:
            lora.require_layers(f"--model {arguments.model}", linear_names(without_weights(location)))
        pairs = arguments.tokenize(rows, location, arguments.model)
        inputs = TrainInputs(
            name=Path(arguments.model).absolute().name,
            location=location,
            precision=arguments.precision,
            reward=reward,
            optim=optim,
            placement=placement,
            seed=arguments.seed,
            pairs=pairs,
            reference=_reference(arguments, location, pairs) if reward.uses_reference else None,
            trust=arguments.trust,
            loss=loss,
            lora=lora,
            merge=arguments.merge,
            template=given_template(arguments.template),
            dataset=name,
        )
        if first:
            shutil.rmtree(draft, ignore_errors=True)
        with request.listening(), request.deferred():
            result = train(
                inputs, report=_say_step, out_dir=draft, checkpoints=checkpoints, stop=request.left_s
            )
    if first:
        parquet.write_table(pa.Table.from_pylist(result.log), arguments.out / "log.parquet")
        (draft / "model").rename(final)
        draft.rmdir()
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        print(dump({"train_accuracy": result.train_accuracy, **result.perf}))
        if arguments.push is not None:
            print(f"pushed to {push(final, arguments.push)}", file=sys.stderr)


def _lora(arguments: Train) -> LoraSpec | None:
    if arguments.lora_rank:
        lora = LoraSpec(rank=arguments.lora_rank, alpha=arguments.lora_alpha, targets=arguments.lora_targets)
        lora.require_alone(arguments.optim)
        return lora
    if arguments.merge or arguments.lora_targets or arguments.lora_alpha != _ALPHA:
        raise SpecError("--merge, --lora-targets and --lora-alpha need an adapter; give --lora-rank, too.")
    return None


def _reference(arguments: Train, location: str, pairs: Sequence[TokenPair]) -> References:
    """Return the base model's log-prob sums; each rank computes a share."""
    model = arguments.load(location, "unembedding", device())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = together(lambda: compute_reference(model, pairs[rank::world_size], report=lambda row: None))
    return {index: sums for share in shares for index, sums in share.items()}


def _say_step(row: dict[str, Any]) -> None:
    said = row.get("notice", f"checkpoint at step {row.get('checkpoint')}")
    if "step" in row:
        said = (
            f"step {row['step']:.0f}/{row['total']}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
            f"margin {row['margin']:+.4f}  {row['step_s']:.1f} s"
        )
    print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command(Train, run, "trainers.train")
