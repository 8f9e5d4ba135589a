"""An HTTP proxy in front of a real server that has the faults of servers and networks on demand."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

# slow: waits, then forwards · error: 500, nothing forwarded · lost: forwarded, and 500 all the same ·
# hang: takes the request and never answers · late: forwarded once this fault ends, even where the client has gone.
Fault = Literal["none", "slow", "error", "lost", "hang", "late"]


@dataclass(slots=True, kw_only=True)
class _Rule:
    fault: Fault
    only: str
    delay_s: float
    times: float
    over: threading.Event


class Proxy:
    """Forwards to `target` (host:port); `forwarded` and `headers` tell of the requests that arrived there."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.forwarded: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._rule = _Rule(fault="none", only="", delay_s=0.0, times=0, over=threading.Event())
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0
        self.open()

    @property
    def host(self) -> str:
        """Where it listens, or did."""
        return f"127.0.0.1:{self._port}"

    def open(self) -> None:
        """Take connections, at the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def behave(
        self, fault: Fault, *, only: str = "", delay_s: float = 0.0, times: float = float("inf")
    ) -> None:
        """From now on have this fault for the next `times` requests whose path holds `only`; ends the one before."""
        before = self._rule
        self._rule = _Rule(fault=fault, only=only, delay_s=delay_s, times=times, over=threading.Event())
        before.over.set()

    def rule_for(self, path: str) -> _Rule | None:
        """The rule that the request falls under, which it uses up by one."""
        with self._lock:
            rule = self._rule
            if rule.fault == "none" or rule.only not in path or rule.times < 1:
                return None
            rule.times -= 1
            return rule


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is one of the faults."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        rule = self.server.proxy.rule_for(self.path)
        if rule is not None and rule.fault in ("hang", "late"):
            rule.over.wait()
        if rule is not None and rule.fault == "hang":
            self.close_connection = True
            return
        if rule is not None and rule.fault == "slow":
            time.sleep(rule.delay_s)
        if rule is not None and rule.fault == "error":
            self._send(500, b"the server has a fault")
            return
        status, answer = self._forward(body)
        if rule is not None and rule.fault == "lost":
            status, answer = 500, b"done, but the answer is lost"
        self._send(status, answer)

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        proxy = self.server.proxy
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection = http.client.HTTPConnection(proxy.target, timeout=30)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        proxy.forwarded.append(self.path)
        proxy.headers.append(dict(self.headers.items()))
        return answer.status, content

    def _send(self, status: int, content: bytes) -> None:
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def proxy_to(uri: str) -> Iterator[Proxy]:
    """A proxy in front of the server at `uri`."""
    proxy = Proxy(uri.partition("://")[2])
    try:
        yield proxy
    finally:
        proxy.behave("none")
        proxy.close()
