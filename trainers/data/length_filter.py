"""The paper's length filter: texts of at most 512 tokens, as one gated tokenizer counts them (paper §2)."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from trainers.errors import DataError

LENGTH_TOKENIZER = "meta-llama/Llama-3.2-1B"
LENGTH_TOKENIZER_VARIABLE = "RMSWEEP_LENGTH_TOKENIZER"
MAX_TOKENS = 512

# Whether each of some texts is short enough.
Short = Callable[[Sequence[str]], list[bool]]


@functools.cache
def _length_tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the paper's length filter needs the tokenizer {location}, which could not be loaded "
            f"({(str(error).splitlines() or [repr(error)])[0]}). Accept its licence on the hub and set HF_TOKEN, or set "
            f"{LENGTH_TOKENIZER_VARIABLE} to a folder that holds a copy of it."
        ) from error


def length_tokenizer() -> str:
    """Hub id or folder of the tokenizer that the length filter counts with."""
    return os.environ.get(LENGTH_TOKENIZER_VARIABLE) or LENGTH_TOKENIZER


def short_enough(texts: Sequence[str]) -> list[bool]:
    """Whether each text has at most 512 tokens, the begin-of-sequence token counted."""
    if not texts:
        return []
    ids = _length_tokenizer(length_tokenizer())(list(texts))["input_ids"]
    return [len(tokens) <= MAX_TOKENS for tokens in ids]
