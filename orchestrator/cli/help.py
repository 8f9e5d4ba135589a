"""`--help` on one screen: commands, the flags of every day in a line each, examples; `--help-verbose` says the rest."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, Literal

SELDOM = (
    "effective_batch",
    "max_prompt_tokens",
    "max_response_tokens",
    "max_trials",
    "extend",
    "replace",
    "category",
    "columns",
    "test_share",
    "group_by",
    "split_seed",
    "skip_bad_rows",
    "keep_epochs",
    "checkpoint_steps",
    "grace_s",
    "allow_pickle",
    "trust_remote_code",
    "allow_overlap",
    "keep_weights",
)
EXAMPLES = (
    "--profile laptop",
    "plan --models mine=./my-model --train-sets ./data --eval-sets ./data",
    "status --watch",
    "report --compare OTHER_SWEEP",
)
_NAME_WIDTH = 34


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether help is asked for without a command; a command's own help is full."""
    return list(arguments) in (["-h"], ["--help"])


def short_help(options: type, commands: Sequence[type], prog: str, width: int) -> str:
    """The help of the options' dataclass and its commands, from their docstrings, in lines of at most `width`."""
    docs, hints = _attribute_docs(options), typing.get_type_hints(options, include_extras=True)
    names = [name for name in docs if name not in SELDOM]
    lines = [f"usage: {prog} [COMMAND] [FLAGS]", "", *textwrap.wrap(_first(options.__doc__), width), ""]
    lines += ["commands"]
    lines += [_line(kind.__name__.lower(), _first(kind.__doc__), width, 9) for kind in commands]
    lines += ["", "flags, before or after the command"]
    lines += [_line(_flag(name, hints[name]), _first(docs[name]), width, _NAME_WIDTH) for name in names]
    seldom = ", ".join(f"--{name.replace('_', '-')}" for name in SELDOM)
    lines += textwrap.wrap(
        f"and, as --help-verbose says in full: {seldom}",
        width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
    lines += ["", "examples", *(f"  {prog} {words}" for words in EXAMPLES)]
    return "\n".join(lines)


def _line(name: str, text: str, width: int, name_width: int) -> str:
    start = f"  {name:<{name_width}}"
    room = width - len(start)
    if room < 30:
        return textwrap.fill(f"  {name}: {text}", width, subsequent_indent="      ")
    return start + textwrap.shorten(text, room, placeholder=" …")


def _flag(name: str, hint: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"{flag} {{{','.join(parts)}}}"
    metavars = [item.metavar for item in getattr(hint, "__metadata__", ()) if hasattr(item, "metavar")]
    return f"{flag} {metavars[0]}" if metavars else flag


def _attribute_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each attribute of a dataclass and of those that it inherits from."""
    parts = [item for item in kind.__mro__ if dataclasses.is_dataclass(item)]
    return {name: text for part in parts for name, text in _own_attribute_docs(part).items()}


def _own_attribute_docs(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        attribute.target.id: str(said.value.value)
        for attribute, said in itertools.pairwise(definition.body)
        if isinstance(attribute, ast.AnnAssign)
        and isinstance(attribute.target, ast.Name)
        and isinstance(said, ast.Expr)
        and isinstance(said.value, ast.Constant)
    }


def _first(text: str | None) -> str:
    return " ".join((text or "").split())
