"""Files over HTTP into a cache folder: whole or not at all, and the same bytes for ever.

A download that breaks off goes on where it stopped. The digest of the first fetch is kept beside the file and
checked whenever the file is used or fetched again. Writers of one file wait for each other.
"""

import contextlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from trainers.disk import alone, digest_file, disk_named, replace
from trainers.errors import DataError

CACHE_VARIABLE = "RMSWEEP_CACHE"
ATTEMPTS = 4
TIMEOUT_S = 30.0

_PIECE_BYTES = 1 << 20
_PAUSE_S = 0.5

# Takes how many bytes are there, and how many it will be, if that is known.
Report = Callable[[int, int | None], object]


class _Again(Exception):
    """A fault that may pass."""


def cache_folder() -> Path:
    """Where fetched files are kept: $RMSWEEP_CACHE, or ~/.cache/rmsweep."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/rmsweep").expanduser()


def fetch(url: str, file: Path, *, what: str, pause_s: float = _PAUSE_S) -> Path:
    """`file`, downloaded from `url` where it is not there. Raises DataError, which says what to put where by hand."""
    noted = file.with_name(f"{file.name}.sha256")
    with alone(file):
        if file.is_file():
            _note_or_check(file, noted, url, what)
            return file
        part = file.with_name(f"{file.name}.part")
        _download(url, part, file, what, pause_s)
        try:
            _note_or_check(part, noted, url, what)
        except DataError:
            part.unlink()
            raise
        part.replace(file)
        return file


def _note_or_check(file: Path, noted: Path, url: str, what: str) -> None:
    found = digest_file(file)
    if not noted.is_file():
        replace(noted, found + "\n")
        return
    expected = noted.read_text().strip()
    if found != expected:
        raise DataError(
            f"{what}: {url if file.suffix == '.part' else file} has the digest {found[:16]}…, but at the first fetch it "
            f"had {expected[:16]}… ({noted}). Delete {file.name.removesuffix('.part')} to fetch it again, or {noted.name} "
            "too to take what is there now."
        )


def _download(url: str, part: Path, file: Path, what: str, pause_s: float) -> None:
    with _progress(what) as report:
        for attempt in range(ATTEMPTS):
            try:
                _continue(url, part, report)
                return
            except _Again as error:
                if attempt + 1 < ATTEMPTS:
                    time.sleep(pause_s * 2**attempt)
                    continue
                raise _by_hand(url, file, what, str(error)) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _by_hand(url, file, what, str(error) or repr(error)) from error


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Report]:
    """How far the download is, on stderr: a bar with rate and time left on a terminal, one line elsewhere."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        # No address: that of a mirror may hold a password.
        print(f"{what}: downloading", file=sys.stderr)
        yield lambda done, total: None
        return
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _continue(url: str, part: Path, report: Report) -> None:
    """Append what is missing of `url` to `part`. Raises _Again where it broke off."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            # A server that knows no ranges answers with the whole file.
            fresh = answer.status != http.HTTPStatus.PARTIAL_CONTENT
            length = answer.headers.get("Content-Length")
            before = 0 if fresh else have
            total = None if length is None else before + int(length)
            report(before, total)
            with disk_named(part, int(length or 0)), part.open("wb" if fresh else "ab") as stream:
                received = 0
                while piece := answer.read(_PIECE_BYTES):
                    stream.write(piece)
                    received += len(piece)
                    report(before + received, total)
                stream.flush()
                os.fsync(stream.fileno())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or error.code >= 500:
            raise _Again(f"the server answered {error.code}") from error
        raise OSError(f"the server answered {error.code} {error.reason}") from error
    except (TimeoutError, ConnectionError, http.client.IncompleteRead) as error:
        raise _Again(f"the connection broke off ({error!r})") from error
    # Without a length nobody can tell a whole file from half of one but its digest.
    if length is not None and received < int(length):
        raise _Again(f"the connection broke off after {received} of {length} bytes")


def _by_hand(url: str, file: Path, what: str, why: str) -> DataError:
    return DataError(
        f"{what}: {url} could not be fetched ({why}). With a network, run the same command again; without one, "
        f"fetch that address elsewhere and put it at {file}, or give a copy with --from PATH."
    )
