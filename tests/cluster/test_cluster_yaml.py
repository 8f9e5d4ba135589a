"""cluster.yaml without AWS: Ray's own loader and schema, a simulated EC2, and what a user edits."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from types import ModuleType
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.machine import CLUSTER, ROOT

TEXT = CLUSTER.read_text()
REGION, ZONE, OTHER_ZONE = "us-east-2", "us-east-2a", "us-east-2b"
LAYOUT = {"ray-node-type": "node", "ray-node-name": "node"}


def loaded(text: str = TEXT) -> dict[str, Any]:
    return yaml.safe_load(text)


def plain(pin: str) -> str:
    return re.sub(r"\[.*\]", "", pin).lower().replace("_", "-")


def code(line: str) -> str:
    return line.partition("#")[0]


def test_ray_loads_it_and_its_schema_holds():
    config = prepare_config(loaded())
    validate_config(config)
    assert config["head_setup_commands"][0].startswith("bash ~/rmsweep/cluster/setup.sh")
    assert config["worker_setup_commands"] == config["setup_commands"]


def test_workers_scale_from_none_are_spot_and_go_when_idle():
    config = prepare_config(loaded())
    head = config["available_node_types"].pop(config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["max_workers"] == 0
    for worker in config["available_node_types"].values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] > 0
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_a_user_edits_five_lines_each_of_which_says_what():
    edited = {}
    for line in TEXT.splitlines():
        for placeholder in re.findall(r"[\w-]*YOUR-[A-Z]+", code(line)):
            comment = line.partition("#")[2]
            number, named = re.match(r" \[(\d)\] for ([\w-]+)", comment).groups()
            assert placeholder.endswith(named), line
            edited[int(number)] = placeholder
    assert sorted(edited) == [1, 2, 3, 4, 5]
    assert len(set(edited.values())) == len(re.findall(r"YOUR-[A-Z]+", "".join(map(code, TEXT.splitlines()))))


def test_what_is_mounted_is_what_the_installation_needs():
    mounts = loaded()["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {name.removesuffix("*") for name in found} | {"cluster", "pyproject.toml", "requirements.lock"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert {place for place in mounts.values() if not place.startswith("~")} == needed
    for remote, place in mounts.items():
        assert place.startswith("~") or ((ROOT / place).exists() and remote == f"~/rmsweep/{place}")


def test_the_pins_of_a_node_are_those_of_the_lock():
    lock = set((ROOT / "requirements.lock").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {*project["dependencies"], *project["optional-dependencies"]["cluster"]}
    exact = {plain(pin) for pin in pinned if "==" in pin}
    assert exact <= set(map(plain, lock))
    assert "--constraint" in (ROOT / "cluster" / "setup.sh").read_text()


def test_nodes_ask_for_a_token_and_listen_where_only_ssh_reaches():
    config = loaded()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["~/.cache/huggingface/token"] == "~/.cache/huggingface/token"
    assert "export RAY_AUTH_MODE=token" in (ROOT / "cluster" / "setup.sh").read_text()
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--host 127.0.0.1" in (ROOT / "cluster" / "mlflow.sh").read_text()
    assert "security_group" not in config["provider"]


@pytest.mark.parametrize(
    "script", ["setup.sh s3://YOUR-BUCKET/rmsweep", "setup.sh", "mlflow.sh", "mlflow.sh begin"]
)
def test_scripts_refuse_what_is_not_edited(script, tmp_path):
    (tmp_path / ".rmsweep.sh").write_text("")
    done = subprocess.run(
        f"bash {ROOT}/cluster/{script}",
        shell=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert "line [5] of cluster.yaml" in done.stderr or "usage" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".rmsweep.sh"]


@pytest.mark.parametrize("mounted", [True, False])
def test_a_node_fetches_to_its_own_disk_where_it_has_one(mounted, tmp_path):
    """With stand-ins for pip and sudo: what shells are told afterwards."""
    root, home, disk = tmp_path / "rmsweep", tmp_path / "home", tmp_path / "nvme"
    for folder in (root / "cluster", root / ".venv" / "bin", home, *([disk] if mounted else [])):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "cluster" / "setup.sh", root / "cluster")
    for file, does in ((root / ".venv" / "bin" / "python", "exit 0"), (tmp_path / "sudo", '"$@"')):
        file.write_text(f"#!/bin/sh\n{does}\n")
        file.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(
            ["bash", root / "cluster" / "setup.sh", "s3://bucket/rmsweep", disk],
            env=environment,
            check=True,
            timeout=30,
        )
    told = subprocess.run(
        ["bash", "-c", ". ~/.rmsweep.sh; env"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "RMSWEEP_STORAGE=s3://bucket/rmsweep" in told
    names = ("HF_HOME=", "HF_TOKEN_PATH=", "RMSWEEP_CACHE=")
    found = [line for line in sorted(told) if line.startswith(names)]
    fast = f"{disk}/rmsweep"
    assert found == (
        [
            f"HF_HOME={fast}/huggingface",
            f"HF_TOKEN_PATH={home}/.cache/huggingface/token",
            f"RMSWEEP_CACHE={fast}/cache",
        ]
        if mounted
        else []
    )
    assert (disk / "rmsweep").is_dir() == mounted


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """A simulated EC2; keys that Ray makes go to a folder of the test."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("AWS_PROFILE", raising=False)
        yield boto3.client("ec2", region_name=REGION)


@pytest.fixture(scope="module")
def image(aws):
    return aws.describe_images()["Images"][0]["ImageId"]


@pytest.fixture(scope="module")
def on_aws(aws, image) -> dict[str, Any]:
    """cluster.yaml as a user has edited it, bootstrapped by Ray's AWS provider."""
    text = TEXT.replace("YOUR-REGION", REGION).replace("YOUR-ZONE", ZONE).replace("ami-YOUR-IMAGE", image)
    config = prepare_config(loaded(text))
    validate_config(config)
    return AWSNodeProvider.bootstrap_config(config)


def test_on_a_simulated_aws_nothing_but_ssh_is_open(aws, on_aws):
    nodes = [kind["node_config"] for kind in on_aws["available_node_types"].values()]
    groups = {group for node in nodes for group in node["SecurityGroupIds"]}
    (group,) = aws.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in outside] == [(22, 22, "tcp")]
    inside = [rule for rule in group["IpPermissions"] if rule not in outside]
    assert {pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]} == groups


def test_the_resources_said_are_those_of_the_instances(aws):
    said = loaded()["available_node_types"]
    empty = {name: {**kind, "resources": {}} for name, kind in said.items()}
    provider = {"type": "aws", "region": REGION}
    config = {"provider": provider, "head_node_type": "head", "available_node_types": empty}
    detected = AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]
    for name, kind in said.items():
        assert kind["resources"].items() <= detected[name]["resources"].items()


def test_on_a_simulated_aws_the_head_is_on_demand_and_a_worker_spot(aws, on_aws):
    iam = boto3.client("iam", region_name=REGION)
    provider = AWSNodeProvider(on_aws["provider"], on_aws["cluster_name"])
    for name, lifecycle in (("head", None), ("h100x8", "spot")):
        node = on_aws["available_node_types"][name]["node_config"]
        iam.create_instance_profile(InstanceProfileName=node["IamInstanceProfile"]["Name"])
        (created,) = provider.create_node(node, LAYOUT, 1).values()
        (instance,) = aws.describe_instances(InstanceIds=[created.id])["Reservations"][0]["Instances"]
        assert instance.get("InstanceLifecycle") == lifecycle
        assert instance["Placement"]["AvailabilityZone"] == ZONE


@pytest.fixture(scope="module")
def volume_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("volume", ROOT / "cluster" / "volume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(aws: Any, image: str) -> str:
    place = {"AvailabilityZone": ZONE}
    done = aws.run_instances(ImageId=image, MinCount=1, MaxCount=1, Placement=place)
    return done["Instances"][0]["InstanceId"]


def holders(aws: Any, volume: str) -> list[str]:
    return [
        item["InstanceId"] for item in aws.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Attachments"]
    ]


def test_the_head_takes_its_volume_once(aws, image, volume_script):
    volume = aws.create_volume(AvailabilityZone=ZONE, Size=20)["VolumeId"]
    head = started(aws, image)
    volume_script.attach(aws, volume, head)
    assert holders(aws, volume) == [head]
    volume_script.attach(aws, volume, head)
    assert holders(aws, volume) == [head]


def test_a_volume_that_another_head_holds_is_not_taken_from_it(aws, image, volume_script, monkeypatch):
    monkeypatch.setattr(volume_script, "WAIT_S", 0)
    volume = aws.create_volume(AvailabilityZone=ZONE, Size=20)["VolumeId"]
    first, second = started(aws, image), started(aws, image)
    volume_script.attach(aws, volume, first)
    with pytest.raises(SystemExit, match=f"held by {first}; terminate"):
        volume_script.attach(aws, volume, second)
    assert holders(aws, volume) == [first]


def test_a_volume_in_another_zone_is_said(aws, image, volume_script):
    volume = aws.create_volume(AvailabilityZone=OTHER_ZONE, Size=20)["VolumeId"]
    with pytest.raises(SystemExit, match=f"in {OTHER_ZONE}, the head in {ZONE}"):
        volume_script.attach(aws, volume, started(aws, image))


def test_a_volume_that_was_not_edited_is_said(volume_script):
    with pytest.raises(SystemExit, match=r"line \[4\] of cluster.yaml"):
        volume_script.main("vol-YOUR-VOLUME", "/mlflow")
