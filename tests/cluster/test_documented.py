"""docs/cluster.md: every command is run by a test or named as not tried; its manifest is one of this Ray."""

import re

import ray
import yaml

from tests.cluster.documented import COMMANDS, DOCUMENT, RUN_BY_RAY_UP
from tests.cluster.machine import CLUSTER, ROOT

# AWS, KubeRay and the container are said to be not tried; cluster/setup.sh runs the installation in test_ray_up.py;
# the README's commands are run by test_readme.py, gpu_check by test_gpu_check.py as far as a CPU goes.
NOT_RUN = ("aws ", "docker ", "kubectl ", "export ", "make install", ".venv/bin/python -m pip install ")
LIKE_THE_README = (".venv/bin/python sweeps/full_grid.py", ".venv/bin/python -m benchmarks.gpu_check")


def test_every_command_is_run_or_said_to_be_not_tried():
    for command in COMMANDS:
        by_ray_up = [name for name, words in RUN_BY_RAY_UP.items() if words in command]
        assert len(by_ray_up) == 1 or command.startswith((*NOT_RUN, *LIKE_THE_README)), command
    for words in RUN_BY_RAY_UP.values():
        assert len({command for command in COMMANDS if words in command}) == 1, words
    assert "Not tried: AWS itself, KubeRay, GPUs" in DOCUMENT


def test_the_installation_on_a_laptop_is_that_of_the_nodes():
    (command,) = [text for text in COMMANDS if "-m pip install" in text]
    _, _, words = command.partition(" -m ")
    script = (ROOT / "cluster" / "setup.sh").read_text().replace("$root/", "").replace("$root", ".")
    assert words.replace("'", "") in script.replace('"', "").replace("--quiet ", "")


def test_the_raycluster_is_of_this_ray_and_says_what_cluster_yaml_says():
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-" in (ROOT / "cluster" / "Dockerfile").read_text()
    (worker,) = spec["workerGroupSpecs"]
    assert worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"]
    for group in (spec["headGroupSpec"], worker):
        (container,) = group["template"]["spec"]["containers"]
        names = {item["name"] for item in container["env"]}
        assert {"RMSWEEP_STORAGE", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= names
    said = yaml.safe_load(CLUSTER.read_text())["available_node_types"]["h100x8"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == said["resources"]["GPU"]
    assert worker["maxReplicas"] == said["max_workers"]


def test_every_linked_file_is_there():
    for target in re.findall(r"`((?:cluster|tests|docs)/[\w./]*)`", DOCUMENT):
        assert (ROOT / target).exists(), target
