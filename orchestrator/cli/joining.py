"""The nodes that a command counts on: a running cluster's, joined or only looked at, else this machine."""

from orchestrator.cli.options import Plan
from orchestrator.cli.session import Session
from orchestrator.cli.terminal import quiet
from orchestrator.plan.hardware import Node, local_capacity, read_cluster
from orchestrator.run.ray.scaling import all_workers, still_absent
from orchestrator.run.workers import cluster_address, set_ray_environment
from trainers.errors import PlanError


def may_join(session: Session) -> bool:
    """Whether the command runs on Ray and a cluster is up that it would join."""
    return session.options.backend == "ray" and cluster_address() is not None


def capacity(session: Session) -> tuple[Node, ...]:
    """Return the nodes of --cluster, else of the running cluster with those it may still add, else this machine; join nothing."""
    options = session.options
    given = read_cluster(options.cluster) if options.cluster else ()
    if given and isinstance(options.command, Plan):
        return given
    if given and not may_join(session):
        raise PlanError(
            f"--cluster {options.cluster}: there is no Ray cluster to run on. Start it (`ray up`), or run on its head or "
            "with RAY_ADDRESS; `plan --cluster …` needs none."
        )
    if not may_join(session):
        return local_capacity()
    workers = all_workers(options.cluster)
    set_ray_environment()
    from orchestrator.run.ray import cluster

    with quiet(session.driver_log):
        nodes = cluster.look()
    if nodes is None:
        return joined(session) or local_capacity()
    return (*nodes, *still_absent(workers, nodes).values())


def joined(session: Session) -> tuple[Node, ...]:
    """Join the running cluster: what it holds and may yet add; nothing where none is up. Raises StorageError."""
    if not may_join(session):
        return ()
    workers = all_workers(session.options.cluster)
    set_ray_environment()
    from orchestrator.run.ray import cluster

    with quiet(session.driver_log, session.console.width) as terminal:

        def say(text: str) -> None:
            terminal.print(text, markup=False, highlight=False, soft_wrap=True)

        if not cluster.join_ray(say):
            return ()
        nodes = cluster.capacity()
        if not isinstance(session.options.command, Plan):
            cluster.require_shared_storage(session.store, nodes)
    return (*nodes, *still_absent(workers, nodes).values())
