"""What has been asked and answered, one line each, kept before anything else is done with it: paid once."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from trainers.disk import disk_named
from trainers.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer to one request; `key` says what was asked, `fault` why the answer cannot be used."""

    key: str
    attempt: int
    text: str
    id: str
    prompt_tokens: int
    completion_tokens: int
    fault: str | None


class Journal:
    """The answers so far, and those to come. A line that a killed process left half-written is dropped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.prompt_tokens, self.completion_tokens = 0, 0
        self._by_key: dict[str, list[Answered]] = {}
        self._said: dict[tuple[str, str], str] = {}
        self._stream: IO[str] | None = None
        whole = 0
        if file.is_file():
            for number, line in enumerate(file.read_bytes().splitlines(keepends=True)):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._take(Answered(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise DataError(
                        f"{file}, line {number + 1} is no answer ({error}); mend or drop it."
                    ) from error
                whole += len(line)
            os.truncate(file, whole)

    def __enter__(self) -> "Journal":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def add(self, answer: Answered) -> None:
        """Keep an answer, on the disk when this returns."""
        assert self._stream is not None
        with disk_named(self.file):
            self._stream.write(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._take(answer)

    def of(self, key: str) -> list[Answered]:
        """The answers to one request, in order."""
        return self._by_key.get(key, [])

    def all(self) -> list[Answered]:
        """Every answer, those to one request together."""
        return [answer for answers in self._by_key.values() for answer in answers]

    def accepted(self, key: str) -> Answered | None:
        """The first answer that can be used."""
        return next((answer for answer in self.of(key) if answer.fault is None), None)

    def is_anothers(self, key: str, identity: str, text: str) -> bool:
        """Whether the very same answer was given to another request."""
        return self._said.get((identity, text), key) != key

    def _take(self, answer: Answered) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self._by_key.setdefault(answer.key, []).append(answer)
        self._said.setdefault((answer.id, answer.text), answer.key)
