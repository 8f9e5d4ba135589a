"""What a cluster is said to be: words, Ray's YAML, and nodes that are there."""

import math
from pathlib import Path

import pytest

from orchestrator.plan import hardware
from orchestrator.plan.hardware import (
    Node,
    describe,
    gpu_kind,
    listed_kind,
    read_cluster,
)
from trainers.errors import PlanError

CLUSTER = """
cluster_name: grid
max_workers: 7
head_node_type: head
available_node_types:
  head:
    node_config: {InstanceType: m7i.2xlarge}
    resources: {CPU: 8}
  h100:
    max_workers: 4
    node_config: {InstanceType: p5.48xlarge}
  a100:
    max_workers: 2
    resources: {CPU: 32, GPU: 4, "accelerator_type:A100-40G": 1, memory: 256000000000}
  labelled:
    max_workers: 3
    resources: {GPU: 1}
    labels: {ray.io/accelerator-type: L4}
  nothing_runs_here:
    max_workers: 1
    resources: {CPU: 0, GPU: 8}
"""


def test_nodes_are_read_with_their_gpus_and_prices():
    nodes = read_cluster("2x8xH100-80GB, 1x4xA100-40GB@2.50")
    assert [(node.gpus, node.gpu_kind, node.gpu_gb, node.price) for node in nodes] == [
        (8, "H100-80GB", 80, None),
        (8, "H100-80GB", 80, None),
        (4, "A100-40GB", 40, 2.5),
    ]
    assert [node.kind.bf16_tflops for node in nodes if node.kind] == [989, 989, 312]
    assert len({node.id for node in nodes}) == 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100-80GB"),
        ("A100", "A100-40GB"),
        ("A100-80G", "A100-80GB"),
        ("a10g", "A10G-24GB"),
        ("H100-94GB", "H100-94GB"),
    ],
)
def test_a_kind_may_leave_out_its_memory_or_have_another(text: str, name: str):
    kind = gpu_kind(text)
    assert kind is not None
    assert kind.label == name


@pytest.mark.parametrize(
    ("text", "part", "why"),
    [
        ("", "''", "is not NODESxGPUSxKIND"),
        ("8xH100-80GB", "'8xH100-80GB'", "is not NODESxGPUSxKIND"),
        ("2x8xQ100", "'2x8xQ100'", "'Q100'"),
        ("0x8xH100", "'0x8xH100'", "number of nodes"),
        ("2x-1xH100", "'2x-1xH100'", "number of gpus"),
        ("2x8xH100,1xtwoxL4", "'1xtwoxL4'", "number of gpus"),
        ("2x8xH100@cheap", "'2x8xH100@cheap'", "price"),
        ("2x8xH100@nan", "'2x8xH100@nan'", "price"),
        ("2x8xH100-0GB", "'2x8xH100-0GB'", "H100-0GB"),
        ("99999999x8xH100", "'99999999x8xH100'", "number of nodes"),
    ],
)
def test_words_that_do_not_parse_are_refused_with_the_part_and_an_example(text: str, part: str, why: str):
    with pytest.raises(PlanError) as raised:
        read_cluster(text)
    for wanted in (f"--cluster {text}", part, why, "2x8xH100-80GB"):
        assert wanted in str(raised.value)


def test_a_ray_cluster_is_what_it_may_grow_to(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    nodes = read_cluster(str(file))
    assert describe(nodes) == "1 × 8 CPUs, 4 × 8 × H100-80GB, 2 × 4 × A100-40GB, 1 × 1 × L4-24GB"
    # The cluster's own max_workers caps all types together, those with most GPUs first.
    assert [node.id for node in nodes] == [
        "head 0",
        *(f"h100 {n}" for n in range(4)),
        "a100 0",
        "a100 1",
        "labelled 0",
    ]
    assert [(node.cpus, node.head, node.host_gb) for node in (nodes[0], nodes[1], nodes[5])] == [
        (8, True, math.inf),
        (192, False, math.inf),
        (32, False, 256),
    ]


def test_the_head_may_have_workers_of_its_own_type(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER.replace("head:\n    node_config", "head:\n    max_workers: 1\n    node_config"))
    assert [node.id for node in read_cluster(str(file)) if not node.gpus] == ["head 0"]
    file.write_text(file.read_text().replace("max_workers: 7", "max_workers: 10"))
    assert [(node.id, node.head) for node in read_cluster(str(file)) if not node.gpus] == [
        ("head 0", True),
        ("head 1", False),
    ]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (None, ["cannot be read"]),
        ("{", ["cannot be read as YAML"]),
        ("[1]", ["no available_node_types"]),
        ("available_node_types: {}", ["no available_node_types"]),
        ("available_node_types: {gpu: 3}", ["available_node_types.gpu must hold fields"]),
        ("available_node_types: {gpu: {max_workers: many}}", ["gpu.max_workers is 'many'"]),
        (
            "available_node_types: {gpu: {max_workers: 2, resources: {GPU: 8}}}",
            ["gpu has 8 GPUs of no known kind", "accelerator_type:H100", "InstanceType"],
        ),
        (
            "available_node_types: {gpu: {max_workers: 2, resources: {GPU: 1.5}}}",
            ["gpu.resources.GPU is 1.5"],
        ),
        ("available_node_types: {gpu: {resources: {GPU: 1}}}", ["gpu.max_workers is None"]),
        ("available_node_types: {gpu: {max_workers: 1}}", ["head_node_type is None; name one of gpu"]),
        (CLUSTER.replace("head_node_type: head", "head_node_type: hd"), ["head_node_type is 'hd'"]),
        (CLUSTER.replace("max_workers: 7", "max_workers: -1"), [": max_workers is -1, not a whole"]),
        (CLUSTER.replace("max_workers: 7", 'max_workers: "7"'), [": max_workers is '7', not a whole"]),
    ],
)
def test_a_yaml_without_the_fields_is_refused_with_the_field(tmp_path: Path, text: str | None, messages):
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PlanError) as raised:
        read_cluster(str(file))
    for wanted in (f"--cluster {file}", *messages):
        assert wanted in str(raised.value)


def test_a_gpu_of_an_unknown_kind_is_as_slow_as_the_slowest():
    nodes = [
        Node(id="a", cpus=16, gpus=2, gpu_gb=80, gpu_kind="H100-80GB"),
        Node(id="b", cpus=16, gpus=2, gpu_gb=80, gpu_kind="H100-80GB"),
        Node(id="c", cpus=4),
        Node(id="d", cpus=4, gpus=1, gpu_gb=24, gpu_kind="some new one"),
    ]
    assert describe(nodes) == "2 × 2 × H100-80GB, 1 × 4 CPUs, 1 × 1 × GPU-24GB"
    assert nodes[3].kind is not None
    assert nodes[3].kind.bf16_tflops == 70


@pytest.mark.parametrize(
    ("listed", "label"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("NVIDIA B200", "B200-180GB"),
        ("NVIDIA GB200", "GB200-186GB"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_the_drivers_listing_names_the_kind(listed: str, label: str | None):
    kind = listed_kind(f"Model: \t\t {listed}\nIRQ:   \t\t 24\n")
    assert (kind and kind.label) == label


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("1", 1),
        ("2,0", 2),
        ("0,-1,1", 1),
        ("NoDevFiles", 0),
        ("GPU-8932f937,MIG-1b", 2),
        ("0,1,2,3,4", 4),
    ],
)
def test_of_this_machines_gpus_those_count_that_cuda_shows(visible, gpus, tmp_path, monkeypatch):
    for number in range(4):
        listing = tmp_path / f"0000:0{number}" / "information"
        listing.parent.mkdir()
        listing.write_text("Model: \t\t NVIDIA H100 80GB HBM3\n")
    monkeypatch.setattr(hardware, "DRIVER_LISTING", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (node,) = hardware.local_capacity()
    assert (node.gpus, node.gpu_kind) == (gpus, "H100-80GB")
    assert node.cpus >= 1
