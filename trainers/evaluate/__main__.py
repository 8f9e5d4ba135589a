"""Score any reward model, or a policy with its reference, on any preference pairs.

python -m trainers.evaluate --model POLICY --reference BASE --reward im_rm --data DIR --split test --out scores.parquet
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from trainers.command import OnPairs, command, dump, make_folder, model_folder
from trainers.data.records import Pair, as_row
from trainers.errors import ModelError, SpecError
from trainers.evaluate.metrics import Rewards, controlled, ensemble
from trainers.evaluate.scores import write_scores
from trainers.evaluate.scoring import Report, compute_reference, score_pairs
from trainers.models.loading import device
from trainers.models.products import settle_products
from trainers.models.reward_parts import RewardModule
from trainers.pairs.packing import References
from trainers.pairs.templates import first_line
from trainers.pairs.tokens import TokenPair
from trainers.rewards import RewardSpec
from trainers.storage import replace


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnPairs):
    """Score a reward model, or a policy with its reference, on preference pairs."""

    model: tuple[str, ...]
    """Folder, GGUF file or hub id; the rewards of several (say, one for each seed) are averaged, and their spread is written."""
    out: Path
    """Parquet file to write scores to. Beside it, .json and .jsonl hold the results in RewardBench's format."""
    reference: str | None = None
    """The reference model of im_rm."""
    split: str = "test"
    """Split of a folder or hub set."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: a GPU where there is one)."""


def run_evaluate(arguments: Evaluate) -> None:
    """Score, write `out`, and print the metrics. Raises SweepError, and then leaves nothing half-written."""
    settle_products(arguments.precision)
    reward = arguments.reward_spec()
    if reward.uses_reference and arguments.reference is None:
        raise SpecError(f"{reward.name} needs --reference MODEL, or use --reward {reward.kind}_no_reference.")
    if arguments.reference is not None and not reward.uses_reference:
        raise SpecError(f"--reference is given, but {reward.name} uses none.")
    if not arguments.model or len({*arguments.model}) < len(arguments.model):
        raise SpecError("--model: name one model, or several different ones to average their rewards.")
    use_device(arguments.device or device())
    if arguments.out.is_dir() or arguments.out.suffix in ("", ".json", ".jsonl"):
        raise SpecError(f"--out {arguments.out}: name a file that ends in .parquet.")
    make_folder(arguments.out.parent)
    name, rows = arguments.read_pairs()
    if arguments.max_pairs is not None and rows[0].candidates:
        raise SpecError(f"--max-pairs: of a part of {name} there is no score; a suite is evaluated whole.")
    with Progress(console=Console(stderr=True)) as bars:
        known: list[tuple[list[TokenPair], References]] = []
        found = [_scored(arguments, model, reward, rows, bars, known) for model in arguments.model]
    shared = set[int].intersection(*(set(scores) for _, scores in found))
    pairs = [pair for pair in found[0][0] if pair.index in shared]
    every_MP2 = np.array([[scores[pair.index] for pair in pairs] for _, scores in found])
    if not pairs:
        raise SpecError(f"--model: no pair of {name} is read by all models; raise the limits of lengths.")
    together = ensemble(every_MP2[..., 0], every_MP2[..., 1]) if len(found) > 1 else None
    chosen, rejected = together[:2] if together else (every_MP2[0, :, 0], every_MP2[0, :, 1])
    draft = arguments.out.with_name(f"{arguments.out.name}.draft")
    places = [place for pair in pairs if (place := rows[pair.index].candidates)]
    metrics = write_scores(draft, name, pairs, chosen, rejected, places, together)
    draft.replace(arguments.out)
    _write_rewardbench(arguments, [rows[pair.index] for pair in pairs], chosen, rejected, metrics)
    longer = np.array([len(pair.scored[0]) - len(pair.scored[1]) for pair in pairs])
    print(dump({**metrics, **controlled(chosen, rejected, longer, None)}))


def _scored(
    arguments: Evaluate,
    called: str,
    reward: RewardSpec,
    rows: Sequence[Any],
    bars: Progress,
    known: list[tuple[list[TokenPair], References]],
) -> tuple[list[TokenPair], dict[int, tuple[float, float]]]:
    """Score with one model: return its pairs, and both rewards by the pair's index. `known` keeps references for the next."""
    with model_folder(called) as location:
        pairs = arguments.tokenize(rows, location, called)
        reference = next((sums for tokens, sums in known if tokens == pairs), None) or _reference(
            arguments, location, pairs, _follow(bars, "reference")
        )
        known += [(pairs, reference)] if reference else []
        model = arguments.load(location, reward.type.output, arguments.device or device())
        both = score_pairs(
            RewardModule(model, reward), pairs, reference=reference, report=_follow(bars, "scores")
        )
    return pairs, dict(zip((pair.index for pair in pairs), zip(*both, strict=True), strict=True))


def _write_rewardbench(
    arguments: Evaluate,
    rows: Sequence[Pair],
    chosen: Rewards,
    rejected: Rewards,
    metrics: Mapping[str, float],
) -> None:
    """Write what the rewardbench command writes: OUT.json with the results, OUT.jsonl with a line for each pair."""
    subsets = {
        name.removeprefix("suite/subset/"): value for name, value in metrics.items() if "/subset/" in name
    }
    called = ", ".join(arguments.model)
    results = {
        "accuracy": float(np.mean(chosen > rejected)),
        "num_prompts": len(rows),
        "model": called,
        "ref_model": arguments.reference,
        "tokenizer": called,
        "chat_template": "tokenizer",
        "extra_results": subsets or None,
    }
    replace(arguments.out.with_suffix(".json"), json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    lines = []
    for row, high, low in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
        asked = as_row(row)["prompt"]
        sides = {"chosen": row.responses[0], "rejected": row.responses[1]}
        line = {
            "prompt": row.prompt[-1].content,
            "results": int(high > low),
            "scores_chosen": high,
            "scores_rejected": low,
            **{
                f"text_{side}": [*asked, *(turn.as_dict() for turn in turns)] for side, turns in sides.items()
            },
        }
        if row.candidates:
            line |= {"id": row.candidates.item, "subset": row.candidates.subset}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    replace(arguments.out.with_suffix(".jsonl"), "".join(lines))


def use_device(name: str) -> None:
    """Make a device the current one, which kernels, masks and memory statistics use. Raises SpecError without it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"--device {name}: {first_line(error)}") from error
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)


def _reference(arguments: Evaluate, policy: str, pairs: list[TokenPair], report: Report) -> References | None:
    """Return the reference model's log-probabilities. Raises ModelError where it gives tokens other ids."""
    if arguments.reference is None:
        return None
    with model_folder(arguments.reference) as location:
        own, other = (arguments.tokenizer(at).get_vocab() for at in (policy, location))
        if own != other:
            raise ModelError(
                f"the reference {location} has another vocabulary ({len(other)} tokens) than the policy {policy} "
                f"({len(own)}); name the model that the policy was trained from."
            )
        return compute_reference(
            arguments.load(location, "unembedding", arguments.device or device()), pairs, report=report
        )


def _follow(bars: Progress, name: str) -> Report:
    """Return a report whose rows of {done, total} move a bar, which is shown from the first row on."""
    task = bars.add_task(name, visible=False)
    return lambda row: bars.update(task, completed=row["done"], total=row["total"], visible=True)


if __name__ == "__main__":
    command(Evaluate, run_evaluate, "trainers.evaluate")
