"""What a cluster is said to be: words, Ray's YAML, and nodes that are there."""

from pathlib import Path

import pytest

from orchestrator.plan.capacity import Node
from orchestrator.plan.hardware import describe, gpu_kind, groups_of, label, nodes_of, read_cluster
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
    resources: {CPU: 32, GPU: 4, "accelerator_type:A100-40G": 1}
  labelled:
    max_workers: 3
    resources: {GPU: 1}
    labels: {ray.io/accelerator-type: L4}
"""


def test_groups_of_nodes_are_read_with_their_gpus_and_prices():
    first, second = read_cluster("2x8xH100-80GB, 1x4xA100-40GB@2.50")
    assert (first.count, first.gpus, first.price) == (2, 8, None)
    assert first.kind is not None
    assert (label(first.kind), first.kind.bf16_tflops) == ("H100-80GB", 989)
    assert (second.count, second.gpus, second.price) == (1, 4, 2.5)
    nodes = nodes_of([first, second])
    assert [node.gpu_gb for node in nodes] == [80, 80, 40]
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
    assert label(kind) == name


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
    head, h100, a100, labelled = read_cluster(str(file))
    assert (head.count, head.cpus, head.gpus) == (1, 8, 0)
    assert (h100.count, h100.cpus, h100.gpus) == (4, 192, 8)
    assert (a100.count, a100.cpus, a100.gpus) == (2, 32, 4)
    # The cluster's own max_workers caps all types together, those with most GPUs first.
    assert (labelled.count, labelled.gpus) == (1, 1)
    assert [label(group.kind) for group in (h100, a100, labelled) if group.kind] == [
        "H100-80GB",
        "A100-40GB",
        "L4-24GB",
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


def test_nodes_that_are_there_become_groups_and_go_back():
    nodes = [
        Node(id="a", cpus=16, gpus=2, gpu_gb=80, gpu_kind="H100-80GB"),
        Node(id="b", cpus=16, gpus=2, gpu_gb=80, gpu_kind="H100-80GB"),
        Node(id="c", cpus=4),
        Node(id="d", cpus=4, gpus=1, gpu_gb=24, gpu_kind="some new one"),
    ]
    groups = groups_of(nodes)
    assert [(group.count, group.gpus) for group in groups] == [(2, 2), (1, 0), (1, 1)]
    assert describe(groups) == "2 × 2 × H100-80GB, 1 × 4 CPUs, 1 × 1 × GPU-24GB"
    assert [node.gpus for node in nodes_of(groups)] == [2, 2, 0, 1]
