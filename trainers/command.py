"""What the commands of this package share: models and data by the words of a command line, errors as exit codes.

Exit codes: 0 done · 1 a defect · 2 wrong usage or input, said before anything starts · 3 it started and failed.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainers.data.sources import dataset_spec, own_split, read_pairs
from trainers.errors import Interrupted, SpecError, SweepError, TrialFailed
from trainers.flags import parse
from trainers.pairs import Counts
from trainers.rewards import PAPER_BETA, RewardSpec, reward_variants
from trainers.specs import DrawSpec, clean_name
from trainers.terminal import write_any_text

USAGE, FAILED, INTERRUPTED = 2, 3, 130
Arguments = TypeVar("Arguments")


def command(
    parsed: type[Arguments], run: Callable[[Arguments], None], name: str, *, models: bool = True
) -> None:
    """Parse the command line, run, and exit with the contract's code; a SweepError is said without a traceback.

    A command that has to do with no `models` is not kept waiting for transformers.
    """
    import tyro

    write_any_text()
    if models:
        _quieten_transformers()
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
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
    # That took the hub's bars away, too; a download is long, and one rank shows it where somebody looks.
    watched = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if watched and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()


def named_reward(name: str, beta: float | None) -> RewardSpec:
    """A reward type or ablation by name. Raises SpecError."""
    known = reward_variants(PAPER_BETA if beta is None else beta)
    if name not in known:
        raise SpecError(f"--reward {name} is not one of {', '.join(known)}.")
    if beta is not None and known[name].beta is None:
        raise SpecError(f"--beta is given, but {name} has no beta.")
    return known[name]


def read_named_pairs(data: str, split: str) -> tuple[str, list[Any]]:
    """(name, pairs) of a file, a folder, a known set or a hub id. Raises DataError."""
    spec = dataset_spec(data)
    return spec.name, read_pairs(spec, own_split(spec, split))


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """Where to load `model` from: a folder or hub id as it is, a GGUF file (or its folder) converted for the while.

    Raises ModelError.
    """
    path = Path(model).expanduser()
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or (path.is_dir() and list(path.glob("*.safetensors"))):
        yield str(path) if path.exists() else model
        return
    from trainers.models import convert_gguf

    with tempfile.TemporaryDirectory() as scratch:
        convert_gguf(found[0], Path(scratch) / "model")
        yield str(Path(scratch) / "model")


def say_counts(counts: Counts, kept: int, draw: DrawSpec, model: str) -> None:
    """Tell how many pairs were left out for their length, and how many have nothing to choose between."""
    if os.environ.get("RANK", "0") != "0":
        return
    if counts.too_long:
        print(
            f"{counts.too_long} pairs left out: over {draw.max_prompt_tokens} prompt or {draw.max_response_tokens} "
            "response tokens",
            file=sys.stderr,
        )
    if counts.identical:
        print(ties(counts.identical, kept, model), file=sys.stderr)
    if counts.many_unknown:
        print(unknown(counts, model), file=sys.stderr)


def ties(identical: int, kept: int, model: str) -> str:
    """One line about pairs whose two sides are the same tokens."""
    return (
        f"{identical} of {kept} pairs have the same tokens on both sides under the chat template of {model}: "
        "ties, from which nothing is learned"
    )


def unknown(counts: Counts, model: str) -> str:
    """One line about texts that a tokenizer hardly knows."""
    return (
        f"{counts.unknown_tokens} of {counts.tokens} tokens are unknown to the tokenizer of {model}: it gives all such "
        "words one id, so that texts that differ only in them are the same to the model"
    )


def plain_name(text: str, otherwise: str) -> str:
    """A name for cards and columns; `otherwise` where the text has no letter that may stand there."""
    try:
        return clean_name(text)
    except SpecError:
        return otherwise


def dump(values: dict[str, float]) -> str:
    """Metrics for people and machines alike."""
    return json.dumps({name: round(value, 6) for name, value in values.items()})
