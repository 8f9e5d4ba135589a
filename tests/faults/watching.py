"""Looking at a command from outside: which sockets its processes listen on, and where a secret was written."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from tests.processes import command_line, processes

LISTENING = "0A"
# As /proc/net writes 127.0.0.1, ::1 and ::ffff:127.0.0.1.
LOOPBACK = ("0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F")


def listening(mark: str) -> set[tuple[str, str, str]]:
    """(address, port, command line) of every TCP socket that the marked processes listen on."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                sockets[f"socket:[{fields[9]}]"] = fields[1]
    found = set()
    for pid in processes(mark):
        with contextlib.suppress(OSError):
            command = command_line(pid)[-160:]
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    local = sockets.get(str(descriptor.readlink()))
                    if local is not None:
                        address, port = local.split(":")
                        found.add((address, str(int(port, 16)), command))
    return found


def leaks(secrets: Iterable[str], *roots: Path) -> list[str]:
    """`secret in file` for every file under the roots that holds one."""
    found = []
    for root in roots:
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                content = file.read_bytes()
                found += [f"{secret} in {file}" for secret in secrets if secret.encode() in content]
    return found
