"""Keeps secrets out of everything that is written or printed: logs, tracebacks, MLflow and files.

`redacted` recognises a secret by the environment variable that holds it, by its place in a URL, or by its format.
"""

import contextlib
import logging
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from trainers.errors import SweepError

MASK = "***"
# Shorter values occur in ordinary text.
MIN_LENGTH = 6

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AWS_SESSION",
    re.IGNORECASE,
)
# Paths and switches with names like secrets, which people need to read in a log.
_NO_SECRET = re.compile(r"(_PATH|_FILE|_DIR|_MODE)$|^TOKENIZERS_", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?P<before>[a-zA-Z][\w+.-]*://[^\s:/?#@'\"]*:)[^\s/?#'\"]+(?=@)")
_QUERY_SECRET = re.compile(
    r"(?P<before>[?&;][\w.-]*(?:token|secret|password|passwd|signature|api_?key|access_?key)[\w.-]*=)[^\s&;#'\"]+",
    re.IGNORECASE,
)
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[\w-]{16,}|AIza[\w-]{30,})"
)


def redacted(text: str) -> str:
    """Replace every secret of a text by `***`."""
    for value in _secret_values():
        text = text.replace(value, MASK)
    text = _URL_PASSWORD.sub(rf"\g<before>{MASK}", text)
    text = _QUERY_SECRET.sub(rf"\g<before>{MASK}", text)
    return _LOOKS.sub(MASK, text)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return bool(SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextlib.contextmanager
def without_secrets() -> Iterator[None]:
    """Redact the errors that leave the block, since Ray writes those of its workers into its own logs."""
    try:
        yield
    except Exception as error:
        told = traceback.format_exc()
        if redacted(told) == told:
            raise
        if isinstance(error, SweepError):
            raise type(error)(redacted(str(error))) from None
        raise RuntimeError(redacted(told)) from None


def scrub(file: Path) -> None:
    """Redact a log in place: C code and other processes write to it without a formatter."""
    with file.open("r+b") as log:
        written = log.read().decode(errors="surrogateescape")
        clean = redacted(written)
        if clean != written:
            log.seek(0)
            log.write(clean.encode(errors="surrogateescape"))
            log.truncate()


def take_credentials(uri: str) -> str:
    """Move the user and password of an HTTP tracking server from its URI to MLflow's own variables."""
    parts = urlsplit(uri)
    if not parts.scheme.startswith("http") or "@" not in parts.netloc:
        return uri
    user, _, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return urlunsplit(parts._replace(netloc=host))


def shown_uri(uri: str) -> str:
    """Return a tracking URI without user, password and query, to be printed and stored."""
    scheme, found, rest = uri.partition("://")
    if not found or scheme in ("sqlite", "file"):
        return uri
    # The last @, since a password that was not quoted may hold one, or a slash.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def without_credentials(text: str, uri: str) -> str:
    """Remove from a text of MLflow's what `shown_uri` removes from the URI."""
    if (shown := shown_uri(uri)) == uri:
        return text
    credentials, _, _ = uri.partition("://")[2].rpartition("@")
    user, _, password = credentials.partition(":")
    secret = password or user
    text = text.replace(uri, shown)
    if credentials:
        text = text.replace(f"{credentials}@", "")
    for word in {secret, unquote(secret)} - {""}:
        text = text.replace(word, MASK)
    return text


def _secret_values() -> list[str]:
    """Return the environment's secrets, also as a URL or a repr spells them, longest first."""
    values = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    # A URL such as MLFLOW_TRACKING_URI may hold a password.
    urls = (re.search(r"://[^\s:/?#@]*:([^\s/?#]+)@", value) for value in os.environ.values())
    values |= {found[1] for found in urls if found}
    spelt = {
        form
        for value in values
        if len(value) >= MIN_LENGTH
        for form in (value, quote(value), quote(value, safe=""), unquote(value), repr(value)[1:-1])
    }
    return sorted(spelt, key=len, reverse=True)
