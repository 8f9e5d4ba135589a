"""A RAY_ADDRESS where no cluster answers: said, given up, and the wait ends when it is told to. No Ray is started."""

import contextlib
import functools
import os
import signal
import socket
import time
from concurrent import futures

import grpc
import pytest

from tests.faults.lives import grid_life, lived, output
from trainers.errors import PlanError

REFUSED = "127.0.0.1:1"


@contextlib.contextmanager
def somebody(kind):
    """A server of another kind: the address that it listens at."""
    if kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"127.0.0.1:{server.getsockname()[1]}"
    else:
        server = grpc.server(futures.ThreadPoolExecutor(1))
        if kind == "head":
            answer = grpc.unary_unary_rpc_method_handler(lambda *_: b"")
            service = grpc.method_handlers_generic_handler(
                "ray.rpc.NodeInfoGcsService", {"CheckAlive": answer}
            )
            server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None)


@pytest.fixture
def cluster(monkeypatch):
    from orchestrator.run.ray import cluster

    for name, seconds in (("SAY_AFTER_S", 0.2), ("GIVE_UP_AFTER_S", 0.6), ("PROBE_S", 0.3)):
        monkeypatch.setattr(cluster, name, seconds)
    # Ray puts this machine's outward address in the place of 127.0.0.1.
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda address: address)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray waits without a word"))
    return cluster


@pytest.mark.parametrize("kind", ["silent", "another service"])
def test_who_listens_but_is_no_head_is_told_of_and_given_up(cluster, monkeypatch, kind):
    said = []
    with somebody(kind) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(PlanError, match=f"no Ray cluster answers at {address} within"):
            cluster.join_ray(said.append)
    assert [f"no Ray cluster answers at {address} yet" in text for text in said] == [True]


def test_a_head_that_answers_is_joined_without_a_word(cluster, monkeypatch):
    joined, said = [], []
    monkeypatch.setattr(cluster.ray, "init", lambda **options: joined.append(options["address"]))
    with somebody("head") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster.join_ray(said.append)
        assert (joined, said) == ([address], [])


def with_address(address, say_after_s, give_up_after_s):
    """What a command does first that has this RAY_ADDRESS and less patience."""
    os.environ["RAY_ADDRESS"] = address
    from orchestrator.run.ray import cluster

    cluster.SAY_AFTER_S, cluster.GIVE_UP_AFTER_S = say_after_s, give_up_after_s


@pytest.mark.parametrize(
    ("address", "profile", "message"),
    [
        (REFUSED, "laptop", f"no Ray cluster answers at {REFUSED} within 1 s"),
        ("ray://head:10001", "auto", "ray job submit"),
    ],
)
def test_a_command_ends_with_2(tmp_path, address, message, profile):
    before = functools.partial(with_address, address, 0.2, 1.0)
    said = lived(tmp_path / "store", ["run", "--profile", profile], before, exits=2, within_s=60)
    assert message in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_wait_ends_at_once_when_it_is_told_to(tmp_path, number):
    storage = tmp_path / "store"
    life = grid_life(storage, ["--profile", "laptop"], functools.partial(with_address, REFUSED, 0.2, 600.0))
    deadline = time.monotonic() + 60
    while "yet; given up after 600 s" not in output(storage) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(life.pid, number)
    life.join(10)
    assert life.exitcode == 130, output(storage)
