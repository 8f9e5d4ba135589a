"""Fetching from a server that is sometimes broken: whole or not at all, the same bytes for ever."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest

from tests.loopback import Loopback, Quiet
from trainers.data.known import REWRITES, REWRITES_VARIABLE, named_set
from trainers.data.sources import CACHE_VARIABLE, fetch, read_pairs
from trainers.errors import DataError
from trainers.specs import DatasetSpec

BODY = bytes(range(256)) * 40


class Server(Loopback):
    """Answers each request by the next of `acts` (the last for ever), and notes what was asked for."""

    def __init__(self) -> None:
        self.acts: list[Callable[[BaseHTTPRequestHandler], None]] = [self.whole]
        self.asked: list[str] = []
        self.body = BODY
        outer = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                act = outer.acts.pop(0) if len(outer.acts) > 1 else outer.acts[0]
                act(self)

        super().__init__(Handler)

    def whole(self, handler, cut=None):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        handler.wfile.write(self.body[:cut])

    def truncated(self, handler):
        self.whole(handler, cut=1000)

    @staticmethod
    def says(code):
        return lambda handler: handler.send_error(code)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def get(server, file):
    return fetch(f"{server.url}/set/data.arrow", file, what="data set x")


def test_a_file_is_fetched_once_and_said_in_a_line_without_its_address(server, tmp_path, capsys):
    file = tmp_path / "cache" / "data.arrow"
    assert get(server, file).read_bytes() == BODY
    assert capsys.readouterr().err == "data set x: downloading\n"
    get(server, file)
    assert capsys.readouterr().err == ""
    assert len(server.asked) == 1
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".arrow", ".lock", ".sha256"]


@pytest.mark.parametrize("act", ["truncated", "404", "nobody there"])
def test_what_does_not_come_whole_is_no_file_and_the_message_says_what_to_put_where(server, tmp_path, act):
    file = tmp_path / "data.arrow"
    server.acts = [server.truncated if act == "truncated" else server.says(404)]
    if act == "nobody there":
        server.close()
    with pytest.raises(DataError) as raised:
        get(server, file)
    for part in ("data set x", f"{server.url}/set/data.arrow", str(file), "--from PATH"):
        assert part in str(raised.value)
    assert not list(tmp_path.glob("*arrow"))
    if act != "nobody there":
        server.acts = [server.whole]
        assert get(server, file).read_bytes() == BODY


def test_other_bytes_than_at_the_first_fetch_are_refused(server, tmp_path):
    file = tmp_path / "data.arrow"
    get(server, file)
    file.unlink()
    server.body = BODY[::-1]
    with pytest.raises(DataError, match="does not match the known hash"):
        get(server, file)
    assert not file.exists()
    server.body = BODY
    assert get(server, file).read_bytes() == BODY


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(server, tmp_path):
    file = get(server, tmp_path / "data.arrow")
    file.write_bytes(BODY[:-1])
    assert get(server, file).read_bytes() == BODY
    assert len(server.asked) == 2


def test_a_rewriting_comes_from_its_folder_of_the_mirror(server, tmp_path, monkeypatch):
    from datasets import Dataset

    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "orig_chosen": "o", "orig_index": 0}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "made")
    server.body = (tmp_path / "made" / "data-00000-of-00001.arrow").read_bytes()
    monkeypatch.setenv(REWRITES_VARIABLE, f"{server.url}/mirror/")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    spec = named_set("ultrafeedback_spanish")
    assert isinstance(spec, DatasetSpec)
    (pair,) = read_pairs(spec, "test")
    assert (pair.chosen, pair.original_chosen) == ("c", "o")
    read_pairs(spec, "test")
    assert server.asked == [f"/mirror/{REWRITES['ultrafeedback_spanish']}/test/data-00000-of-00001.arrow"]
