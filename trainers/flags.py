"""A command line as the dataclass that tyro reads, with nothing lost where a flag is given twice."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from trainers.errors import SpecError

Arguments = TypeVar("Arguments")
Takes = Literal["nothing", "one", "several", "subcommand"]


def parse(kind: type[Arguments], words: Sequence[str], *, prog: str, config: Sequence[Any]) -> Arguments:
    """The words of a command line as a `kind`; ends the process with 2 where they are wrong."""
    import tyro

    try:
        words = added_up(kind, words)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return tyro.cli(kind, args=words, prog=prog, config=tuple(config))


def added_up(kind: type, words: Sequence[str]) -> list[str]:
    """The words with the values of a repeated flag behind its first ones, since tyro takes the last ones alone.

    Raises SpecError where a flag that takes one value is given twice.
    """
    takes = dict(_takes("", kind))
    into: list[str] = []
    groups, first = [into], dict[str, list[str]]()
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if word.startswith("--") else word
        if takes.get(flag) == "subcommand" and not (len(into) == 1 and takes.get(into[0]) == "one"):
            # It is one once; after that the word is a value.
            del takes[flag]
            into = [word]
            groups.append(into)
        elif word.startswith("--") and flag in first:
            if takes[flag] == "one":
                raise SpecError(
                    f"{flag} is given twice; it takes one value, and one of the two would be lost."
                )
            into = first[flag]
            into.extend([value] if equals else [])
        elif word.startswith("--"):
            into = [word]
            groups.append(into)
            if flag in takes:
                first[flag] = into
        else:
            into.append(word)
    return [word for group in groups for word in group]


def _takes(name: str, hint: Any) -> Iterator[tuple[str, Takes]]:
    """Each flag and subcommand of a hint, and what follows it; tyro keeps this to itself."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        names = [item.name for item in parts[1:] if getattr(item, "name", None)]
        yield from _takes(names[0] if names else name, parts[0])
    elif dataclasses.is_dataclass(hint):
        for field, inner in typing.get_type_hints(hint, include_extras=True).items():
            yield from _takes(field, inner)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) not in parts:
        for part in parts:
            (command,) = typing.get_args(part)[:1] or (part,)
            yield command.__name__.lower(), "subcommand"
            yield from _takes(name, part)
    else:
        several = typing.get_origin(hint) is tuple and Ellipsis in parts
        yield f"--{name.replace('_', '-')}", "nothing" if hint is bool else "several" if several else "one"
