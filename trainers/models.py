"""Language models from the hub, a local folder or a GGUF file, with the output layer that a reward type needs.

Only safetensors and GGUF weights are read, and no code from a model's folder is run.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trainers.errors import ModelError
from trainers.specs import Precision, RewardKind

HEAD_STD = 0.02
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(location: str, revision: str | None = None) -> Any:
    """The tokenizer at a hub id or folder. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer could be loaded from {location}: {_first_line(error)}") from error


def pad_token(tokenizer: Any) -> int:
    """An id to fill rows with; padding is masked everywhere, so any valid id does. Id 0 is a valid id."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def load_model(location: str, *, kind: RewardKind, precision: Precision, revision: str | None = None) -> Any:
    """A sequence classifier (ex_rm) or causal LM (im_rm), in evaluation mode on the CPU. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"num_labels": 1} if kind == "ex_rm" else {}
    loader = AutoModelForSequenceClassification if kind == "ex_rm" else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(location, revision=revision, **options)
        # Only eager attention applies Gemma 2's soft-capping; the fused kernels ignore it.
        softcapped = getattr(config, "attn_logit_softcapping", None) is not None
        model = loader.from_pretrained(
            location,
            config=config,
            revision=revision,
            dtype=_DTYPES[precision],
            attn_implementation="eager" if softcapped else "sdpa",
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"no model could be loaded from {location}: {_first_line(error)}") from error
    if kind == "ex_rm":
        model.score.__class__ = _WideLinear
    return model.eval()


class _WideLinear(nn.Linear):
    """A linear layer that multiplies in fp32 whatever precision its weight is kept in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        return nn.functional.linear(input.float(), self.weight.float())


def initialise_head(model: Any, seed: int) -> None:
    """Draw the EX-RM head anew from `seed`, the same at every world size (paper §3: std 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.score.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * HEAD_STD)


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


def save_model(model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, out_dir: Path) -> None:
    """Write an ordinary Hugging Face folder: safetensors, config, tokenizer and chat template."""
    out_dir.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token(tokenizer)
    model.config.save_pretrained(out_dir)
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out_dir)


def convert_gguf(file: Path, out_dir: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder in fp32. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{file} cannot be read as a GGUF model: {_first_line(error)}") from error
    # The config still says "quantised", which would make the folder unloadable.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    weights = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_model(model, weights, tokenizer, out_dir)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
