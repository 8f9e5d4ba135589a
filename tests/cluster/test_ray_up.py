"""`ray up` for real, over ssh to this machine: up, a submitted sweep, status, report, MLflow, down; nothing is left.

The commands are those of docs/cluster.md. `ray stop`, which `ray up` and `ray down` call, ends every Ray process of
this host; hence `pytest tests/cluster --run-alone`, and nothing where somebody else's Ray runs.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster.documented import documented
from tests.cluster.machine import ROOT, Machine, free_port, local_variant, machine
from tests.conftest import missing
from tests.processes import command_line, named, processes

pytestmark = pytest.mark.alone

SMALL = "--profile laptop --only train=tiny_world reward=ex_rm --eval-sets tiny_world --epochs 1"
# A variable that rmsweep sets for its workers, too.
JOB_ENVIRONMENT = shlex.quote(json.dumps({"env_vars": {"OMP_NUM_THREADS": "1"}}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Laptop:
    """Where `ray up` is called: its home has the token, and nothing of the user's environment is in the way."""

    machine: Machine
    config: Path
    ports: dict[str, int]
    storage: Path

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("RAY_", "RMSWEEP_", "MLFLOW_", "SSH_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        programs = f"{Path(sys.executable).parent}:{kept['PATH']}"
        return kept | {"HOME": str(self.machine.client), "PATH": programs}

    def start(self, command: str) -> subprocess.Popen[str]:
        command = command.replace("cluster.yaml", str(self.config))
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> str:
        with self.start(command) as running:
            output, _ = running.communicate(timeout=1200)
        assert running.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> Iterator[Laptop]:
    """A laptop that has brought the cluster up; whatever a failed test leaves is ended by its mark."""
    refuse_beside_another_ray()
    # Short: Unix sockets of ssh have a limit of 108 characters.
    folder = tmp_path_factory.mktemp("up")
    with machine(folder) as head:
        ports = {name: free_port() for name in ("ray", "dashboard", "mlflow")}
        storage = folder / "store"
        config = folder / "local.yaml"
        config.write_text(yaml.safe_dump(local_variant(head, storage, ports), sort_keys=False))
        here = Laptop(machine=head, config=config, ports=ports, storage=storage)
        try:
            here.run(documented("make the token"))
            here.run(documented("the hub's token"))
            (head.client / ".cache" / "huggingface" / "token").write_text("hf_of_the_laptop")
            here.run(documented("up"))
            yield here
        finally:
            for pid in processes(head.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            remove_notes_of_ray(config)


@pytest.fixture(scope="module")
def small(tiny_model) -> str:
    """The flags of one trial of a model that needs no pretraining."""
    return f" {SMALL} --models small={tiny_model}"


def refuse_beside_another_ray() -> None:
    """Skip where somebody's Ray would be ended; that of a test before takes a moment to end by itself."""
    deadline = time.monotonic() + 120
    while named("raylet"):
        if time.monotonic() > deadline:
            missing("a host on which no other Ray runs, since `ray down` ends it")
        time.sleep(1)


def remove_notes_of_ray(config: Path) -> None:
    """What Ray's launcher keeps outside of the test's folder: the state of the cluster and its cached configuration."""
    name = yaml.safe_load(config.read_text())["cluster_name"]
    for file in Path("/tmp/ray").glob(f"cluster-{name}.*"):
        file.unlink()
    for file in Path("/tmp").glob("ray-config-*"):
        with contextlib.suppress(FileNotFoundError):
            if f'"{name}"' in file.read_text():
                file.unlink()


@contextlib.contextmanager
def tunnel(laptop: Laptop, name: str, remote_port: int, words: str) -> Iterator[str]:
    """The address at which a documented tunnel brings a port of the head to the laptop."""
    port = free_port()
    ports = f"ray dashboard --port {port} --remote-port {remote_port} cluster.yaml"
    running = laptop.start(documented(name, **{words: ports}))
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_open(address, running)
        yield address
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.communicate(timeout=30)


def wait_until_open(address: str, running: subprocess.Popen[str]) -> None:
    for _ in range(240):
        assert running.poll() is None, running.communicate()[0]
        with contextlib.suppress(urllib.error.HTTPError, OSError):
            status(address)
            return
        time.sleep(0.5)
    raise AssertionError(f"nothing answers at {address} within 120 s")


def status(address: str, credentials: dict[str, str] | None = None) -> int:
    """The HTTP status with which MLflow or Ray answers; raises URLError where nobody does."""
    request = urllib.request.Request(address)
    if credentials:
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, address, credentials["username"], credentials["password"])
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
    else:
        opener = urllib.request.build_opener()
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_head_knows_its_storage_its_server_and_that_ray_asks_for_a_token(laptop):
    where = "import orchestrator, flask_wtf; print(orchestrator.__file__); print(flask_wtf.__file__)"
    said = laptop.run(f"ray exec cluster.yaml 'env; cd /; python -c \"{where}\"'").splitlines()
    assert f"RMSWEEP_STORAGE={laptop.storage}" in said
    assert f"MLFLOW_TRACKING_URI=http://127.0.0.1:{laptop.ports['mlflow']}" in said
    assert "RAY_AUTH_MODE=token" in said
    # The set-up has installed the repository that was mounted, and the packages that the running environment lacks.
    repository = laptop.machine.home / "rmsweep"
    assert f"{repository}/orchestrator/__init__.py" in said
    assert any(line.endswith("flask_wtf/__init__.py") for line in said)


def test_the_head_has_the_hubs_token_and_nobody_else_can_read_it(laptop):
    token = laptop.machine.home / ".cache" / "huggingface" / "token"
    assert token.read_text() == "hf_of_the_laptop"
    assert token.stat().st_mode & 0o777 == 0o600


def test_the_bare_command_plans_on_the_head(laptop, small):
    said = laptop.run(documented("plan", **{"plan'": f"plan{small}'"}))
    assert "full_grid: 1 trials" in said


def test_a_submitted_sweep_runs_and_status_and_report_show_it(laptop, small):
    with tunnel(laptop, "tunnel", laptop.ports["dashboard"], "ray dashboard cluster.yaml") as address:
        without_token = laptop.start(f"RAY_AUTH_MODE=disabled ray job list --address {address}")
        refusal, _ = without_token.communicate(timeout=120)
        assert without_token.returncode != 0
        assert "401" in refusal or "uthentication" in refusal
        places = {
            "http://127.0.0.1:8265": address,
            "--working-dir": f"--runtime-env-json {JOB_ENVIRONMENT} --working-dir",
        }
        said = laptop.run(documented("submit", **places) + small)
    assert "1/1 complete" in said
    assert "succeeded" in said
    assert "complete" in laptop.run(documented("status"))
    assert "in-distribution" in laptop.run(documented("report"))
    assert (laptop.storage / "sweeps" / "full_grid" / "report" / "summary.md").is_file()


def test_the_bare_command_on_the_head_finds_the_sweep_complete(laptop, small):
    command = documented("run on the head", **{"--tmux ": "", "full_grid.py'": f"full_grid.py{small}'"})
    assert "nothing to run" in " ".join(laptop.run(command).split())


def test_mlflow_asks_for_the_password_and_has_the_sweep(laptop):
    said = laptop.run(documented("password"))
    fields = dict(line.split(" = ") for line in said.splitlines() if " = " in line)
    shown = {key.removeprefix("mlflow_tracking_"): value.strip() for key, value in fields.items()}
    words = "ray dashboard --port 5000 --remote-port 5000 cluster.yaml"
    with tunnel(laptop, "tunnel to MLflow", laptop.ports["mlflow"], words) as address:
        search = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=rmsweep"
        assert status(search) == 401
        assert status(search, {**shown, "password": "another"}) == 401
        assert status(search, shown) == 200
    database = laptop.machine.home / "mlflow" / "mlflow.db"
    assert database.stat().st_mode & 0o077 == 0
    assert list((laptop.storage / "mlflow").rglob("summary.md"))


def test_data_of_the_user_comes_to_the_head(laptop, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    laptop.run(documented("your data", **{"my-data/ '": f"{tmp_path}/ '"}))
    assert (laptop.machine.home / "rmsweep" / "my-data" / "train.jsonl").is_file()


def test_down_leaves_no_process(laptop):
    """Last in this file: the cluster is gone afterwards."""
    laptop.run(documented("stop MLflow"))
    laptop.run(documented("down"))
    # ssh keeps a connection for ten seconds after its last use.
    deadline = time.monotonic() + 300
    while (left := processes(laptop.machine.mark)) and time.monotonic() < deadline:
        time.sleep(1)
    assert [command_line(pid) for pid in left] == []
