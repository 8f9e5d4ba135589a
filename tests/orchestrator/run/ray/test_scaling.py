"""What an autoscaler may add, by its cluster's YAML; what of it is up; and the profile that it makes possible."""

from pathlib import Path

import pytest
import yaml

from orchestrator.cli.options import Options
from orchestrator.cli.session import profile_for
from orchestrator.plan.hardware import Node
from orchestrator.plan.schedule import Grant, Request
from orchestrator.run.ray.coordinator import Nodes
from orchestrator.run.ray.scaling import Scaling, all_workers, node_types, still_absent
from trainers.errors import PlanError

GPU_WORKER = {"resources": {"CPU": 96, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 4}
CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}, "max_workers": 0},
        "gpu": GPU_WORKER,
        "cpu": {"resources": {"CPU": 16}, "max_workers": 3},
    },
}
HEAD = Node(id="f00d", cpus=8)


@pytest.fixture
def workers(tmp_path: Path) -> tuple[Node, ...]:
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return all_workers(bootstrap=file)


def test_workers_are_counted_by_type_and_all_together_and_the_head_is_none(workers):
    nodes = workers
    assert [node.id for node in nodes] == ["gpu 0", "gpu 1", "gpu 2", "gpu 3", "cpu 0"]
    assert [(node.cpus, node.gpus, node.gpu_gb) for node in nodes[3:]] == [(96, 8, 80.0), (16, 0, 24.0)]
    assert node_types(node.id for node in nodes) == "gpu, cpu"


def test_a_live_node_stands_for_one_of_its_size_and_one_that_is_lost_is_absent_again(workers):
    nodes = workers
    up = [HEAD, Node(id="a1", cpus=95, gpus=8), Node(id="a2", cpus=96, gpus=8)]
    assert sorted(still_absent(nodes, up)) == ["cpu 0", "gpu 2", "gpu 3"]
    assert sorted(still_absent(nodes, up[:2])) == ["cpu 0", "gpu 1", "gpu 2", "gpu 3"]
    assert still_absent((), up) == {}


def test_a_type_that_does_not_come_is_counted_on_no_more(workers):
    left = Scaling(nodes=workers).without(["gpu 2"])
    assert [node.id for node in left.nodes] == ["cpu 0"]


def test_a_head_says_what_its_cluster_may_come_to_unless_it_is_given(tmp_path: Path):
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert all_workers(bootstrap=file) == ()
    file.write_text(
        "max_workers: 1\nhead_node_type: head\navailable_node_types:\n  head: {}\n  gpu: {resources: {CPU: 4, GPU: 1, 'accelerator_type:L4': 1}}\n"
    )
    assert all_workers(bootstrap=file) == (Node(id="gpu 0", cpus=4, gpus=1, gpu_gb=24.0, gpu_kind="L4-24GB"),)
    file.write_text("a: [")
    with pytest.raises(PlanError, match="cannot be read as YAML"):
        all_workers(bootstrap=file)
    assert [node.id for node in all_workers("2x8xH100")] == ["group0 0", "group0 1"]


def test_the_profile_counts_what_may_come(workers):
    options = Options()
    assert profile_for(options, [HEAD])[0].name == "laptop"
    absent = still_absent(workers, [HEAD]).values()
    assert profile_for(options, [HEAD, *absent])[0].name == "paper"


def held(node: Node) -> Grant:
    """Half of a worker with GPUs, granted."""
    return Grant(request=Request(key="a", kind="train", workers=1, gpus=4), nodes=(node.id,))


def test_what_is_held_of_a_node_is_free_again_unless_the_node_is_gone(workers):
    gpu = workers[0]
    nodes = Nodes([HEAD, gpu], Scaling(nodes=()))
    assert [node.gpus for node in nodes.free([held(gpu)])] == [0, 4]
    assert [node.gpus for node in nodes.whole()] == [0, 8]
    nodes.follow([HEAD])
    assert nodes.free([held(gpu)]) == nodes.whole() == [HEAD]
    nodes.follow([HEAD, gpu])
    assert nodes.free() == [HEAD, gpu]


def test_on_a_node_that_may_be_dead_nothing_starts_until_it_is_trusted_or_gone(workers):
    gpu = workers[0]
    nodes = Nodes([HEAD, gpu], Scaling(nodes=()))
    assert nodes.suspect(held(gpu)) == {gpu.id}
    assert nodes.suspect(held(gpu)) == set()
    assert nodes.free() == [HEAD]
    # It still counts for what fits at all.
    assert nodes.whole() == [HEAD, gpu]
    nodes.suspected.discard(gpu.id)
    assert nodes.free() == [HEAD, gpu]
    nodes.suspect(held(gpu))
    nodes.follow([HEAD])
    assert gpu.id not in nodes.suspected


def test_nodes_to_come_count_until_they_are_given_up(workers):
    nodes = Nodes([HEAD], Scaling(nodes=workers))
    wide = Request(key="b", kind="train", workers=1, gpus=8)
    assert nodes.fits(wide)
    assert nodes.absent_types(held(workers[1])) == "gpu"
    nodes.give_up(held(workers[1]))
    assert nodes.late == ["gpu"]
    assert not nodes.fits(wide)
    assert list(nodes.absent) == ["cpu 0"]
    # One that comes all the same is welcome.
    nodes.follow([HEAD, workers[0]])
    assert nodes.fits(wide)
