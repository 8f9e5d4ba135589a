"""`python -m trainers.data` in this process."""

import sys
from collections.abc import Sequence
from unittest import mock

from trainers.command import command
from trainers.data.__main__ import Data, run


def said(words: Sequence[object], capsys) -> tuple[object, str, str]:
    """Run a command line: its exit code, what it printed, what it complained of."""
    code: object = 0
    with mock.patch.object(sys, "argv", ["data", *map(str, words)]):
        try:
            command(Data, run, "trainers.data", models=False)
        except SystemExit as ended:
            code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
