"""What there is to run on."""

from orchestrator.plan.capacity import local_capacity


def test_the_local_machine_has_at_least_one_cpu():
    (node,) = local_capacity()
    assert node.cpus >= 1
