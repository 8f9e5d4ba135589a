"""Terminals that cannot show every sign: what they cannot is written in ASCII, and nothing ends for it."""

import codecs
import io
import sys
import unicodedata

READABLE = "rmsweep-readable"
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("·•", "*"),
        **dict.fromkeys("─━–—−", "-"),
        **dict.fromkeys("│┃", "|"),
        **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩┳╇", "+"),
        "×": "x",
        "±": "+-",
        "β": "beta",
        "σ": "sigma",
        "√": "sqrt",
        "≤": "<=",
        "≥": ">=",
        "→": "->",
        "…": "...",
        "’": "'",
    }
)


def write_any_text() -> None:
    """Let stdout and stderr take every text, whatever the locale or PYTHONIOENCODING says."""
    codecs.register_error(READABLE, _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not is_utf(stream.encoding):
            stream.reconfigure(errors=READABLE)


def is_utf(encoding: str | None) -> bool:
    """Whether an encoding holds every sign; no encoding is text in memory, which does."""
    return encoding is None or encoding.lower().startswith("utf")


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(sign: str) -> str:
    plain = unicodedata.normalize("NFKD", sign.translate(_SIGNS))
    return plain.encode("ascii", "ignore").decode() or "?"
