"""Built-in tiny language models: pretrained on the tiny world in seconds, on one CPU thread.

    pretrain(TINY_MODELS["llama-64"], Path("llama-64"), print)

writes an ordinary Hugging Face folder (config, safetensors, tokenizer with its chat template).
The same bytes come out of every run on the same machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from trainers.data import worlds
from trainers.models.architecture import Architecture as Numbers
from trainers.models.architecture import of_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Raise it when `pretrain`, the tokenizer or the documents change what a model learns, or what its folder says.
VERSION = 2

Architecture = Literal["llama", "qwen2", "gemma2"]
MAX_POSITIONS = 256
REPORT_EVERY_STEPS = 50
_ROLES = (worlds.SYSTEM, worlds.USER, worlds.ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('it has no token for the role ' + message['role']) }}"
    "{% endif %}"
    " <{{ message['role'] }}> {{ message['content'] | trim }} {{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """Everything that decides a tiny model's weights, besides `VERSION`."""

    architecture: Architecture
    width: int
    layers: int = 2
    heads: int = 4
    seed: int = 0
    steps: int = 400
    documents_per_step: int = worlds.DOCUMENTS_PER_ROUND
    learning_rate: float = 1e-2

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says beside the defaults of its architecture."""
        head_width = self.width // self.heads
        extra = {"head_dim": head_width, "query_pre_attn_scalar": head_width, "sliding_window": MAX_POSITIONS}
        return {
            "model_type": self.architecture,
            "vocab_size": len(_words()),
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            # If they were tied, a word's logit would move with what the word means once it is read.
            "tie_word_embeddings": False,
            "max_position_embeddings": MAX_POSITIONS,
            **(extra if self.architecture == "gemma2" else {}),
        }

    @property
    def numbers(self) -> Numbers:
        """The numbers that decide its memory."""
        found = of_config(self.config)
        assert found is not None
        return found


TINY_MODELS: Mapping[str, TinyModel] = MappingProxyType(
    {
        f"{architecture}-{width}": TinyModel(architecture=architecture, width=width)
        for architecture in get_args(Architecture)
        for width in (48, 64)
    }
)


def _words() -> tuple[str, ...]:
    return (worlds.PAD, worlds.UNKNOWN, worlds.BEGIN, worlds.END, *_ROLES, *worlds.VOCABULARY)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Make a tokenizer with one token per word of the tiny world; the end-of-turn token is the eos token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(_words())}
    backend = Tokenizer(WordLevel(numbers, unk_token=worlds.UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=worlds.PAD,
        unk_token=worlds.UNKNOWN,
        bos_token=worlds.BEGIN,
        eos_token=worlds.END,
        additional_special_tokens=list(_ROLES),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    # For messages.
    tokenizer.name_or_path = "the built-in tiny models"
    return tokenizer


def pretrain(model: TinyModel, out_dir: Path, report: Callable[[dict[str, float]], None]) -> None:
    """Pretrain `model` by next-token prediction and write a Hugging Face folder to `out_dir`.

    `report` gets rows of step, loss (nats per token) and learning rate. Runs on one CPU thread;
    the caller's random state and thread count are as before when it returns.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainers.models.saving import settle_tokenizer

    tokenizer = build_tokenizer()
    threads = torch.get_num_threads()
    # With one thread, sums have the same order on every run.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.seed)
            config = AutoConfig.for_model(
                **model.config,
                **{
                    name: getattr(tokenizer, name)
                    for name in ("pad_token_id", "bos_token_id", "eos_token_id")
                },
            )
            network = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
            _fit(model, network, tokenizer, report)
    finally:
        torch.set_num_threads(threads)
    network.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    settle_tokenizer(tokenizer, out_dir)


def _fit(
    model: TinyModel,
    network: Any,
    tokenizer: "PreTrainedTokenizerFast",
    report: Callable[[dict[str, float]], None],
) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    optimiser = torch.optim.AdamW(network.parameters(), lr=model.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=model.learning_rate, total_steps=model.steps, pct_start=0.1
    )
    number, pad = tokenizer.get_vocab(), network.config.pad_token_id
    texts = worlds.documents(model.seed)
    network.train()
    for step in range(1, model.steps + 1):
        # One document a row, padded at the right; a causal model needs no mask.
        rows = [[number[word] for word in next(texts).split()] for _ in range(model.documents_per_step)]
        tokens_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
        logits_BTV = network(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        targets_N = tokens_BT[:, 1:].flatten()
        loss = cross_entropy(logits_BTV.flatten(0, 1), targets_N, ignore_index=pad)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % REPORT_EVERY_STEPS == 0 or step == model.steps:
            report({"step": step, "loss": loss.item(), "lr": float(schedule.get_last_lr()[0])})
    network.eval()
