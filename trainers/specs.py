"""Models, data sets and hyperparameters as plain frozen values, validated when made. Imports no torch.

Defaults are the paper's (arXiv 2507.07981, hyperparameters of the real-world experiments).
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

from trainers.errors import ModelError, SpecError

Precision = Literal["fp32", "tf32", "bf16"]
Optimizer = Literal["adamw", "sgd", "rmsprop"]
Schedule = Literal["constant", "linear", "cosine"]
Loss = Literal["bradley_terry", "hinge", "ipo"]
Part = Literal["backbone", "embeddings", "unembedding"]
# What to do with system turns if a template takes none: put them before the first user turn, leave them out, or refuse
# the row.
System = Literal["fold", "drop", "refuse"]
# What to do with a response's reasoning: score it like the rest, read but not score it, or leave it out.
Reasoning = Literal["score", "keep", "drop"]
# The output layer that a model is loaded with: a new linear head, its own unembedding, or both.
Output = Literal["head", "unembedding", "both"]
# What is tokenised: the prompt and the response, or the question whether the response is correct.
Rendering = Literal["response", "verification"]
Engine = Literal["transformers", "vllm"]

# Metadata of a field that was added after keys were first used: a key leaves it out at its default.
ADDED: Mapping[str, bool] = MappingProxyType({"added": True})

BUILTIN = "builtin:"
FETCHED = "fetched:"
COLUMNS = (
    *("prompt", "chosen", "rejected", "a", "b", "preference", "orig_chosen", "system", "tools", "margin"),
    *("rewritten_chosen", "rewritten_rejected"),
)
# Which rated answers are paired: each with every lower one, or only the best with the others.
Ratings = Literal["all", "best"]
# A name becomes part of file names, which end at 255 bytes; a letter may take four.
MAX_NAME, MAX_NAME_BYTES = 100, 200


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def require_seed(seed: int) -> None:
    """Raise SpecError where numpy or torch cannot take the seed."""
    _require(0 <= seed < 2**63, f"a seed of {seed}: give a whole number from 0, below 2^63.")


def clean_name(text: str) -> str:
    """Return `text` as a name that is safe in run names and file names. Raises SpecError.

    Letters and digits of every script stay.
    """
    composed = unicodedata.normalize("NFC", text)
    # Many scripts write vowels as marks.
    marks = {letter for letter in composed if unicodedata.category(letter).startswith("M")}
    name = "".join(letter if letter.isalnum() or letter in {*marks, *"._-"} else " " for letter in composed)
    name = re.sub(" +", "_", name).strip("._-")
    _require(
        any(map(str.isalnum, name)),
        f"{text!r} holds no letter or digit to make a name of. Give one as NAME={text}.",
    )
    size = len(name.encode())
    _require(
        len(name) <= MAX_NAME and size <= MAX_NAME_BYTES,
        f"{name[:40]}… is a name of {len(name)} letters in {size} bytes; at most {MAX_NAME} letters in "
        f"{MAX_NAME_BYTES} bytes are taken.",
    )
    return name


def given_name(flag: str, text: str) -> str:
    """Return a name that the user gave. Raises SpecError where it is not clean: two such could become the same."""
    _require(any(map(str.isalnum, text)), f"{flag} {text!r}: a name needs a letter or digit.")
    name = clean_name(text)
    _require(
        name == unicodedata.normalize("NFC", text),
        f"{flag} {text!r}: it cannot stand in the names of files; give {name}.",
    )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which foreign code may run when a model is loaded: none, unless the user allows it.

    `allow_pickle` reads weights that are pickles, `trust_remote_code` runs the Python files of the model's folder.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False


UNTRUSTED = Trust()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A base model: `source` is a hub id, a local folder, a GGUF file (or its folder) or `builtin:<name>`.

    `parameters` is a count, known for catalog models, used for planning only. `template` replaces the tokenizer's chat
    template: Jinja, or the name of another one that the tokenizer has.
    """

    name: str
    source: str
    revision: str | None = None
    precision: Precision = "fp32"
    parameters: int | None = None
    trust: Trust = UNTRUSTED
    template: str | None = None

    def __post_init__(self) -> None:
        _require(
            self.precision in get_args(Precision),
            f"model {self.name}: precision {self.precision!r} is not one of {', '.join(get_args(Precision))}.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Copies added to the training pairs: this share of the rows of a rewriting's `split`, the same rows every time."""

    source: str
    split: str
    share: float

    def __post_init__(self) -> None:
        _require(0 < self.share <= 1, f"a share of {self.share} of a rewriting: give above 0, at most 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A set of preference pairs: `source` is a path, a hub id, `builtin:<name>`, or `fetched:<name>`.

    `rewriting_of` names the set whose responses this one rewrites: for a model trained on that set, this one is a
    token-level shift (paper §2). `keep` holds (column, glob) conditions that a row must meet, `selection` names the
    paper's filters and draws (trainers/data/known.py), `columns` maps prompt, chosen, rejected, … to column names.
    `test_share` splits a test set off the train split; rows that share `group_by` (or a prompt) stay together.
    `skip_bad_rows` leaves out unreadable rows, which are an error otherwise. `ratings` says which rated answers are
    paired; `ties` keeps training pairs of equal rating. `augmentation` adds rewritten copies to the training split.
    `train_draw` is the set's own draw of training pairs, unless a sweep asks for another number. A `mixture` is made of
    the training pairs of other sets, each with its share.
    """

    name: str
    source: str
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    rewriting_of: str | None = None
    keep: tuple[tuple[str, str], ...] = ()
    selection: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    group_by: str | None = None
    test_share: float = 0.0
    split_seed: int = 0
    skip_bad_rows: bool = False
    ratings: Ratings = "all"
    ties: bool = False
    augmentation: Augmentation | None = None
    train_draw: "DrawSpec | None" = None
    mixture: tuple[tuple["DatasetSpec", float], ...] = ()

    @property
    def parts(self) -> "tuple[DatasetSpec, ...]":
        """The sets that a mixture is made of, else the set itself."""
        return tuple(part for part, _ in self.mixture) or (self,)

    def __post_init__(self) -> None:
        meant = [name for name, _ in self.columns]
        for name in meant:
            _require(
                name in COLUMNS, f"data set {self.name}: column {name!r} is not one of {', '.join(COLUMNS)}."
            )
            _require(meant.count(name) == 1, f"data set {self.name}: column {name!r} is mapped twice.")
        _require(
            0 <= self.test_share < 1,
            f"data set {self.name}: a test share of {self.test_share} is not in [0, 1).",
        )
        _require(
            self.group_by is None or self.test_share > 0,
            f"data set {self.name}: groups by {self.group_by!r} are kept together only in a split; give a test share.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSpec:
    """Which pairs of a split are used: all, or the first `max_pairs` of a seeded permutation that fit the limits.

    Pairs over a token limit are left out and counted, never cut. `permutation` is numpy's (PCG64), or torch's, as for the
    paper's subsets. `system` and `reasoning` say how pairs are rendered.
    """

    max_pairs: int | None = None
    seed: int = 0
    permutation: Literal["numpy", "torch"] = "numpy"
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    system: System = field(default="fold", metadata=ADDED)
    reasoning: Reasoning = field(default="score", metadata=ADDED)

    def __post_init__(self) -> None:
        _require(
            self.max_pairs is None or self.max_pairs >= 1,
            f"a draw of {self.max_pairs} pairs is empty; give a number of at least 1.",
        )
        require_seed(self.seed)
        _require(min(self.max_prompt_tokens, self.max_response_tokens) >= 1, "at least 1 token is needed.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSpec:
    """How weights are trained; the defaults are the paper's (paper §1). `effective_batch` is in pairs per step.

    `betas` are AdamW's, `momentum` is SGD's and RMSprop's. The learning rate rises linearly from 0 over
    `warmup_steps`, then stays, or falls to 0 at the end linearly or as a cosine. `clip` bounds the gradient's norm.
    `freeze` names parts that keep their values: the backbone is everything but the output layer; freezing only one
    of two tied matrices unties them.
    """

    # Optimisers that read a field; every one reads the others.
    READ_BY: ClassVar[Mapping[str, tuple[Optimizer, ...]]] = MappingProxyType(
        {"betas": ("adamw",), "eps": ("adamw", "rmsprop"), "momentum": ("sgd", "rmsprop")}
    )
    optimizer: Optimizer = "adamw"
    lr: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    clip: float | None = None
    epochs: int = 5
    effective_batch: int = 32
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    eps: float = 1e-8
    freeze: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and 0 < self.lr < 1, f"--lr {self.lr} is outside (0, 1).")
        _require(self.epochs >= 1, f"--epochs {self.epochs}: at least 1 is needed.")
        _require(self.effective_batch >= 1, f"--effective-batch {self.effective_batch}: at least 1.")
        _require(self.warmup_steps >= 0, f"--warmup-steps {self.warmup_steps}: at least 0.")
        _require(self.clip is None or 0 < self.clip < math.inf, f"--clip {self.clip}: give a positive norm.")
        _require(0 <= self.weight_decay < math.inf, f"--weight-decay {self.weight_decay}: at least 0.")
        _require(0 < self.eps < math.inf, f"--eps {self.eps}: give a positive number.")
        _require(all(0 <= beta < 1 for beta in self.betas), f"--betas {self.betas} are outside [0, 1).")
        _require(0 <= self.momentum < 1, f"--momentum {self.momentum} is outside [0, 1).")
        for value, known, what in (
            (self.optimizer, Optimizer, "--optimizer"),
            (self.schedule, Schedule, "--schedule"),
            *((part, Part, "--freeze") for part in self.freeze),
        ):
            _require(value in get_args(known), f"{what} {value} is not one of {', '.join(get_args(known))}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """The loss of a pair, a function of its margin Δ = r⁺ − r⁻ (trainers/rewards/losses.py).

    Δ must exceed `margin` times the pair's own margin. `label_smoothing` is the probability that a label is wrong.
    Added are `centring` times (r⁺ + r⁻)², and `consistency` times the squared differences between the rewards of the two
    responses and those of their rewritings.
    """

    kind: Loss = "bradley_terry"
    margin: float = 0.0
    label_smoothing: float = 0.0
    centring: float = 0.0
    consistency: float = field(default=0.0, metadata=ADDED)

    def __post_init__(self) -> None:
        known = get_args(Loss)
        _require(self.kind in known, f"--loss {self.kind} is not one of {', '.join(known)}.")
        for name in ("margin", "centring", "consistency"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"--{name} {value}: at least 0.")
        _require(
            0 <= self.label_smoothing < 0.5, f"--label-smoothing {self.label_smoothing} is not in [0, 0.5)."
        )


BRADLEY_TERRY = LossSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """A low-rank adapter that is trained instead of the backbone's weights (Hu et al., 2021).

    Its update is scaled by alpha / rank; `targets` are names of linear layers, by default all of the backbone.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"--lora-rank {self.rank}: at least 1; 0 means no adapter.")
        _require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"--lora-alpha {self.alpha}: give a positive number.",
        )

    def require_layers(self, where: str, found: Sequence[str]) -> None:
        """Raise ModelError if targets are not among the model's linear layers `found`, or if there are none."""
        unknown = [name for name in self.targets if name not in found]
        if unknown or not found:
            called = f" called {', '.join(unknown)}" if found else ""
            instead = (
                f"name some of --lora-targets {' '.join(found)}" if found else "train it without --lora-rank"
            )
            raise ModelError(f"{where}: its backbone has no linear layers{called}; {instead}.")

    def require_alone(self, optim: OptimSpec) -> None:
        """Raise SpecError if parts are frozen, too: an adapter already freezes everything but a reward head."""
        _require(
            not optim.freeze,
            f"--freeze {' '.join(optim.freeze)} and --lora-rank {self.rank}: an adapter freezes all but EX-RM's head; "
            "give one of the two.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSpec:
    """The share of training pairs that is held out and scored after every epoch, drawn by `seed`."""

    share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)
        _require(0 < self.share < 1, f"a validation share of {self.share}: give above 0, below 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How a policy samples answers to a prompt, from its full distribution at a temperature."""

    samples: int = 64
    """Answers drawn to each prompt."""
    temperature: float = 1.0
    """Temperature of the draws."""
    max_new_tokens: int = 256
    """Length at which an answer is cut."""
    sampling_seed: int = 0
    """Seed of the draws."""
    engine: Engine = "transformers"
    """Library that samples: transformers, or vllm, which must be installed and draws other answers of the same distribution."""

    def __post_init__(self) -> None:
        _require(self.samples >= 2, f"--samples {self.samples}: at least 2, to choose among.")
        _require(
            math.isfinite(self.temperature) and self.temperature > 0,
            f"--temperature {self.temperature}: above 0; at 0 all answers to a prompt are one.",
        )
        _require(self.max_new_tokens >= 1, f"--max-new-tokens {self.max_new_tokens}: at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a training is divided over devices; not part of any key, since results agree within 1e-5 in fp32.

    A step is split into as few forwards of at most `forward_tokens` tokens as possible; a longer pair gets a forward of
    its own. `checkpointing` recomputes activations in the backward pass; `offload_optimizer` keeps the optimiser's
    state in host memory; `compile` compiles layers around their attention.
    """

    world_size: int = 1
    zero_stage: int = 0
    forward_tokens: int
    checkpointing: bool = False
    offload_optimizer: bool = False
    compile: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        _require(self.zero_stage in (0, 1, 2, 3), f"ZeRO stage {self.zero_stage} is not 0, 1, 2 or 3.")
        _require(self.forward_tokens >= 1, f"--forward-tokens {self.forward_tokens}: give at least 1.")
        offloadable = self.zero_stage >= 1 or not self.offload_optimizer
        _require(offloadable, "the optimiser's state is offloaded by ZeRO 1, 2 or 3, not by 0.")
        whole = self.zero_stage < 3 or not self.compile
        _require(whole, "layers are compiled with ZeRO 0, 1 or 2: 3 gathers weights in their midst.")
