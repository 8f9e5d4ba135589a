"""The sizes of a language model that decide its memory and compute, from config.json alone if possible.

    python -m trainers.models.architecture MODEL      the same as JSON, for any architecture, from the meta device

A formula counts the parameters of `FAMILIES`; a test compares it with the meta device. Other models are built on the
meta device in a process of its own, since planning imports no torch. No weights are read or downloaded.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.errors import ModelError
from trainers.specs import Output

_GATED = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
# Family → names of its linear layers, without the unembedding.
LINEAR_LAYERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma2"), _GATED),
    "gpt_neox": ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
}
FAMILIES = tuple(LINEAR_LAYERS)
_META_TIMEOUT_S = 120
# CUDA context, NCCL's buffers, FlexAttention's workspace; fragmentation. Only a GPU shows them: unmeasured.
UNMEASURED_GB, UNMEASURED_SHARE = 2.0, 0.08
# trainers/models/unembedding.py: elements of a block of logits on a GPU. trainers/pairs/packing.py: tokens of a forward.
LOGITS_BLOCK, SCORED_TOKENS = 1 << 24, 4096
# Answers that a policy draws and that are kept as one piece until all are drawn. The answers depend on this number.
ANSWERS_AT_ONCE = 256
_NAMES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a causal language model; `parameters` includes its unembedding, and counts tied matrices once.

    `intermediate` is the width of the feed-forward layer, `head_width` that of one attention head. `asked_layers` are
    the linear layers of a family that is not in FAMILIES.
    """

    family: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    asked_layers: tuple[str, ...] = ()

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The names of the layers that can take an adapter."""
        return LINEAR_LAYERS.get(self.family, self.asked_layers)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate beside its first matrix."""
        return self.family != "gpt_neox"

    @property
    def softcapped(self) -> bool:
        """Whether attention scores are soft-capped, which no fused CPU kernel supports."""
        return self.family == "gemma2"

    def trained(self, output: Output) -> int:
        """Return the number of parameters with that output layer."""
        if output == "unembedding":
            return self.parameters
        unembedding = 0 if self.tied or output == "both" else self.vocabulary * self.hidden
        return self.parameters - unembedding + self.hidden


def scoring_gb(
    held: float, hidden: int, intermediate: int, width: int, tokens: float = SCORED_TOKENS
) -> float:
    """Predict the memory of a GPU that scores: `held` bytes of weights, one layer's working memory, a block of logits.

    `width` is the bytes of a weight.
    """
    held += tokens * (3 * intermediate + 3 * hidden) * width + 4 * LOGITS_BLOCK
    return UNMEASURED_GB + (1 + UNMEASURED_SHARE) * held / 1e9


def of_config(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture that a config.json describes; None if the family is another, or a size is missing."""
    family = config.get("model_type")
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if family not in FAMILIES or (biased and family in ("llama", "gemma2")):
        return None
    try:
        tied = bool(config.get("tie_word_embeddings", family == "gemma2"))
        found = _numbers(config, parameters=0, intermediate=int(config["intermediate_size"]), tied=tied)
    except (KeyError, TypeError, ValueError):
        return None
    return dataclasses.replace(found, parameters=count_parameters(found))


def _numbers(config: Mapping[str, Any], **counted: Any) -> Architecture:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return Architecture(
        family=config["model_type"],
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or hidden // heads),
        vocabulary=int(config["vocab_size"]),
        **counted,
    )


def count_parameters(numbers: Architecture) -> int:
    """Count the parameters of a model of FAMILIES from its other sizes."""
    hidden, wide = numbers.hidden, numbers.intermediate
    queries, keys = numbers.heads * numbers.head_width, numbers.key_heads * numbers.head_width
    if numbers.family == "gpt_neox":
        # Fused query, key and value; two layer norms with biases; everything has a bias.
        layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * wide + wide + hidden + 4 * hidden
        final = 2 * hidden
    else:
        norms = 4 if numbers.family == "gemma2" else 2
        layer = hidden * (2 * queries + 2 * keys + 3 * wide + norms)
        layer += queries + 2 * keys if numbers.family == "qwen2" else 0
        final = hidden
    embeddings = numbers.vocabulary * hidden * (1 if numbers.tied else 2)
    return numbers.layers * layer + final + embeddings


@functools.cache
def on_meta_device(location: str, revision: str | None = None) -> Architecture:
    """Return the architecture of any model of transformers, asking another process. Raises ModelError."""
    asked = [location, revision] if revision else [location]
    command = [sys.executable, "-m", "trainers.models.architecture", *asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_META_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{location}: counting its parameters took over {_META_TIMEOUT_S} s.") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(f"{location}: its parameters cannot be counted ({said[0]}).")
    found = json.loads(done.stdout.splitlines()[-1])
    return Architecture(**{**found, "asked_layers": tuple(found["asked_layers"])})


def without_weights(location: str, revision: str | None = None) -> Any:
    """Return the model on the meta device, from its config alone. Raises ModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainers.models.loading import text_of
    from trainers.pairs.templates import first_line

    try:
        config, _ = text_of(AutoConfig.from_pretrained(location, revision=revision))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"no model could be built from {location}: {first_line(error)}") from error


def widest(config: Any) -> int:
    """Return the width of a model's widest MLP; some configs have one for each layer."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(width) if isinstance(width, list | tuple) else width)


def _build(location: str, revision: str | None = None) -> Architecture:
    from trainers.models.adapters import linear_names

    model = without_weights(location, revision)
    embeddings, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    # A config may use names of its own for these numbers (n_embd), and understands the common ones, too.
    common = {name: getattr(model.config, name, None) for name in _NAMES}
    return _numbers(
        common,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        intermediate=widest(model.config),
        tied=unembedding is not None and unembedding.weight is embeddings.weight,
        asked_layers=tuple(linear_names(model)),
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_build(*sys.argv[1:]))))
