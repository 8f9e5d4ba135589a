"""Trained models as ordinary Hugging Face folders: safetensors, config, tokenizer with its template, model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trainers.disk import disk_named, require_room
from trainers.rewards import RewardSpec
from trainers.templates import padding_token


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter on the CPU, gathered where ZeRO-3 has partitioned it; tied ones once.

    A collective: every rank calls it, rank 0 gets them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with GatheredParameters(gathered, enabled=bool(gathered)):
            if torch.distributed.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def save_model(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, out_dir: Path, card: str = ""
) -> None:
    """Write the folder. Its pad token is one that no response ends in. Raises StorageError where there is no room."""
    need = sum(weight.numel() * weight.element_size() for weight in weights.values())
    require_room(out_dir, need)
    with disk_named(out_dir, need):
        _write_model(model, weights, tokenizer, out_dir, card)


def _write_model(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, out_dir: Path, card: str
) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    out_dir.mkdir(parents=True)
    pad_id = padding_token(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.padding_side = "right"
    model.config.architectures = [type(model).__name__]
    model.config.pad_token_id = pad_id
    if getattr(model, "_auto_class", None):
        # Code that the user trusts goes with the weights, which nothing else can load.
        custom_object_save(model, out_dir, config=model.config)
    model.config.save_pretrained(out_dir)
    if model.can_generate():
        model.generation_config.pad_token_id = pad_id
        model.generation_config.save_pretrained(out_dir)
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out_dir)
    if card:
        (out_dir / "README.md").write_text(card, encoding="utf-8")


def model_card(base: str, reward: RewardSpec, facts: Mapping[str, object]) -> str:
    """README.md of a trained model: what it is, how its reward is read, and what its training came to."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [reward-model, rmsweep]",
        "---",
        "",
        f"# {reward.name} on {base}",
        "",
        f"A reward model of type `{reward.name}`, trained by rmsweep. {reward.type.usage(reward)}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"
