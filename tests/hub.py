"""A hub on loopback that takes what is pushed to it."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.loopback import Loopback, Quiet, ask_at

TOKEN = "hf_" + "s3cret" * 4
FILES = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(preupload|commit)/main")


class PushedHub(Loopback):
    """`private` says of each repository whether it is; `files` are those of all, and only the token's owner comes in."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.takes = True
        outer = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/api/models/").partition("?")[0]
                self.answer({"id": name, "private": outer.private[name]} if name in outer.private else None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(outer.posted(self.path, body) if self.allowed() else None)

            def allowed(self) -> bool:
                return self.headers.get("Authorization") == f"Bearer {TOKEN}"

            def answer(self, said: dict[str, Any] | None) -> None:
                content = json.dumps(
                    said or {"error": f"not for {self.headers.get('Authorization')}"}
                ).encode()
                self.send_response(401 if not self.allowed() else 404 if said is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler)

    def posted(self, path: str, body: bytes) -> dict[str, Any] | None:
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.private.setdefault(name, asked["visibility"] == "private")
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        found = FILES.fullmatch(path)
        if found is None or found["name"] not in self.private or not self.takes:
            return None
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            said = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return {"files": [{"path": item["path"], **said} for item in files]}
        for item in map(json.loads, body.splitlines()):
            if item["key"] == "file":
                self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        return {"commitUrl": f"{self.url}/{found['name']}/commit/{'a' * 40}", "commitOid": "a" * 40}


@contextmanager
def pushed_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushedHub]:
    """Let huggingface_hub speak to a hub of its own, with its token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with closing(PushedHub()) as served:
        ask_at(served.url, monkeypatch)
        yield served
