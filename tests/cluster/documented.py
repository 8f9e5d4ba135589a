"""The commands of docs/cluster.md, and which of them a test runs."""

import re

from tests.cluster.machine import ROOT

DOCUMENT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("     #")[0].strip()
    for line in re.sub(r"```.*?```", "", DOCUMENT, flags=re.DOTALL).splitlines()
    if line.startswith("    ")
]
# By what test_ray_up.py calls them: words that one command has and no other.
RUN_BY_RAY_UP = {
    "make the token": "get-auth-token --generate",
    "the hub's token": "touch ~/.cache/huggingface/token",
    "up": "ray up",
    "plan": "ray exec cluster.yaml 'cd ~/rmsweep && python sweeps/full_grid.py plan'",
    "run on the head": "ray exec --tmux cluster.yaml 'cd ~/rmsweep && python sweeps/full_grid.py'",
    "tunnel": "ray dashboard cluster.yaml",
    "submit": "ray job submit",
    "status": "full_grid.py status",
    "report": "full_grid.py report",
    "password": "cat ~/.mlflow/credentials",
    "tunnel to MLflow": "ray dashboard --port 5000",
    "your data": "ray rsync-up",
    "stop MLflow": "mlflow.sh stop",
    "down": "ray down",
}


def documented(name: str, **changes: str) -> str:
    """The command of this name as it stands in the document, with pieces of it changed for the test's machine."""
    (command,) = {text for text in COMMANDS if RUN_BY_RAY_UP[name] in text}
    for old, new in {".venv/bin/": "", **changes}.items():
        assert old in command or old == ".venv/bin/", (old, command)
        command = command.replace(old, new)
    return command
