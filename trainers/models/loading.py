"""Language models from the hub or a local folder, with the output layer that a reward type needs.

Only safetensors and GGUF weights are read, and no code from a model's folder is run, unless the user trusts it.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.errors import ModelError
from trainers.models.adapters import CONFIG, add_adapter, base_of, load_adapter
from trainers.models.attention import backbone
from trainers.models.folders import require_own_code, weight_files
from trainers.models.gguf_header import read_header
from trainers.models.layouts import padded_attention, settle_layout, tokens_are_rows
from trainers.models.products import settle_products
from trainers.models.saving import folder_files, persistent_buffers, save_model
from trainers.models.unembedding import Unembedding, widened
from trainers.pairs.templates import first_line
from trainers.specs import UNTRUSTED, LoraSpec, Output, Part, Precision, Trust

HEAD_STD = 0.02
# Rows for marker tokens belong to the base model: they are the same in the reference pass and for every seed.
_NEW_ROWS_SEED = 0
# Weight names of a multimodal checkpoint → those of its language model.
_TEXT_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
# Other names of a head of one label. A bias, which is the same for all texts, is left out.
_HEADS = {
    r"^(?:value_head|v_head|reward_head|regression_head|rm_head|classifier)(?:\.summary)?\.weight$": "score.weight"
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    location: str,
    *,
    tokenizer: Any,
    output: Output,
    precision: Precision,
    revision: str | None = None,
    head_seed: int | None = None,
    trust: Trust = UNTRUSTED,
    lora: LoraSpec | None = None,
    base: tuple[str, str | None] | None = None,
    known: Mapping[str, Any] | None = None,
) -> Any:
    """Load a classifier (head), a causal LM (unembedding) or one with a head (both), in evaluation mode on the CPU.

    `head_seed` draws a new head (and, with `lora`, a new adapter); without it the model must have a head. The folder of
    an adapter is loaded on its base model: the one that it names, or `base` (location, revision). If another process has
    read the weights, `known` holds settings of its config: then only memory is allocated, of arbitrary content.
    """
    adapter = Path(location) if (Path(location) / CONFIG).is_file() else None
    if adapter:
        location, revision = base or base_of(adapter)
    model, loading = _from_pretrained(location, output, precision, revision, trust, known)
    brings_head = head_seed is not None or adapter is not None
    _require_weights(loading, output, brings_head, location)
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{location} holds quantised weights, which a training would leave as they are; name the model in bf16 or fp32."
        )
    if output == "unembedding" and "score.weight" in loading["unexpected_keys"]:
        raise ModelError(
            f"{location} has a reward head, as ex_rm and im_rm_hybrid have, which would be left unused."
        )
    model.eval()
    model.tf32 = precision == "tf32"
    rows = model.get_input_embeddings().weight.shape[0]
    make_rows_for(model, tokenizer)
    if lora and len(tokenizer) > rows:
        raise ModelError(
            f"{location} has no rows for the markers of conversations that its tokenizer needs, and an adapter holds no "
            "rows; train it without --lora-rank, or use a model whose tokenizer has a chat template."
        )
    _settle_output(model, output, location)
    if output != "unembedding" and head_seed is not None:
        initialise_head(model, head_seed)
    settle_layout(model, location)
    if adapter:
        load_adapter(model, adapter)
    elif lora:
        add_adapter(model, lora, base=location, revision=revision, seed=head_seed)
    return model


def _from_pretrained(
    location: str,
    output: Output,
    precision: Precision,
    revision: str | None,
    trust: Trust,
    known: Mapping[str, Any] | None,
) -> tuple[Any, Mapping[str, Iterable[str]]]:
    """Return a model as transformers loads it, and the missing and unexpected weights. Raises ModelError."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedConfig,
    )
    from transformers.initialization import no_init_weights

    settle_products(precision)
    if Path(location).is_dir():
        weight_files(Path(location), trust)
    loader = AutoModelForSequenceClassification if output == "head" else AutoModelForCausalLM
    try:
        if trust.trust_remote_code:
            require_own_code(PreTrainedConfig.get_config_dict(location, revision=revision)[0], location)
        config = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust.trust_remote_code
        )
        config, key_mapping = text_of(config)
        quantised = getattr(config, "quantization_config", None)
        if isinstance(quantised, dict) and quantised.get("quant_method") in ("fp8", "mxfp4"):
            # On every machine, as transformers does by itself where no GPU computes in that format.
            quantised["dequantize"] = True
        if output != "unembedding":
            config.num_labels = 1
            config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
        options: dict[str, Any] = {
            "dtype": DTYPES[precision],
            "attn_implementation": padded_attention(config),
        }
        if output == "both":
            loader = _with_head(config)
        else:
            options["trust_remote_code"] = trust.trust_remote_code
        if output == "head":
            _register_head(config)
            key_mapping = {**(key_mapping or {}), **_HEADS}
        if known:
            for name, value in known.items():
                setattr(config, name, value)
            build = loader._from_config if output == "both" else loader.from_config
            # Memory that is never written to takes no room.
            with no_init_weights():
                return build(config, **options), {"missing_keys": (), "unexpected_keys": ()}
        model, loading = loader.from_pretrained(
            location,
            config=config,
            key_mapping=key_mapping,
            revision=revision,
            **options,
            # None: pickles if there are no safetensors; torch's restricted unpickler reads them.
            use_safetensors=None if trust.allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
        )
    except (ModelError, MemoryError):
        raise
    # What a config asks for may be missing, or of a wrong kind: any error may be raised.
    except Exception as error:
        if output == "head" and "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"{location} is no reward model: a classifier of several labels (num_labels > 1) gives several numbers "
                "a text, and a reward is one."
            ) from error
        raise ModelError(f"no model could be loaded from {location}: {first_line(error)}") from error
    return model, loading


def text_of(config: Any) -> tuple[Any, dict[str, str] | None]:
    """Return the config of a multimodal model's language model and its renamed weights; other configs unchanged."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    text = config.get_text_config()
    if text is config or type(text) not in CAUSAL:
        return config, None
    text.tie_word_embeddings = config.tie_word_embeddings
    return text, _TEXT_NAMES


def _with_head(config: Any) -> Any:
    """Return a causal language model's class with a head added. Raises ValueError for an unknown class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    if type(config) not in CAUSAL:
        raise ValueError(f"no head can be added to the unembedding of a {config.model_type}")
    causal = CAUSAL[type(config)]

    def begin(model: Any, config: Any) -> None:
        causal.__init__(model, config)
        model.score = nn.Linear(config.hidden_size, 1, bias=False)

    # Saving and transformers treat it as the original class.
    return type(causal.__name__, (causal,), {"__module__": causal.__module__, "__init__": begin})


def _register_head(config: Any) -> None:
    """Make AutoModelForSequenceClassification take causal language models for which transformers has no class with a head.

    Without rmsweep, a class like this one loads the saved model (docs/models.md).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
    from transformers import AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    kind = type(config)
    if kind in CLASSIFIERS or kind not in CAUSAL:
        return
    causal = CAUSAL[kind]
    with torch.device("meta"):
        model = causal(config)
    prefix = next(name for name, part in model.named_children() if part is backbone(model))
    base = next(parent for parent in causal.__mro__[1:] if issubclass(parent, PreTrainedModel))
    name = (
        f"{causal.__name__.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}ForSequenceClassification"
    )
    # transformers looks up what the class supports in the module of its architecture.
    named = {
        "base_model_prefix": prefix,
        "__module__": causal.__module__,
        "__annotations__": {"config": kind},
    }
    head = type(name, (GenericForSequenceClassification, base), named)
    # Without exist_ok nothing is registered for a config of transformers' own.
    AutoModelForSequenceClassification.register(kind, head, exist_ok=True)


def _require_weights(
    loading: Mapping[str, Iterable[str]], output: Output, brings_head: bool, location: str
) -> None:
    absent = set(loading["missing_keys"])
    if output != "unembedding" and "score.weight" in absent:
        if not brings_head:
            heads = sorted(
                name for name in loading["unexpected_keys"] if re.search("head|classif|score", name)
            )
            other = (
                f" It has {', '.join(heads[:3])}, a head of another kind, which is not read." if heads else ""
            )
            raise ModelError(
                f"{location} is no reward model: it has no head (score.weight).{other} Train one, or name another."
            )
        absent.remove("score.weight")
    if absent:
        raise ModelError(
            f"{location} lacks weights of the architecture that its config.json names: {', '.join(sorted(absent)[:4])}"
            f" ({len(absent)} in all)."
        )


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def initialise_head(model: Any, seed: int) -> None:
    """Draw the head from `seed`, the same at every world size (paper §3: std 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.score.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * HEAD_STD)


def freeze(model: Any, parts: tuple[Part, ...]) -> None:
    """Freeze `parts`; freezing only one of two tied matrices unties them. Raises ModelError."""
    embeddings, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    tied = unembedding is not None and unembedding.weight is embeddings.weight
    embeddings_stay = "embeddings" in parts or "backbone" in parts
    if tied and embeddings_stay != ("unembedding" in parts):
        unembedding.weight = nn.Parameter(unembedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
    if "backbone" in parts:
        backbone(model).requires_grad_(False)
    if "embeddings" in parts:
        embeddings.requires_grad_(False)
    if "unembedding" in parts:
        if unembedding is None:
            raise ModelError("ex_rm has no unembedding to freeze; it never touches the language model's.")
        unembedding.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"with {', '.join(parts)} frozen, nothing is left to train.")


def convert_gguf(file: Path, out_dir: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder in fp32. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_header(file)
    options = {"gguf_file": file.name, "trust_remote_code": False}
    # Alone in a folder: other files beside it are not part of its key, and may name code.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / file.name).symlink_to(file.absolute())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, **options)
            model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **options)
        except MemoryError:
            raise
        except Exception as error:
            raise ModelError(f"{file} cannot be read as a GGUF model: {first_line(error)}") from error
    # A config that still says "quantised" would make the folder unloadable.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()} | persistent_buffers(model)
    save_model(weights, folder_files(model, tokenizer), out_dir)


def make_rows_for(model: Any, tokenizer: Any) -> None:
    """Add rows for the tokenizer's marker tokens to the embeddings, with the statistics of the others. Raises ModelError."""
    embeddings = model.get_input_embeddings()
    count = embeddings.weight.shape[0]
    if len(tokenizer) <= count:
        return
    if not tokens_are_rows(model):
        raise ModelError(
            f"a {type(model).__name__} knows a token by more than its row of the embeddings, so the tokenizer's new "
            f"tokens ({len(tokenizer)} with them, {count} rows) cannot be given rows; name a model whose tokenizer "
            "has a chat template, which needs no new tokens."
        )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(_NEW_ROWS_SEED)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    with torch.no_grad():
        for weight in weights.values():
            known = weight[:count].float()
            drawn = torch.randn(len(tokenizer) - count, known.shape[1], generator=generator)
            weight[count:] = (known.mean(0) + known.std(0) * drawn).to(weight.dtype)


def _settle_output(model: Any, output: Output, location: str) -> None:
    for kind in (_WideLinear, Unembedding):
        if output == ("unembedding" if kind is _WideLinear else "head"):
            continue
        layer = getattr(model, "score", None) if kind is _WideLinear else model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{location}: a {type(model).__name__} has no linear output layer that rmsweep knows."
            )
        layer.__class__ = kind


class _WideLinear(nn.Linear):
    """A linear layer that multiplies in fp32, whatever the precision of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(widened(input), widened(self.weight))
