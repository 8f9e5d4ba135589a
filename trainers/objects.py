"""Objects in an S3 bucket by names like those of files: what the store and the checkpoints use of pathlib's Path.

    ObjectPath(bucket="results", key="sweeps/demo") / "state.json"

An object store has no rename, no link and no append, and so has this. An object is put whole: readers see what was
there before or all of it, never a part. Credentials are never held here: pyarrow finds them in the environment, in
~/.aws or with the machine's own role, on every node for itself.
"""

import contextlib
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from trainers.errors import StorageError, Unreachable

SCHEME = "s3://"
# Parts of a large object: of 10,000, which is all that S3 takes, they make up 640 GB.
BLOCK_BYTES = 64 * 2**20
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ATTEMPTS = 10
_CONNECT_S = 10.0
_PAUSE_S = 0.1


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A name in a bucket, and where the bucket is. Can be sent to another process.

    Reading raises FileNotFoundError where there is no such object, else Unreachable; so does writing.
    """

    bucket: str
    key: str = ""
    endpoint: str | None = None
    region: str | None = None

    def __truediv__(self, name: object) -> "ObjectPath":
        return self._at("/".join(part for part in (self.key, str(name).strip("/")) if part))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> "ObjectPath":
        """What it lies below."""
        return self._at(self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "ObjectPath":
        """Another one beside it."""
        return self.parent / name

    def relative_to(self, other: "ObjectPath") -> PurePosixPath:
        """The name below `other`."""
        return PurePosixPath(self.key).relative_to(other.key)

    def read_bytes(self) -> bytes:
        """The object as one writer put it."""
        before: tuple[str, bytes] | None = None
        for _ in range(_ATTEMPTS):
            with self.named("read"), self.filesystem().open_input_stream(self.in_bucket) as stream:
                read = bytes(stream.metadata().get(b"ETag", b"")).decode().strip('"'), bytes(stream.read())
            # pyarrow asks for the size first: where another object is put between its two requests, what it reads is cut
            # or runs over. A tag is the content's MD5, or with some encryptions nothing that can be checked.
            if read[0] == hashlib.md5(read[1], usedforsecurity=False).hexdigest() or read == before:
                return read[1]
            before = read
            time.sleep(random.uniform(0.0, _PAUSE_S))
        raise Unreachable(f"{self} changes faster than it can be read; run again.")

    def read_text(self) -> str:
        """The object as UTF-8."""
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        """Put the object: at once, in the place of whatever was there."""
        with self.named("written"), self.filesystem().open_output_stream(self.in_bucket) as stream:
            stream.write(text.encode())

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._kind() == "File"

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return self._kind() == "Directory"

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders to make."""

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What is right below."""
        yield from (path for path, _ in self._listed())

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """What matches, part by part; with a slash at the end only what has something below it."""
        first, _, rest = pattern.partition("/")
        for path, folder in self._listed():
            if not fnmatchcase(path.name, first) or ("/" in pattern and not folder):
                continue
            if rest:
                yield from path.glob(rest)
            else:
                yield path

    def sizes(self) -> dict["ObjectPath", int]:
        """Every object of or below this name, with its bytes."""
        if self.is_file():
            return {self: int(self._info().size)}
        found = self._list(recursive=True)
        return {self._from(info): int(info.size) for info in found if info.type.name == "File"}

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            with self.named("removed"):
                self.filesystem().delete_file(self.in_bucket)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_below(self) -> None:
        """Delete every object below this name; nothing happens where there is none."""
        if self.is_dir():
            with self.named("removed"):
                self.filesystem().delete_dir(self.in_bucket)

    @property
    def in_bucket(self) -> str:
        """What pyarrow calls it."""
        return f"{self.bucket}/{self.key}".rstrip("/")

    def filesystem(self) -> Any:
        """pyarrow's file system of the bucket, one for each process."""
        return _filesystem(self.endpoint, self.region)

    def _at(self, key: str) -> "ObjectPath":
        return ObjectPath(self.bucket, key, self.endpoint, self.region)

    def _from(self, info: Any) -> "ObjectPath":
        return self._at(str(info.path).removeprefix(f"{self.bucket}/"))

    def _listed(self) -> list[tuple["ObjectPath", bool]]:
        found = self._list(recursive=False)
        return sorted((self._from(info), info.type.name == "Directory") for info in found)

    def _list(self, *, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.in_bucket, recursive=recursive, allow_not_found=True)
        with self.named("listed"):
            return list(self.filesystem().get_file_info(selector))

    def _info(self) -> Any:
        with self.named("read"):
            return self.filesystem().get_file_info(self.in_bucket)

    def _kind(self) -> str:
        return str(self._info().type.name)

    @contextlib.contextmanager
    def named(self, done: str) -> Iterator[None]:
        """Turn what S3 answers in the block into Unreachable; FileNotFoundError and what a disk says pass."""
        try:
            yield
        except OSError as error:
            if error.errno is not None or isinstance(error, Unreachable):
                raise
            raise Unreachable(
                f"{self} at {self.endpoint or 'AWS'} cannot be {done} ({reason(error)}); see to the bucket, and run again."
            ) from error


# Where a store may be: everything but attempts at artifacts, checkpoints and logs, which are local, is in one of these.
Location: TypeAlias = Path | ObjectPath


def matching(place: Location, pattern: str) -> list[Location]:
    """What matches below a folder or a name in a bucket, sorted."""
    found: list[Location] = [*place.glob(pattern)]
    return sorted(found, key=lambda path: str(path).split("/"))


def reason(error: BaseException) -> str:
    """Of what pyarrow says the part that tells why."""
    said = str(error).partition("AWS Error ")[2] or str(error)
    return re.sub(r" *\(Request ID: [^)]*\)", "", said).strip().rstrip(".:")


@cache
def _filesystem(endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    where: dict[str, Any] = {}
    if endpoint is not None:
        parts = urlsplit(endpoint)
        where = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    return S3FileSystem(
        region=region,
        connect_timeout=_CONNECT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        # A small object is then one request, and what cannot be written says so when it is.
        allow_delayed_open=True,
        **where,
    )


def parse_uri(uri: str) -> ObjectPath:
    """The place that `s3://bucket/prefix` names, at $AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL or AWS. Raises StorageError."""
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    parts = prefix.strip("/").split("/") if prefix.strip("/") else []
    if "@" in uri or "?" in uri or "#" in uri:
        # Not repeated: it may hold a secret.
        raise StorageError(
            "--storage s3://… takes a bucket and a prefix only; give credentials in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or ~/.aws, and another endpoint than AWS's in AWS_ENDPOINT_URL."
        )
    if not _BUCKET.fullmatch(bucket) or any(part in ("", ".", "..") for part in parts) or "\0" in uri:
        raise StorageError(f"--storage {uri[:200]!r} names no bucket and prefix; give s3://BUCKET/PREFIX.")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        _require_endpoint(endpoint)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    if endpoint is not None:
        region = region or "us-east-1"
    return ObjectPath(bucket, "/".join(parts), endpoint, region)


def require_access(root: ObjectPath, *, write: bool) -> None:
    """List what is below `root` and, to `write`, put and delete an object there. Raises StorageError."""
    try:
        _require_bucket(root)
        if write:
            probe = root / f".probe-{uuid.uuid4().hex}"
            probe.write_text(probe.name)
            probe.unlink()
    except OSError as error:
        place = root.endpoint or f"AWS ({root.region or 'region by the bucket'})"
        raise StorageError(
            f"--storage {root}: bucket {root.bucket} at {place} cannot be used ({reason(error.__cause__ or error)}); see "
            "that the bucket exists, that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws, or the machine's role) "
            "may list, read, write and delete in it, and that AWS_REGION and AWS_ENDPOINT_URL are right."
        ) from error


def _require_bucket(root: ObjectPath) -> None:
    from pyarrow.fs import FileSelector

    # Asked to allow what is not found, pyarrow lists a bucket that is not there as an empty one.
    selector = FileSelector(root.in_bucket, recursive=False, allow_not_found=False)
    with contextlib.suppress(FileNotFoundError), root.named("listed"):
        root.filesystem().get_file_info(selector)


def _require_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise StorageError("AWS_ENDPOINT_URL must be http://HOST:PORT or https://HOST, without credentials.")
