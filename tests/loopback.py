"""A server on loopback, for tests of what asks one."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Quiet(BaseHTTPRequestHandler):
    """A handler that writes no line for each request."""

    def log_message(self, *_: object) -> None:
        """Nothing is written."""


class Loopback:
    """Serves from a thread, at a free port, until it is closed; `url` ends without a slash."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # A poll this short makes closing it quick.
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End it, and wait for its thread."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def ask_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask the server at `url`, past every proxy."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
