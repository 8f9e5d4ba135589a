"""A real S3 server on loopback (moto's), and what a command that uses it must find in its environment."""

import contextlib
import itertools
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.storage import ObjectPath, parse_uri

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """An empty bucket, and the environment in which it is reached."""

    endpoint: str
    name: str
    environment: dict[str, str]

    @property
    def uri(self) -> str:
        """What is given as --storage."""
        return f"s3://{self.name}/sweeps/demo"

    @property
    def root(self) -> ObjectPath:
        """The same as a place, in a process that has the environment."""
        return parse_uri(self.uri)


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The endpoint of a server in threads of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(endpoint: str, cache: Path) -> Bucket:
    """Make a bucket; `cache` is for what is fetched from it."""
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RMSWEEP_CACHE": str(cache),
    }
    return Bucket(endpoint=endpoint, name=name, environment=environment)
