"""Secrets kept out of everything that is written: logs, tracebacks, MLflow, files, and what is printed.

`redacted` knows a secret by the environment variable that holds it, by its place in a URL, or by its looks.
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
# Shorter values stand in too much ordinary text.
MIN_LENGTH = 6

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AWS_SESSION",
    re.IGNORECASE,
)
# Named like secrets, and none: paths and switches that people need to read in a log.
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
    """Put `***` in the place of every secret of a text."""
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
    """Errors that leave the block hold no secret: Ray writes those of its workers into logs of its own."""
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
    """Redact a log in place: what C code and other processes wrote straight to a descriptor passed no formatter."""
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
    """A tracking URI as it may be printed and stored: without user, password and query."""
    scheme, found, rest = uri.partition("://")
    if not found or scheme in ("sqlite", "file"):
        return uri
    # The last @, as a password that was not quoted may hold one, or a slash.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def without_credentials(text: str, uri: str) -> str:
    """Take out of a text of MLflow's what `shown_uri` leaves out of the URI."""
    shown = shown_uri(uri)
    if shown == uri:
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
    """Values of the environment's secrets, and how a URL or a repr spells them; longest first."""
    values = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    values |= {_password(value) for name, value in os.environ.items() if "://" in value}
    spelt = {
        form
        for value in values
        if len(value) >= MIN_LENGTH
        for form in (value, quote(value), quote(value, safe=""), unquote(value), repr(value)[1:-1])
    }
    return sorted(spelt, key=len, reverse=True)


def _password(url: str) -> str:
    """The password in a URL such as MLFLOW_TRACKING_URI, or nothing."""
    found = re.search(r"://[^\s:/?#@]*:(?P<password>[^\s/?#]+)@", url)
    return found["password"] if found else ""
