"""Scoring: a reward model on preference pairs, one reward per response.

    python -m trainers.evaluate --model MODEL --reward ex_rm --data test.jsonl --out scores.parquet
    python -m trainers.evaluate --model POLICY --reference BASE --reward im_rm --data DIR --split test --out scores.parquet

Any reward model (or policy with its reference) on any preference data; the metrics stand in the file's metadata.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.batching import scoring_groups
from trainers.command import (
    command,
    dump,
    model_folder,
    named_reward,
    read_named_pairs,
    say_counts,
)
from trainers.errors import ModelError, SpecError
from trainers.layouts import layout_of
from trainers.memory import memory_named
from trainers.metrics import Rewards, controlled
from trainers.models import device, load_model
from trainers.packing import MicroBatch, References, collate
from trainers.pairs import TokenPair, tokenize_pairs
from trainers.rewards import Output
from trainers.ropes import shared_tokens
from trainers.scores import write_scores
from trainers.scoring import RewardModule
from trainers.specs import UNTRUSTED, DrawSpec, Precision, Trust
from trainers.templates import first_line, load_tokenizer

Report = Callable[[dict[str, Any]], None]


def scoring_batches(
    model: Any, pairs: Sequence[TokenPair], reference: References | None = None
) -> Iterator[MicroBatch]:
    """Micro-batches on the model's device, longest pairs first."""
    shared_length = shared_tokens(model)
    for group in scoring_groups(pairs):
        yield collate(
            group,
            layout=layout_of(model),
            shared_tokens=shared_length,
            reference=reference,
            device=str(model.device),
        )


def score_pairs(
    reward: RewardModule, pairs: Sequence[TokenPair], *, reference: References | None, report: Report
) -> tuple[Rewards, Rewards]:
    """Rewards of (chosen, rejected) responses in the order of `pairs`, float64."""
    scores: dict[int, tuple[float, float]] = {}
    reward.eval()
    for batch in scoring_batches(reward.model, pairs, reference):
        with torch.inference_mode(), memory_named(f"{batch.tokens} tokens do not fit in memory for scoring."):
            found = reward(batch)
        both = zip(found.chosen_P.tolist(), found.rejected_P.tolist(), strict=True)
        scores.update(zip(batch.indices, both, strict=True))
        report({"done": len(scores), "total": len(pairs)})
    in_order = np.array([scores[pair.index] for pair in pairs], dtype=np.float64)
    return in_order[:, 0], in_order[:, 1]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a reward model, or a policy with its reference, on preference pairs."""

    model: str
    """Folder, GGUF file or hub id."""
    reward: str
    """ex_rm, im_rm, ex_grm, or an ablation: ex_rm_mean, im_rm_no_reference."""
    data: str
    """File, folder, built-in set or hub id of prompt, chosen, rejected."""
    out: Path
    """Where scores are written, as parquet."""
    reference: str | None = None
    """The reference model of im_rm."""
    beta: float | None = None
    """β of im_rm (default 0.01)."""
    split: str = "test"
    """Split of a folder or hub set."""
    max_pairs: int | None = None
    """Score the first N of a seeded permutation."""
    seed: int = 0
    """Of that permutation."""
    max_prompt_tokens: int = 1024
    """Pairs with a longer prompt are left out and counted, never cut."""
    max_response_tokens: int = 1024
    """Pairs with a longer response are left out and counted, never cut."""
    precision: Precision = "fp32"
    """Of the weights; heads and log-probabilities are fp32 in any case."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: a GPU where there is one)."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Danger: a pickle can run any code of its author."""
    trust_remote_code: bool = False
    """Run the Python files of a model's folder. Danger: any code of its author runs with your rights."""

    @property
    def trust(self) -> Trust:
        """The two flags as one value."""
        return Trust(allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)


def run_evaluate(arguments: Evaluate) -> None:
    """Score, write `out`, and print the metrics. Raises SweepError; nothing half-written is left."""
    reward = named_reward(arguments.reward, arguments.beta)
    if reward.uses_reference and arguments.reference is None:
        raise SpecError(f"{reward.name} needs --reference MODEL, or use --reward {reward.kind}_no_reference.")
    if arguments.reference is not None and not reward.uses_reference:
        raise SpecError(f"--reference is given, but {reward.name} uses none.")
    _require_device(arguments.device)
    if arguments.out.is_dir():
        raise SpecError(f"--out {arguments.out} is a folder; name a file in it.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    limits = DrawSpec(
        max_pairs=arguments.max_pairs,
        seed=arguments.seed,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_response_tokens,
    )
    name, rows = read_named_pairs(arguments.data, arguments.split)
    with model_folder(arguments.model) as location, progress() as track:
        pairs, counts = tokenize_pairs(
            rows, load_tokenizer(location, trust=arguments.trust), limits, reward.type.rendering
        )
        say_counts(counts, len(pairs), limits, arguments.model)
        reference = _reference(arguments, location, pairs, track("reference"))
        model = _load(arguments, location, reward.type.output)
        chosen, rejected = score_pairs(
            RewardModule(model, reward), pairs, reference=reference, report=track("scores")
        )
    draft = arguments.out.with_name(f"{arguments.out.name}.draft")
    metrics = write_scores(draft, name, pairs, chosen, rejected)
    draft.replace(arguments.out)
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    print(dump({**metrics, **controlled(chosen, rejected, longer, None)}))


def _require_device(name: str | None) -> None:
    try:
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"--device {name}: {first_line(error)}") from error


def _load(arguments: Evaluate, location: str, output: Output) -> Any:
    model = load_model(
        location,
        tokenizer=load_tokenizer(location, trust=arguments.trust),
        output=output,
        precision=arguments.precision,
        trust=arguments.trust,
    )
    return model.to(arguments.device or device())


def _reference(
    arguments: Evaluate, policy: str, pairs: Sequence[TokenPair], report: Report
) -> References | None:
    from trainers.reference import compute_reference

    if arguments.reference is None:
        return None
    with model_folder(arguments.reference) as location:
        require_same_vocabulary(policy, location, arguments.trust)
        return compute_reference(_load(arguments, location, "unembedding"), pairs, report=report)


def require_same_vocabulary(policy: str, reference: str, trust: Trust = UNTRUSTED) -> None:
    """Raise ModelError where the two give different ids to the same tokens."""
    vocabularies = [load_tokenizer(location, trust=trust).get_vocab() for location in (policy, reference)]
    if vocabularies[0] != vocabularies[1]:
        sizes = [len(vocabulary) for vocabulary in vocabularies]
        raise ModelError(
            f"the reference {reference} has another vocabulary ({sizes[1]} tokens) than the policy {policy} "
            f"({sizes[0]}); name the model that the policy was trained from."
        )


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], Report]]:
    """Progress bars on stderr: what is given a name reports {done, total}."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:

        def track(name: str) -> Report:
            tasks: list[Any] = []

            def report(row: dict[str, Any]) -> None:
                if not tasks:
                    tasks.append(bars.add_task(name, total=row["total"]))
                bars.update(tasks[0], completed=row["done"])

            return report

        yield track


if __name__ == "__main__":
    command(Evaluate, run_evaluate, "trainers.evaluate")
