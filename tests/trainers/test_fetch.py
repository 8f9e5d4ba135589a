"""Fetching from a server that is sometimes broken: whole or not at all, the same bytes for ever."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest

from tests.loopback import Loopback, Quiet
from trainers.data.known import REWRITES, REWRITES_VARIABLE, named_set
from trainers.data.sources import CACHE_VARIABLE, read_pairs
from trainers.errors import DataError


class Server(Loopback):
    """Answers each request by the next of `acts` (the last for ever), and notes what was asked for."""

    def __init__(self, body: bytes) -> None:
        self.acts: list[Callable[[BaseHTTPRequestHandler], None]] = [self.whole]
        self.asked: list[str] = []
        self.body = body
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
        self.whole(handler, cut=100)

    @staticmethod
    def says(code):
        return lambda handler: handler.send_error(code)


@pytest.fixture
def server(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "orig_chosen": "o", "orig_index": 0}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "made")
    server = Server((tmp_path / "made" / "data-00000-of-00001.arrow").read_bytes())
    yield server
    server.close()


@pytest.fixture
def get(server, tmp_path, monkeypatch):
    """Read the test split of a rewriting from the server."""
    monkeypatch.setenv(REWRITES_VARIABLE, f"{server.url}/mirror/")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    spec = named_set("ultrafeedback_spanish")
    return lambda: read_pairs(spec, "test")


PLACE = f"{REWRITES['ultrafeedback_spanish']}/test/data-00000-of-00001.arrow"


def test_a_rewriting_is_fetched_once_from_its_folder_of_the_mirror_without_naming_it(server, get, capsys):
    (pair,) = get()
    assert (pair.chosen, pair.original_chosen) == ("c", "o")
    assert capsys.readouterr().err == "data set ultrafeedback_spanish: downloading\n"
    get()
    assert capsys.readouterr().err == ""
    assert server.asked == [f"/mirror/{PLACE}"]


@pytest.mark.parametrize("act", ["truncated", "404", "nobody there"])
def test_what_does_not_come_whole_is_no_file_and_the_message_says_what_to_put_where(
    server, get, tmp_path, act
):
    server.acts = [server.truncated if act == "truncated" else server.says(404)]
    if act == "nobody there":
        server.close()
    with pytest.raises(DataError) as raised:
        get()
    file = tmp_path / "cache" / "fetched" / PLACE
    for part in ("data set ultrafeedback_spanish", f"{server.url}/mirror/{PLACE}", str(file), "--from PATH"):
        assert part in str(raised.value)
    assert not file.exists()
    if act != "nobody there":
        server.acts = [server.whole]
        assert len(get()) == 1


def test_a_copy_that_was_changed_is_fetched_again_and_other_bytes_than_at_first_are_refused(
    server, get, tmp_path
):
    first = get()
    file, body = tmp_path / "cache" / "fetched" / PLACE, server.body
    file.write_bytes(body[:-1])
    assert get() == first
    assert len(server.asked) == 2
    file.unlink()
    server.body = body[::-1]
    with pytest.raises(DataError, match="does not match the known hash"):
        get()
    assert not file.exists()
    server.body = body
    assert get() == first
