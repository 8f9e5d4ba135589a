"""Base models come from the hub before trials run: which of a sweep, which files of each, and where. A hub on loopback."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli.options import Options
from orchestrator.cli.run import fetch_models_here
from orchestrator.cli.session import Session
from orchestrator.spec.stages import TrialPlan
from orchestrator.store.artifacts import Store
from tests.loopback import Loopback, Quiet, ask_at
from tests.orchestrator.sweep_samples import plan, trial

REVISION = "a" * 40
MODEL = "acme/model"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "model.safetensors.index.json"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    **dict.fromkeys(SHARDS, b"weights" * 5000),
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"another format",
    "README.md": b"prose",
}
WANTED = {"config.json", "tokenizer.json", INDEX, *SHARDS}


class Hub(Loopback):
    """Serves FILES as one repository, and notes what was fetched; `down` refuses everything."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.down = False
        outer = self

        class Handler(Quiet):
            def answer(self, *, body: bool) -> None:
                path, resolve = self.path.split("?")[0], f"/{MODEL}/resolve/{REVISION}/"
                if outer.down:
                    self.send_error(403)
                elif path == f"/api/models/{MODEL}/tree/{REVISION}":
                    listed = [
                        {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                        for number, (name, content) in enumerate(FILES.items())
                    ]
                    self.send(json.dumps(listed).encode(), body=body)
                elif path.startswith(resolve):
                    name = path.removeprefix(resolve)
                    if body:
                        outer.fetched.append(name)
                    self.send(FILES[name], body=body, tag=f"{list(FILES).index(name):040x}")
                else:
                    self.send_error(404)

            def send(self, content: bytes, *, body: bool, tag: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                if tag:
                    self.send_header("ETag", f'"{tag}"')
                    self.send_header("X-Repo-Commit", REVISION)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

        super().__init__(Handler)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    served = Hub()
    ask_at(served.url, monkeypatch)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("orchestrator.cli.run.cluster_address", lambda: None)
    yield served
    served.close()


def on_hub(seed: int = 0) -> TrialPlan:
    """A trial of the hub's model; its reference pass and its training load the same weights."""
    return plan(trial(seed=seed), name="hubbed", location=MODEL, revision=REVISION)


def session_of(tmp_path: Path) -> Session:
    return Session(
        options=Options(),
        sweep_name="demo",
        store=Store(tmp_path / "store"),
        tracking_uri="http://host",
        folder=tmp_path,
        console=Console(file=io.StringIO(), width=200),
    )


def test_what_loading_reads_of_a_model_is_fetched_once_and_nothing_else(hub, tmp_path, capsys):
    session, todo = session_of(tmp_path), [on_hub(seed) for seed in (0, 1)]
    fetch_models_here(session, todo)
    assert sorted(hub.fetched) == sorted(WANTED)
    folder = next((tmp_path / "hub").glob(f"*/snapshots/{REVISION}"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: FILES[name] for name in WANTED
    }
    fetch_models_here(session, todo)
    assert len(hub.fetched) == len(WANTED)
    assert session.console.file.getvalue() == "model hubbed: downloading acme/model\n"
    # Where there is no terminal, that line is all.
    assert capsys.readouterr().err == ""


def test_a_shard_that_is_not_there_is_fetched(hub, tmp_path):
    session, todo = session_of(tmp_path), [on_hub()]
    fetch_models_here(session, todo)
    next((tmp_path / "hub").glob(f"*/snapshots/{REVISION}/{SHARDS[1]}")).resolve().unlink()
    fetch_models_here(session, todo)
    assert hub.fetched.count(SHARDS[1]) == 2
    assert hub.fetched.count(SHARDS[0]) == 1


def test_the_hubs_bar_is_seen_on_a_terminal(hub, tmp_path, monkeypatch, capsys):
    session, todo = session_of(tmp_path), [on_hub()]
    from huggingface_hub.utils import enable_progress_bars

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    # Commands that other tests ran in this process may have put them out.
    enable_progress_bars()
    fetch_models_here(session, todo)
    said = capsys.readouterr().err
    assert re.search(r"Fetching 5 files: +100%.*5/5", said)
    assert re.search(r"100%.*70\.1kB / 70\.1kB", said)


@pytest.mark.parametrize("where", ["a cluster", "offline"])
def test_where_nothing_is_loaded_here_nothing_is_fetched(hub, tmp_path, monkeypatch, where):
    session = session_of(tmp_path)
    if where == "a cluster":
        monkeypatch.setattr("orchestrator.cli.run.cluster_address", lambda: "127.0.0.1:6379")
    if where == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetch_models_here(session, [on_hub()])
    assert hub.fetched == []
    assert session.console.file.getvalue() == ""


def test_a_hub_that_refuses_ends_nothing(hub, tmp_path):
    session, hub.down = session_of(tmp_path), True
    fetch_models_here(session, [on_hub()])
    assert re.search(
        r"model hubbed: not downloaded \(\w+\); its trials try again", session.console.file.getvalue()
    )
