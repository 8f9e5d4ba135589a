"""Fetching from a server that is sometimes broken: whole or not at all, the same bytes for ever."""

import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest

from tests.loopback import Loopback, Quiet
from trainers.data.fetch import ATTEMPTS, CACHE_VARIABLE, fetch
from trainers.data.named import REWRITES, REWRITES_VARIABLE
from trainers.data.sources import read_pairs
from trainers.errors import DataError
from trainers.specs import DatasetSpec

BODY = bytes(range(256)) * 40


class Server(Loopback):
    """Answers each request by the next of `acts` (the last for ever), and notes what was asked for."""

    def __init__(self) -> None:
        self.acts: list[Callable[[BaseHTTPRequestHandler, int], None]] = [self.whole]
        self.asked: list[tuple[str, str | None]] = []
        self.body = BODY
        outer = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                ranged = self.headers.get("Range")
                outer.asked.append((self.path, ranged))
                act = outer.acts.pop(0) if len(outer.acts) > 1 else outer.acts[0]
                act(self, int(ranged.removeprefix("bytes=").removesuffix("-")) if ranged else 0)

        super().__init__(Handler)

    def whole(self, handler, start, *, cut=None):
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(self.body) - start))
        handler.end_headers()
        handler.wfile.write(self.body[start:cut])

    def with_a_pause(self, handler, start):
        """The first half, and what is left two seconds later."""
        self.whole(handler, start, cut=len(self.body) // 2)
        handler.wfile.flush()
        time.sleep(2.0)
        handler.wfile.write(self.body[len(self.body) // 2 :])

    def late(self, handler, start):
        """The header at once, the body two seconds later."""
        self.whole(handler, start, cut=start)
        handler.wfile.flush()
        time.sleep(2.0)
        handler.wfile.write(self.body[start:])

    def truncated(self, handler, start):
        self.whole(handler, start, cut=start + 1000)

    def without_ranges(self, handler, start):
        self.whole(handler, 0)

    @staticmethod
    def says(code):
        def act(handler, start):
            handler.send_error(code)

        return act


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def get(server, file):
    return fetch(f"{server.url}/set/data.arrow", file, what="data set x", pause_s=0.001)


def test_a_file_is_fetched_once(server, tmp_path):
    file = tmp_path / "cache" / "data.arrow"
    assert get(server, file).read_bytes() == BODY
    get(server, file)
    assert len(server.asked) == 1
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".arrow", ".lock", ".sha256"]


def test_a_truncated_body_is_continued_where_it_stopped(server, tmp_path):
    server.acts = [server.truncated, server.truncated, server.whole]
    assert get(server, tmp_path / "data.arrow").read_bytes() == BODY
    assert [ranged for _, ranged in server.asked] == [None, "bytes=1000-", "bytes=2000-"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.acts = [server.truncated, server.without_ranges]
    assert get(server, tmp_path / "data.arrow").read_bytes() == BODY


def test_a_body_that_stays_truncated_is_no_file_and_goes_on_in_the_next_command(server, tmp_path):
    file = tmp_path / "data.arrow"
    server.acts = [server.truncated]
    with pytest.raises(DataError, match=r"broke off after 1000 of \d+ bytes.*run the same command again"):
        get(server, file)
    assert not file.exists()
    server.acts = [server.whole]
    assert get(server, file).read_bytes() == BODY
    assert server.asked[-1][1] == f"bytes={1000 * ATTEMPTS}-"


def test_a_part_that_is_longer_than_the_file_is_dropped(server, tmp_path):
    file = tmp_path / "data.arrow"
    file.with_name("data.arrow.part").write_bytes(b"x" * 20000)
    server.acts = [server.says(416), server.whole]
    assert get(server, file).read_bytes() == BODY


def test_a_server_that_recovers_is_waited_for(server, tmp_path):
    server.acts = [server.says(503), server.says(500), server.whole]
    assert get(server, tmp_path / "data.arrow").read_bytes() == BODY


def test_what_is_not_there_is_said_at_once_with_what_to_put_where(server, tmp_path):
    file = tmp_path / "data.arrow"
    server.acts = [server.says(404)]
    with pytest.raises(DataError) as raised:
        get(server, file)
    for part in ("data set x", f"{server.url}/set/data.arrow", "404", str(file), "--from PATH"):
        assert part in str(raised.value)
    assert len(server.asked) == 1
    assert not file.exists()


def test_other_bytes_than_at_the_first_fetch_are_refused(server, tmp_path):
    file = tmp_path / "data.arrow"
    get(server, file)
    file.unlink()
    server.body = BODY[::-1]
    with pytest.raises(DataError, match=r"has the digest \w{16}…, but at the first fetch it had"):
        get(server, file)
    assert not file.exists()
    server.body = BODY
    assert get(server, file).read_bytes() == BODY


def test_a_file_that_was_changed_in_the_cache_is_refused(server, tmp_path):
    file = get(server, tmp_path / "data.arrow")
    file.write_bytes(BODY[:-1])
    with pytest.raises(DataError, match=r"Delete data\.arrow to fetch it again"):
        get(server, file)


def test_nobody_there_is_one_message(server, tmp_path):
    server.close()
    with pytest.raises(DataError, match=r"could not be fetched .*put it at .*data\.arrow"):
        get(server, tmp_path / "data.arrow")


@pytest.fixture
def terminal(monkeypatch, capsys):
    """As if stderr were a terminal; called, it gives what that was sent, without control sequences."""
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainers.data.fetch._PIECE_BYTES", 1024)
    return lambda: re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", capsys.readouterr().err)


def test_a_terminal_shows_how_far_a_download_is_its_rate_and_the_time_left(server, tmp_path, terminal):
    server.acts = [server.with_a_pause]
    assert get(server, tmp_path / "data.arrow").read_bytes() == BODY
    said = terminal()
    assert re.search(r"data set x \S+ 5\.1/10\.2 kB [\d.]+ [kM]B/s 0:00:0\d", said)
    assert re.search(r"data set x \S+ 10\.2/10\.2 kB", said)


def test_the_bar_of_a_download_that_goes_on_begins_with_what_is_there(server, tmp_path, terminal):
    tmp_path.joinpath("data.arrow.part").write_bytes(BODY[:9216])
    server.acts = [server.late]
    assert get(server, tmp_path / "data.arrow").read_bytes() == BODY
    assert re.search(r"data set x \S+ 9\.2/10\.2 kB \? -:--:--", terminal())


def test_without_a_terminal_a_download_is_one_line_and_a_file_that_is_there_none(server, tmp_path, capsys):
    server.acts = [server.truncated, server.whole]
    get(server, tmp_path / "data.arrow")
    assert capsys.readouterr().err == "data set x: downloading\n"
    get(server, tmp_path / "data.arrow")
    assert capsys.readouterr().err == ""


def test_a_rewriting_comes_from_its_folder_of_the_mirror(server, tmp_path, monkeypatch, shared):
    from datasets import Dataset

    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "orig_chosen": "o", "orig_index": 0}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "made")
    server.body = (tmp_path / "made" / "data-00000-of-00001.arrow").read_bytes()
    monkeypatch.setenv(REWRITES_VARIABLE, f"{server.url}/mirror/")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    from trainers.data.named import named_set

    spec = named_set("ultrafeedback_spanish")
    assert isinstance(spec, DatasetSpec)
    (pair,) = read_pairs(spec, "test")
    assert (pair.chosen, pair.original_chosen) == ("c", "o")
    assert server.asked == [
        (f"/mirror/{REWRITES['ultrafeedback_spanish']}/test/data-00000-of-00001.arrow", None)
    ]
    read_pairs(spec, "test")
    assert len(server.asked) == 1
