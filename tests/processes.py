"""Processes, found by a mark that all of a command inherit in their environment, or by their program."""

import contextlib
import os
from pathlib import Path


def processes(mark: str) -> list[int]:
    """Living processes with this NAME=VALUE in their environment; the remains of dead ones have none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def named(program: str) -> list[int]:
    """Living processes of a program, whoever started them; the remains of dead ones have no command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            first, _, _ = (folder / "cmdline").read_bytes().partition(b"\0")
            if Path(os.fsdecode(first)).name == program:
                found.append(int(folder.name))
    return found


def command_line(pid: int) -> str:
    """What a process calls itself, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
