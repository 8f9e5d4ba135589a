"""This machine as a cluster's head: an ssh server of the test's own, and cluster.yaml turned to the `local` provider."""

import contextlib
import copy
import getpass
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import missing

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "cluster.yaml"
MARK = "CLUSTER_TEST"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the test is the laptop (`client`), where it is the head (`home`), and the ssh server between them."""

    folder: Path
    ssh_port: int
    ssh_server: int

    @property
    def client(self) -> Path:
        return self.folder / "client"

    @property
    def home(self) -> Path:
        return self.folder / "head"

    @property
    def mark(self) -> str:
        """What every process of the head has in its environment."""
        return f"{MARK}={self.folder}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM_PATH}")
    if not found:
        missing(name)
    return str(found)


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """An ssh server on a free port of the loopback, with keys of its own and a home folder of its own."""
    server, keygen = program("sshd"), program("ssh-keygen")
    for needed in ("ssh", "rsync", "curl"):
        program(needed)
    for name in ("client", "head"):
        (folder / name).mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    with privilege_separation_folder():
        running = subprocess.Popen(
            [server, "-D", "-f", write_server_config(folder, port), "-E", folder / "sshd.log"],
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_for_server(port, running, folder / "sshd.log")
            make_environment(folder / "head" / "rmsweep")
            yield Machine(folder=folder, ssh_port=port, ssh_server=running.pid)
        finally:
            running.terminate()
            running.wait(timeout=30)


@contextlib.contextmanager
def privilege_separation_folder() -> Iterator[None]:
    """Debian's init makes this folder, where there is one; a server that runs as root refuses to start without."""
    folder = Path("/run/sshd")
    if os.getuid() != 0 or folder.exists():
        yield
        return
    folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        folder.rmdir()


def write_server_config(folder: Path, port: int) -> Path:
    config = folder / "sshd_config"
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'user_key.pub'}",
        "PidFile none",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        # The keys are in a folder for temporary files.
        "StrictModes no",
        # Sessions have the head's home, not the user's: nothing of the user's is read or written.
        f"SetEnv HOME={folder / 'head'} PATH={SYSTEM_PATH} {MARK}={folder}",
    ]
    config.write_text("\n".join(lines) + "\n")
    return config


def wait_for_server(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no ssh server within 60 s: {log.read_text()}")


def make_environment(repository: Path) -> None:
    """A virtual environment that finds the packages of the running one: the set-up then installs what is missing only."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", repository / ".venv"], check=True)
    (site_packages,) = (repository / ".venv" / "lib").glob("python*/site-packages")
    (site_packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in ("ray", "mlflow"):
        script = repository / ".venv" / "bin" / name
        body = (Path(sys.executable).parent / name).read_text().splitlines()[1:]
        script.write_text("\n".join([f"#!{repository}/.venv/bin/python", *body]) + "\n")
        script.chmod(0o755)


def local_variant(machine: Machine, storage: Path, ports: dict[str, int]) -> dict[str, Any]:
    """cluster.yaml with this machine in the place of AWS: the same set-up and start commands but for places and ports."""
    config = copy.deepcopy(yaml.safe_load(CLUSTER.read_text()))
    for name in ("available_node_types", "head_node_type", "max_workers", "initialization_commands"):
        del config[name]
    relay = f"{sys.executable} {Path(__file__).with_name('relay.py')} {machine.ssh_port}"
    config |= {
        "cluster_name": f"rmsweep-test-{os.getpid()}",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {
            "ssh_user": getpass.getuser(),
            "ssh_private_key": str(machine.folder / "user_key"),
            "ssh_proxy_command": relay,
        },
        # An EBS volume is AWS's.
        "head_setup_commands": [text for text in config["head_setup_commands"] if "volume.py" not in text],
    }
    swaps = {
        "s3://YOUR-BUCKET/rmsweep": str(storage),
        "bash ~/rmsweep/cluster/setup.sh": f"MLFLOW_PORT={ports['mlflow']} bash ~/rmsweep/cluster/setup.sh",
        "start /mlflow": "start ~/mlflow",
        "--port=6379": f"--port={ports['ray']} --node-ip-address=127.0.0.1 --num-cpus=2 --dashboard-port={ports['dashboard']}",
        # A container's limit may be lower, and may not be raised.
        "ulimit -n 65536; ": "",
    }
    for field in ("setup_commands", "head_start_ray_commands"):
        for old, new in swaps.items():
            config[field] = [text.replace(old, new) for text in config[field]]
    return config
