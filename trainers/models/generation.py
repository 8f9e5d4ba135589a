"""Answers that a causal language model writes to prompts, by transformers' own `generate`."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trainers.models.layouts import layout_of, padded_attention
from trainers.models.loading import device, load_model
from trainers.models.memory import memory_named
from trainers.models.products import products_of
from trainers.models.streaming import to_score
from trainers.pairs.templates import load_tokenizer, padding_token
from trainers.specs import Output, Precision, Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The location of a model and how to load it; `base` locates an adapter's base model."""

    location: str
    revision: str | None
    precision: Precision
    trust: Trust
    template: str | None = None
    base: tuple[str, str | None] | None = None

    def tokenizer(self) -> Any:
        """Load the model's tokenizer."""
        return load_tokenizer(self.location, self.revision, self.trust, self.template)

    def model(self, output: Output = "unembedding", *, head_seed: int | None = None) -> Any:
        """Load the model, on a GPU if there is one; `head_seed` draws a head. Raises ModelError.

        An adapter's folder is loaded on its base model: the one that it names, or `base`.
        """
        loaded = load_model(
            self.location,
            tokenizer=self.tokenizer(),
            output=output,
            precision=self.precision,
            revision=self.revision,
            head_seed=head_seed,
            trust=self.trust,
            base=self.base,
        )
        return to_score(loaded, device())

    def generator(self) -> Any:
        """Load the model with transformers' own attention, as `generate` needs it. Raises ModelError."""
        from transformers import GenerationConfig

        model = self.model()
        # What carries a state along a row reads the padding, too.
        model.takes_padding = layout_of(model) == "packed"
        if model.takes_padding:
            own = "sdpa" if model._supports_sdpa else "eager"
            model.set_attn_implementation(padded_attention(model.config) or own)
        # Without the folder's settings (a penalty of repetitions, words that may not occur), which `generate` would add to ours.
        model.generation_config = GenerationConfig(pad_token_id=padding_token(self.tokenizer()))
        return model


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int | Collection[int],
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch: int = 64,
) -> list[list[list[int]]]:
    """Return `samples` answers to each prompt, each without its `end` token; one that does not end is cut.

    Temperature 0 takes the likeliest token. Draws depend on the seed, on `batch` (answers at once) and on the other
    prompts. The caller's random state does not change. Raises OutOfMemory.
    """
    from transformers import GenerationConfig

    ends = [end] if isinstance(end, int) else sorted(end)
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        do_sample=temperature > 0,
        # Without transformers' defaults, which exclude unlikely tokens.
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=ends,
        pad_token_id=model.generation_config.pad_token_id,
        # The caches of models whose rows are computed alone change what they give.
        use_cache=not getattr(model, "rows_alone", False),
    )
    found: dict[int, list[list[int]]] = {}
    # Prompts of similar length go together, since padding costs compute.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    together = itertools.groupby(order, lambda number: model.takes_padding or len(prompts[number]))
    groups = [list(group) for _, group in together]
    at_once = max(1, batch // samples)
    with (
        torch.random.fork_rng(),
        torch.inference_mode(),
        products_of(model),
        memory_named(f"{batch} answers at once do not fit."),
    ):
        torch.manual_seed(seed)
        for some in (all_[n : n + at_once] for all_ in groups for n in range(0, len(all_), at_once)):
            asked = [torch.tensor(prompts[number], dtype=torch.long) for number in some]
            ids = _padded_left(asked, how.pad_token_id)
            mask = _padded_left([torch.ones_like(row) for row in asked], 0)
            answers = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=how
            )
            rows = [
                list(itertools.takewhile(lambda token: token not in ends, row))
                for row in answers[:, ids.shape[1] :].tolist()
            ]
            found.update({number: rows[samples * place :][:samples] for place, number in enumerate(some)})
    return [found[number] for number in range(len(prompts))]


def _padded_left(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
