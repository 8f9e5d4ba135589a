"""A hub on loopback that takes what is pushed to it."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.loopback import Loopback, Quiet, ask_at

TOKEN = "hf_" + "s3cret" * 4
FILES = re.compile(
    r"/api/models/(?P<name>[^/]+/[^/]+)/(preupload|commit)/main|/(?P<lfs>.+)\.git/info/lfs/objects/batch"
)


class PushedHub(Loopback):
    """`private` says of each repository whether it is; `files` are those of all, and only the token's owner comes in."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.takes = True
        outer = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/api/models/").partition("?")[0]
                self.answer({"id": name, "private": outer.private[name]} if name in outer.private else None)

            def do_POST(self) -> None:
                body = self.body()
                self.answer(outer.posted(self.path, body) if self.allowed() else None)

            def do_PUT(self) -> None:
                outer.large[self.path.rpartition("/")[2]] = self.body()
                self.answer({})

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def allowed(self) -> bool:
                # An address to put a large file at is a permission by itself.
                return self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {TOKEN}"

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
        if found is None or (found["name"] or found["lfs"]) not in self.private or not self.takes:
            return None
        if found["lfs"]:
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    item | {"actions": {"upload": {"href": f"{self.url}/put/{item['oid']}"}}}
                    for item in objects
                ],
            }
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": item["path"], "uploadMode": modes[item["path"].endswith(".safetensors")]}
                    | {"shouldIgnore": False, "oid": None}
                    for item in files
                ]
            }
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
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
