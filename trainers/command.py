"""What every command line of rmsweep shares: flags, text on any terminal, errors as exit codes, models and data by name.

Exit codes: 0 done · 1 a defect · 2 wrong usage or input, said before anything starts · 3 it started and failed.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from trainers.data.audit import token_findings
from trainers.data.sources import Reading, chosen_spec, own_split, read_pairs
from trainers.errors import Interrupted, SpecError, SweepError, TrialFailed
from trainers.pairs.templates import given_template, load_tokenizer
from trainers.rewards import PAPER_BETA, RewardSpec, reward_variants
from trainers.specs import DrawSpec, Output, Precision, Reasoning, System, Trust

# As rich ends a process whose output nobody reads any more.
UNREAD = 1
USAGE, FAILED, INTERRUPTED = 2, 3, 130
Arguments = TypeVar("Arguments")

if typing.TYPE_CHECKING:
    from trainers.pairs.tokens import TokenPair


def command(
    parsed: type[Arguments], run: Callable[[Arguments], None], name: str, *, models: bool = True
) -> None:
    """Parse the command line, run, and exit with the code that the outcome has; a SweepError prints no traceback.

    A command without `models` does not wait for transformers to be imported.
    """
    write_any_text()
    if models:
        _quieten_transformers()
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
        with for_any_reader():
            run(parse(parsed, sys.argv[1:], prog=f"python -m {name}", config=config))
    except Interrupted as error:
        print(f"interrupted: {error} The same command goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, TrialFailed) else USAGE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _quieten_transformers() -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # That disabled the hub's bars, too. A download is long, so the first rank shows it on a terminal.
    watched = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if watched and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()


def write_any_text() -> None:
    """Let stdout and stderr take every text: a sign that their encoding lacks is written as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def for_any_reader() -> Iterator[None]:
    """End the process without an error when nothing reads its output any more, as under `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left to write goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def parse(
    kind: type[Arguments],
    words: Sequence[str],
    *,
    prog: str,
    config: Sequence[Any],
    description: str | None = None,
) -> Arguments:
    """Return the words of a command line as a `kind`; exit with 2 where they are wrong.

    The help opens with the description, else with the docstring of `kind`.
    """
    try:
        words = added_up(kind, words)
        return tyro.cli(kind, args=words, prog=prog, description=description, config=tuple(config))
    except SpecError as error:
        # Some values are checked by what holds them.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)


def added_up(kind: type, words: Sequence[str]) -> list[str]:
    """Move the values of a repeated flag behind its first ones, since tyro would take the last ones alone.

    A flag that takes one value is then refused by tyro, which has no place for the second.
    """
    commands = {item.__name__.lower() for item in typing.get_args(typing.get_type_hints(kind).get("command"))}
    into: list[str] = []
    groups, first = [into], dict[str, list[str]]()
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in first:
                groups.append(first.setdefault(flag, [flag]))
            into = first[flag]
            into.extend([value] if equals else [])
        elif word in commands and len(into) != 1:
            # What follows a flag is its value. After one command, the same word is a value, too.
            commands, into = set(), [word]
            groups.append(into)
        else:
            into.append(word)
    return [word for group in groups for word in group]


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """Yield the path to load `model` from. A GGUF file (or its folder) is converted to a temporary folder.

    Raises ModelError.
    """
    path = Path(model).expanduser()
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or (path.is_dir() and list(path.glob("*.safetensors"))):
        yield str(path) if path.exists() else model
        return
    from trainers.models.loading import convert_gguf

    with tempfile.TemporaryDirectory() as scratch:
        convert_gguf(found[0], Path(scratch) / "model")
        yield str(Path(scratch) / "model")


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """How a model's chat template renders pairs."""

    template: str | None = None
    """Chat template to use instead of the model's default: a Jinja file, or the name of another that its tokenizer has."""
    system: System = "fold"
    """Where the template takes no system turn: fold it into the first user turn, drop it, or refuse the row."""
    reasoning: Reasoning = "score"
    """Reasoning before a response's answer: score it like the rest, keep it as context of what is scored, or drop it."""


@dataclass(frozen=True, kw_only=True)
class OnPairs(TemplateFlags):
    """The flags of a command that takes a model and preference pairs."""

    model: str | tuple[str, ...]
    """Folder, GGUF file or hub id."""
    reward: str
    """ex_rm, im_rm, ex_grm, an ablation (ex_rm_mean, im_rm_no_reference) or a remedy (im_rm_hybrid,
    im_rm_length_normalised, im_rm_logits)."""
    data: str
    """File, folder, known set or hub id of prompt, chosen, rejected; for evaluation also a suite: rm_bench[=COPY]."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MEANING=COLUMN")] = ()
    """Names of your columns: prompt=question chosen=best rejected=worst."""
    beta: float | None = None
    """β of im_rm (default 0.01)."""
    split: str
    """Split of a folder or hub set."""
    max_pairs: int | None = None
    """Use the first N of a seeded permutation."""
    seed: int = 0
    """Seed of the permutation; in a training also of the head and of the order of pairs."""
    max_prompt_tokens: int = 1024
    """Pairs with a longer prompt are left out and counted, never cut."""
    max_response_tokens: int = 1024
    """Pairs with a longer response are left out and counted, never cut."""
    precision: Precision = "fp32"
    """Precision: in tf32, products of fp32 weights are rounded by the GPU. In bf16, heads and log-probabilities are still fp32, and training keeps fp32 weights."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Danger: a pickle can run any code of its author."""
    trust_remote_code: bool = False
    """Run the Python files of a model's folder. Danger: any code of its author runs with your rights."""

    def __post_init__(self) -> None:
        self.draw()

    def draw(self) -> DrawSpec:
        """Return which pairs are used, and how they are rendered. Raises SpecError."""
        return DrawSpec(
            max_pairs=self.max_pairs,
            seed=self.seed,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            system=self.system,
            reasoning=self.reasoning,
        )

    @property
    def trust(self) -> Trust:
        """What may run on loading a model."""
        return Trust(allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def reward_spec(self) -> RewardSpec:
        """Return the reward type or ablation that is named. Raises SpecError."""
        known = reward_variants(PAPER_BETA if self.beta is None else self.beta)
        if self.reward not in known:
            raise SpecError(f"--reward {self.reward} is not one of {', '.join(known)}.")
        if self.beta is not None and known[self.reward].beta is None:
            raise SpecError(f"--beta is given, but {self.reward} has no beta.")
        return known[self.reward]

    def read_pairs(self, *, ties: bool = False) -> tuple[str, list[Any]]:
        """Return the name and the pairs of a file, a folder, a known set or a hub id. Raises DataError."""
        spec = chosen_spec(self.data, Reading(columns=self.columns, ties=ties))
        return spec.name, read_pairs(spec, own_split(spec, self.split))

    def tokenizer(self, location: str) -> Any:
        """Load the tokenizer of the model at `location`, with the template that the flags name. Raises SweepError."""
        return load_tokenizer(location, None, self.trust, given_template(self.template))

    def load(self, location: str, output: Output, device: str) -> Any:
        """Load the model at `location` to score on a device. Raises ModelError."""
        from trainers.models.loading import load_model
        from trainers.models.streaming import to_score

        tokenizer = self.tokenizer(location)
        model = load_model(
            location, tokenizer=tokenizer, output=output, precision=self.precision, trust=self.trust
        )
        return to_score(model, device)

    def tokenize(self, rows: Sequence[Any], location: str, model: str) -> "list[TokenPair]":
        """Return the drawn pairs as tokens of the `model` at `location`, and print what was left out or looks wrong."""
        # Arrow takes a third of the time that a command line takes to load, and most commands read no tokens.
        from trainers.pairs.tokens import tokenize_pairs

        rendering = self.reward_spec().type.rendering
        pairs, counts = tokenize_pairs(rows, self.tokenizer(location), self.draw(), rendering)
        said = [finding.said for finding in token_findings(f"read by {model}", counts, len(pairs))]
        if counts.too_long:
            said.append(
                f"{counts.too_long} pairs left out: over {self.max_prompt_tokens} prompt or "
                f"{self.max_response_tokens} response tokens"
            )
        if os.environ.get("RANK", "0") == "0":
            for line in said:
                print(line, file=sys.stderr)
        return pairs


def make_folder(out: Path) -> None:
    """Make the folder for what a command writes. Raises SpecError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out: there can be no folder {out} ({error.strerror}); give another.") from error


def dump(values: dict[str, float]) -> str:
    """Return metrics as one line of JSON."""
    return json.dumps({name: round(value, 6) for name, value in values.items()})
