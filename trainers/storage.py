"""Files in folders and objects in buckets: atomic writes, upload and download, full disks as one error.

    ObjectPath("results", "sweeps/demo") / "state.json"

A store is a folder, or a prefix in a bucket whose objects are named like files; code that reads and writes small records
is the same for both. Objects go through obstore. Folders do not: libraries write weights straight into them, and obstore
neither syncs files nor reports a full disk by its errno.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as changed
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlencode, urlsplit

from trainers.errors import StorageError, Unreachable

# The entry of a record that holds its own digest, and the prefix of a file's name until it is complete.
SEAL = "sha256"
DRAFT = ".draft-"
SCHEME = "s3://"
CACHE_VARIABLE = "RMSWEEP_CACHE"
AT_ONCE = 8
# S3 allows 10,000 parts an object: with these, 320 GB.
PART_BYTES = 32 * 2**20
RETRIES = 10
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Messages about a full disk from Rust, PyTorch's zip writer and Arrow.
_NO_ROOM = (
    *("no space left", "os error 28", "disk quota"),
    *("file write failed", "pytorchstreamwriter", "iostream error"),
)
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The name of an object or prefix, and its bucket's endpoint. Holds no credentials and can be pickled.

    It has the methods of pathlib's Path that we use. Reading a missing object raises FileNotFoundError; any other error
    of the object store is raised as Unreachable.
    """

    bucket: str
    key: str = ""
    endpoint: str | None = None
    region: str | None = None

    def __truediv__(self, name: object) -> "ObjectPath":
        return changed(self, key="/".join(part for part in (self.key, str(name).strip("/")) if part))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def parent(self) -> "ObjectPath":
        return changed(self, key=self.key.rpartition("/")[0])

    def read_bytes(self) -> bytes:
        with self.asked("read") as (obstore, client):
            return bytes(obstore.get(client, self.key).bytes())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Put the object, replacing any that is there."""
        with self.asked("written") as (obstore, client):
            obstore.put(client, self.key, content)

    def create(self, text: str) -> bool:
        """Put the object unless there is one; return whether we did. Rarely False if the answer to our request was lost."""
        with self.asked("written") as (obstore, client):
            try:
                obstore.put(client, self.key, text.encode(), mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def upload(self, file: Path) -> str | None:
        """Upload a file atomically, a large one in parts; return the object's ETag."""
        with self.asked("written") as (obstore, client):
            put = obstore.put(client, self.key, file, chunk_size=PART_BYTES, max_concurrency=2)
        return put["e_tag"]

    def download(self, file: Path) -> str:
        """Download the object into a file and return its SHA-256."""
        digest = hashlib.sha256()
        with self.asked("read") as (obstore, client), file.open("wb") as sink:
            for block in obstore.get(client, self.key):
                digest.update(block)
                sink.write(block)
        return digest.hexdigest()

    def is_file(self) -> bool:
        with contextlib.suppress(FileNotFoundError), self.asked("read") as (obstore, client):
            obstore.head(client, self.key)
            return True
        return False

    def is_dir(self) -> bool:
        """Return whether any object is below this name."""
        return any(True for _ in self.glob("*"))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Yield the names that match part by part; a pattern that ends in a slash matches only prefixes."""
        wanted = pattern.rstrip("/").split("/")
        below: dict[tuple[str, ...], bool] = {}
        for name in self._names(deep=len(wanted) > 1):
            parts = name.split("/")
            if len(parts) >= len(wanted):
                below[tuple(parts[: len(wanted)])] = len(parts) > len(wanted)
        for found, is_folder in below.items():
            if (is_folder or not pattern.endswith("/")) and all(map(fnmatchcase, found, wanted)):
                yield self / "/".join(found)

    def sizes(self) -> dict["ObjectPath", int]:
        """Return the size in bytes of this object and of each one below it."""
        with self.asked("listed") as (obstore, client):
            found = [item for page in obstore.list(client, self.key or None) for item in page]
            if self.key and not found:
                with contextlib.suppress(FileNotFoundError):
                    found = [obstore.head(client, self.key)]
        return {changed(self, key=item["path"]): int(item["size"]) for item in found}

    def e_tags(self, most: int) -> dict["ObjectPath", str]:
        """Return the ETag of each object below this name; nothing where there are more than `most`."""
        found: dict[ObjectPath, str] = {}
        with self.asked("listed") as (obstore, client):
            for page in obstore.list(client, self.key, chunk_size=1000):
                found |= {changed(self, key=item["path"]): item["e_tag"] for item in page if item["e_tag"]}
                if len(found) > most:
                    return {}
        return found

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete the object if it is there."""
        with self.asked("removed") as (obstore, client), contextlib.suppress(FileNotFoundError):
            obstore.delete(client, self.key)

    def remove_below(self) -> None:
        """Delete every object below this name."""
        paths = [path.key for path in self.sizes()]
        with self.asked("removed") as (obstore, client), contextlib.suppress(FileNotFoundError):
            obstore.delete(client, paths)

    def _names(self, *, deep: bool) -> list[str]:
        """Return the names of all objects below this one, or of its direct children, prefixes with a slash at the end."""
        with self.asked("listed") as (obstore, client):
            if deep:
                names = [item["path"] for page in obstore.list(client, self.key or None) for item in page]
            else:
                found = obstore.list_with_delimiter(client, self.key or None)
                names = [item["path"] for item in found["objects"]]
                names += [f"{path}/" for path in found["common_prefixes"]]
        return [name.removeprefix(self.key).lstrip("/") for name in names]

    def arrow_uri(self) -> str:
        """Return the URI that pyarrow, and so Ray, takes."""
        address = urlsplit(self.endpoint or "")
        where = {"region": self.region, "scheme": address.scheme, "endpoint_override": address.netloc}
        given = {name: value for name, value in where.items() if value}
        return f"{self}?{urlencode(given)}" if given else str(self)

    @contextlib.contextmanager
    def asked(self, done: str) -> Iterator[tuple[Any, Any]]:
        """Yield obstore and a client of the bucket; raise the object store's errors in the block as Unreachable."""
        import obstore

        try:
            yield obstore, _client(self.bucket, self.endpoint, self.region)
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            if isinstance(error, FileNotFoundError) and done == "read":
                raise FileNotFoundError(f"{self} is not there") from error
            place = self.endpoint or "AWS"
            said = f"{self} at {place} cannot be {done} ({_reason(error)}); check the bucket, and run again."
            raise Unreachable(said) from error


# The place of a store; attempts, checkpoints and logs are written to a local folder in either case.
Location: TypeAlias = Path | ObjectPath


@cache
def _client(bucket: str, endpoint: str | None, region: str | None) -> Any:
    """Return obstore's client, one per process, with the credentials that boto3 finds."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    try:
        session = boto3.Session(region_name=region)
        credentials = Boto3CredentialProvider(session)
    except (BotoCoreError, ValueError) as error:
        raise Unreachable(
            f"there are no credentials for {SCHEME}{bucket} ({error}); see docs/storage.md."
        ) from error
    where: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        bucket,
        region=session.region_name or "us-east-1",
        credential_provider=credentials,
        # Limit the time between two reads, not that of a whole large object.
        client_options={
            **{"connect_timeout": "10s", "timeout": "1 day", "read_timeout": "2 minutes"},
            "allow_http": True,
        },
        retry_config={"max_retries": RETRIES},
        **where,
    )


def _reason(error: BaseException) -> str:
    """Return the cause from obstore's long message."""
    said = str(error)
    for told in (r"<Code>(.+?)</Code>\s*<Message>(.+?)</Message>", r'message: "(.+?)"', r"^(.+?)$"):
        if found := re.search(told, said, re.MULTILINE):
            return ": ".join(found.groups()).rstrip(".:")
    return type(error).__name__


def parse_uri(uri: str) -> ObjectPath:
    """Parse `s3://bucket/prefix`; the endpoint is $AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL or AWS. Raises StorageError."""
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    prefix = prefix.strip("/")
    if "@" in uri or "?" in uri or "#" in uri:
        # We do not repeat the address: it may hold a secret.
        raise StorageError(
            "--storage s3://… takes a bucket and a prefix only; give credentials in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or ~/.aws, and another endpoint than AWS's in AWS_ENDPOINT_URL."
        )
    absurd = prefix and {"", ".", ".."}.intersection(prefix.split("/"))
    if absurd or not _BUCKET.fullmatch(bucket) or "\0" in uri:
        raise StorageError(f"--storage {uri[:200]!r} names no bucket and prefix; give s3://BUCKET/PREFIX.")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        address = urlsplit(endpoint)
        named = address.scheme in ("http", "https") and address.hostname
        if not named or "@" in address.netloc or address.query:
            raise StorageError(
                "AWS_ENDPOINT_URL must be http://HOST:PORT or https://HOST, without credentials."
            )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return ObjectPath(bucket, prefix, endpoint, region)


def require_access(root: ObjectPath, *, write: bool) -> None:
    """Check that `root` can be listed and, to `write`, that an object can be put and deleted. Raises StorageError."""
    try:
        list(root.glob("*"))
        if write:
            probe = root / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()
    except Unreachable as error:
        place = root.endpoint or f"AWS ({root.region or 'the region of your profile'})"
        raise StorageError(
            f"--storage {root}: bucket {root.bucket} at {place} cannot be used ({_reason(error.__cause__ or error)}); check "
            "that the bucket exists, that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws, or the machine's role) "
            "may list, read, write and delete in it, and that AWS_REGION and AWS_ENDPOINT_URL are right."
        ) from error


def matching(place: Location, pattern: str) -> list[Location]:
    """Return what matches below a folder or prefix, sorted."""
    found: list[Location] = [*place.glob(pattern)]
    return sorted(found, key=lambda path: str(path).split("/"))


def files_below(folder: Path) -> list[str]:
    """Return the names of the files in a folder, sorted."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def remove_tree(path: Location) -> None:
    """Remove a folder or prefix; gc finds what cannot be removed now."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.remove_below()


def cache_of(root: ObjectPath) -> Path:
    """Return the local folder for a bucket's files, below $RMSWEEP_CACHE or ~/.cache/rmsweep."""
    place = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rmsweep"
    digest = hashlib.sha256(f"{root.endpoint} {root}".encode()).hexdigest()
    return Path(place).absolute() / f"{root.bucket}-{digest[:12]}"


def upload(folder: Path, names: Iterable[str], target: ObjectPath) -> list[str | None]:
    """Upload the files `names` of a folder below `target` and return their ETags. Raises Unreachable, and leaves what is up."""
    return at_once(lambda name: (target / name).upload(folder / name), names)


def fetch(source: ObjectPath, digests: Mapping[str, str], folder: Path) -> list[str]:
    """Download the objects `digests` (name → SHA-256) below `source` into a folder; return the names of damaged ones.

    Files that the folder already holds are kept. Raises Unreachable, and StorageError where the disk is full.
    """
    sound = at_once(lambda name: _have(source / name, folder / name, digests[name]), digests)
    return [name for name, well in zip(digests, sound, strict=True) if not well]


def at_once(act: Callable[[Given], Found], items: Iterable[Given]) -> list[Found]:
    """Apply `act` to the items in a few threads, and return the results in order."""
    items = list(items)
    if len(items) < 2:
        return [act(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(act, items))


def _have(source: ObjectPath, file: Path, digest: str) -> bool:
    if is_written(file, digest):
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with disk_named(file):
            found = source.download(draft)
        if found != digest:
            return False
        draft.replace(file)
    except FileNotFoundError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def digest_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_written(file: Path, digest: str) -> bool:
    """Return whether the file exists with this digest."""
    return file.is_file() and digest_file(file) == digest


def seal(record: dict[str, Any]) -> str:
    """Return the digest of a record without its own seal."""
    content = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(file: Location, text: str) -> bool:
    """Create `file` atomically; return False if it was there before. Of many writers at once, one gets True."""
    if isinstance(file, ObjectPath):
        return file.create(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _draft(file, text.encode()) as draft:
        try:
            os.link(draft, file)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"{file} cannot be written ({error}); choose another --storage.") from error
    return True


def replace(file: Location, content: str | bytes) -> None:
    """Write `content` to `file` atomically, replacing what it held."""
    data = content.encode() if isinstance(content, str) else content
    if isinstance(file, ObjectPath):
        file.write_bytes(data)
        return
    with disk_named(file, len(data)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _draft(file, data) as draft:
            draft.replace(file)


@contextlib.contextmanager
def _draft(file: Path, content: bytes) -> Iterator[Path]:
    """Yield a synced file beside `file` with this content; remove it afterwards."""
    # A plain `open` keeps the modes of the user's umask (`tempfile` would not): others read a shared store.
    draft = file.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with disk_named(file, len(content)), draft.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def require_room(path: Path, need: int) -> None:
    """Raise StorageError where fewer than `need` bytes are free at `path`, which need not exist yet."""
    if _free_bytes(path) < need:
        raise StorageError(_message(path, need))


@contextlib.contextmanager
def disk_named(path: Path, need: int = 0) -> Iterator[None]:
    """Raise an error about a full disk as a StorageError that names `path` and the bytes needed."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not _says_no_room(error):
            raise
        raise StorageError(_message(path, need)) from error


def _says_no_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error).lower() for sign in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _message(path: Path, need: int) -> str:
    wanted = f" about {need / 1e6:,.1f} MB are needed," if need else ""
    return (
        f"no room to write {path}:{wanted} {_free_bytes(path) / 1e6:,.1f} MB are free; make room (`gc` lists what no "
        "sweep needs) and run the same command again."
    )


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock on `file` that one process of this machine can have at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
