"""The Ray cluster: joined or started, what it holds, and whether all of it sees the storage. Imports no torch."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]
from ray.exceptions import RayError, RayTaskError
from ray.remote_function import RemoteFunction
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.plan.hardware import DEFAULT_GPU_GB, Node, host_gb, kind_in
from orchestrator.run.workers import (
    ALLOCATOR,
    LOOPBACK,
    OLDER_ALLOCATOR,
    PROBE_S,
    WORKER_ENVIRONMENT,
    answers,
    cluster_address,
)
from orchestrator.store.artifacts import Store
from trainers.errors import PlanError, StorageError
from trainers.storage import Location, replace
from trainers.train.stopping import StopRequest

IDLE_WORKER_S = 60
# To start a process on a busy node.
ANSWER_S = 30.0
# A head that does not answer: one is told of it, and then it is given up.
SAY_AFTER_S, GIVE_UP_AFTER_S = 10.0, 60.0

logger = logging.getLogger(__name__)


def join_ray(say: Callable[[str], None]) -> bool:
    """Join the running cluster (after workers.set_ray_environment). Raises PlanError where its head does not answer."""
    if ray.is_initialized():
        return True
    _await_head(str(cluster_address()), say)
    try:
        ray.init(address=cluster_address(), **ray_options())
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise PlanError(f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}.") from error
        return False
    return True


def _await_head(given: str, say: Callable[[str], None]) -> None:
    """Wait until the cluster's head answers: `ray.init` would, for minutes, without a word and deaf to signals.

    Raises PlanError, KeyboardInterrupt.
    """
    if given.startswith("ray://"):
        raise PlanError(
            f"RAY_ADDRESS={given}: a sweep is driven from inside the cluster, not through Ray's client. Submit it "
            "(`ray job submit --address http://HEAD:8265 -- python sweeps/…`), or run it on a machine of the cluster "
            "with RAY_ADDRESS=HEAD:6379."
        )
    address = canonicalize_bootstrap_address(given)
    began, said = time.monotonic(), False
    with StopRequest(0.0).listening():
        while address is not None and not _is_head(address):
            waited = time.monotonic() - began
            if waited > GIVE_UP_AFTER_S:
                raise PlanError(
                    f"no Ray cluster answers at {given} within {GIVE_UP_AFTER_S:.0f} s. Look there with `ray status`; "
                    "unset RAY_ADDRESS (here: `ray stop`) to run without that cluster."
                )
            if waited > SAY_AFTER_S and not said:
                said = True
                say(f"no Ray cluster answers at {given} yet; given up after {GIVE_UP_AFTER_S:.0f} s")
            time.sleep(PROBE_S / 10)


def _is_head(address: str) -> bool:
    """Whether a cluster's head answers there, and not only somebody who listens."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        # It talks to nobody without our certificate; Ray knows where that is.
        return answers(address)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        asked = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive").future(b"", timeout=PROBE_S)
        code = asked.code()
    # One that wants a token answers, too.
    silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)
    return code not in silent


def start_ray(cpus: int) -> None:
    """Start Ray on this machine, where none was joined; all of its servers listen on loopback only."""
    if ray.is_initialized():
        return
    _keep_token_private()
    # Ray puts this machine's outward address in the place of 127.0.0.1, unless it is told that it is no cluster
    # (which it tells itself on Windows and macOS only); its own processes hear of it by the environment.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray ends a process that idles for a second where there are more than CPUs: each task would import torch anew.
    kept = {"idle_worker_killing_time_threshold_ms": IDLE_WORKER_S * 1000}
    ray.init(
        address="local",
        num_cpus=max(cpus, 2),
        _node_ip_address=LOOPBACK,
        # Half a dozen processes that nobody looks at: a cluster that was started by hand has its own.
        include_dashboard=False,
        dashboard_host=LOOPBACK,
        _system_config=kept,
        **ray_options(),
    )


def _keep_token_private() -> None:
    """Ray would write its token for every user of the machine to read."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(
        os.environ
    ):
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
    except FileExistsError:
        with contextlib.suppress(PermissionError):
            file.chmod(0o600)


def ray_options() -> dict[str, Any]:
    """Return the options of every `ray.init` of ours, with the environment of workers."""
    # Ray takes no variable from us that a submitted job has set, not even with the same value.
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    from_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    ours = dict(WORKER_ENVIRONMENT)
    if OLDER_ALLOCATOR in os.environ or OLDER_ALLOCATOR in from_job:
        ours[OLDER_ALLOCATOR] = ours.pop(ALLOCATOR)
    # What the user has set wins, there as here.
    values = {name: os.environ.get(name, value) for name, value in ours.items() if name not in from_job}
    runtime = {"env_vars": values}
    return {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime}


def capacity() -> tuple[Node, ...]:
    """CPUs and GPUs of the live nodes of the cluster that was joined."""
    return _live(ray.nodes())


async def lives(node: str) -> bool:
    """Whether a node still starts what it is given. Ray lists a dead one for up to half a minute as if it lived."""
    asked = task_on(node, _nothing).remote()
    try:
        await asyncio.wait_for(asked, ANSWER_S)
    except (RayError, TimeoutError):
        ray.cancel(asked, force=True)
        return False
    return True


def _nothing() -> None:
    pass


def task_on(node: str, function: Callable[..., Any], *, cpus: int = 0, gpus: int = 0) -> RemoteFunction:
    """Return the function as a task on a node. The process of one that has GPUs ends with it.

    CUDA gives memory back only so, and a process that is used again keeps to the GPU that it saw first.
    """
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    return _remote(function, cpus, gpus).options(scheduling_strategy=pinned)


@functools.cache
def _remote(function: Callable[..., Any], cpus: int, gpus: int) -> RemoteFunction:
    # `options` can set no `max_calls`; and what is declared anew each time, Ray takes for another function.
    calls = 1 if gpus else 0
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=calls, max_retries=0)(function)


def look() -> tuple[Node, ...] | None:
    """CPUs and GPUs of the running cluster's live nodes, asked of its head without joining it.

    After workers.set_ray_environment. None where it cannot be asked so.
    """
    try:
        address = canonicalize_bootstrap_address(str(cluster_address()))
        if address is None or not _is_head(address):
            return None
        state = GlobalState()
        asked = GcsClientOptions.create(
            address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
        )
        state._initialize_global_state(asked)
        return _live(state.node_table())
    except (RayError, OSError, RuntimeError, ValueError):
        logger.exception("the cluster cannot be looked at; it is joined")
        return None


def _live(listed: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    nodes = []
    for node in listed:
        resources = node["Resources"]
        if not node["Alive"] or not resources.get("CPU"):
            continue
        known = kind_in(resources)
        nodes.append(
            Node(
                id=node["NodeID"],
                cpus=int(resources["CPU"]),
                gpus=int(resources.get("GPU", 0)),
                gpu_gb=known.gb if known else DEFAULT_GPU_GB,
                gpu_kind=known.label if known else "",
                host_gb=host_gb(resources),
            )
        )
    return tuple(nodes)


def _read_probe(file: Location) -> str:
    return file.read_text()


def require_shared_storage(store: Store, nodes: Sequence[Node]) -> None:
    """Every live node reads what the driver wrote. Raises StorageError, or PlanError where our code is not there."""
    probe = store.root / f".probe-{os.getpid()}"
    written = str(time.time())
    replace(probe, written)
    try:
        for node in nodes:
            try:
                seen = ray.get(task_on(node.id, _read_probe).remote(probe))
            except RayTaskError as error:
                if not isinstance(error.cause, OSError):
                    raise PlanError(
                        f"node {node.id[:8]} cannot run rmsweep ({error.cause}); install the repository there."
                    ) from error
                seen = ""
            except RayError as error:
                raise PlanError(
                    f"node {node.id[:8]} of the cluster does not answer ({error}); run again."
                ) from error
            if seen != written:
                raise StorageError(
                    f"node {node.id[:8]} cannot read {store.root}; give a --storage that every node of the cluster sees "
                    "(a bucket: with credentials that each node has for itself)."
                )
    finally:
        probe.unlink()
