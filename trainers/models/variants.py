"""Models for which transformers has no class of its own: a reward head on any backbone, the text of a multimodal one.

What is saved with such a head is loaded without rmsweep, too; of a Granite:

    class Head(GenericForSequenceClassification, GranitePreTrainedModel): ...
    Head.from_pretrained(folder)
"""

from typing import Any

# Names of a multimodal checkpoint → of its language model alone.
_TEXT_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}


def text_of(config: Any) -> tuple[Any, dict[str, str] | None]:
    """Return the config of a multimodal model's language model, and how its weights are renamed; other configs as they are."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    text = config.get_text_config()
    if text is config or type(text) not in CAUSAL:
        return config, None
    text.tie_word_embeddings = config.tie_word_embeddings
    return text, _TEXT_NAMES


def register_head(config: Any) -> None:
    """Let AutoModelForSequenceClassification load a head on a causal language model that has no class with one."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
    from transformers import AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    from trainers.models.attention import backbone

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
    # As if it stood in the module of its architecture, which transformers reads for what the class supports.
    named = {
        "base_model_prefix": prefix,
        "__module__": causal.__module__,
        "__annotations__": {"config": kind},
    }
    head = type(name, (GenericForSequenceClassification, base), named)
    # Without exist_ok nothing is registered for a config of transformers' own.
    AutoModelForSequenceClassification.register(kind, head, exist_ok=True)
