"""`python -m trainers.data`, or another command of trainers, in this process."""

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from trainers.command import command
from trainers.data.__main__ import Data, run

DATA = (Data, run, "trainers.data")


def said(
    words: Sequence[object], capsys, of: tuple[type[Any], Callable[[Any], None], str] = DATA
) -> tuple[object, str, str]:
    """Run a command line: its exit code, what it printed, what it complained of."""
    code: object = 0
    with mock.patch.object(sys, "argv", [of[2], *map(str, words)]):
        try:
            command(*of, models=of is not DATA)
        except SystemExit as ended:
            code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
