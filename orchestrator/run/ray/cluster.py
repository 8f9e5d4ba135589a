"""The Ray cluster: join or start one, list its nodes, check that all of them see the storage. Imports no torch."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError
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
# Enough to start a process on a busy node.
ANSWER_S = 30.0
# When we say that the cluster's head does not answer, and when we stop waiting for it.
SAY_AFTER_S, GIVE_UP_AFTER_S = 10.0, 60.0

logger = logging.getLogger(__name__)


def join_ray(say: Callable[[str], None]) -> bool:
    """Join the running cluster, if there is one. Call workers.set_ray_environment first.

    Raises PlanError where its head does not answer.
    """
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
    """Wait until the cluster's head answers; `ray.init` would wait for minutes, silently and deaf to signals.

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
                    f"no Ray cluster answers at {given} within {GIVE_UP_AFTER_S:.0f} s. Check it with `ray status`; "
                    "unset RAY_ADDRESS (here: `ray stop`) to run without that cluster."
                )
            if waited > SAY_AFTER_S and not said:
                said = True
                say(f"no Ray cluster answers at {given} yet; given up after {GIVE_UP_AFTER_S:.0f} s")
            time.sleep(PROBE_S / 10)


def _is_head(address: str) -> bool:
    """Return whether a cluster's head answers there, and not just any server."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        # The head wants our certificate, which only Ray can find.
        return answers(address)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        asked = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive").future(b"", timeout=PROBE_S)
        code = asked.code()
    # A head that asks for a token has answered.
    silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)
    return code not in silent


def start_ray(cpus: int) -> None:
    """Start Ray on this machine if no cluster was joined; all of its servers listen on loopback only."""
    if ray.is_initialized():
        return
    _keep_token_private()
    # Ray replaces 127.0.0.1 by this machine's public address unless clusters are disabled, here and, through the
    # environment, in its own processes. By itself it disables them only on Windows and macOS.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray kills surplus processes after one idle second; then each task would import torch again.
    kept = {"idle_worker_killing_time_threshold_ms": IDLE_WORKER_S * 1000}
    ray.init(
        address="local",
        num_cpus=max(cpus, 2),
        _node_ip_address=LOOPBACK,
        # Half a dozen processes that nobody uses.
        include_dashboard=False,
        dashboard_host=LOOPBACK,
        _system_config=kept,
        **ray_options(),
    )


def _keep_token_private() -> None:
    """Create Ray's token file readable by its owner only; Ray would let every user of the machine read it."""
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
    """Return the options of every `ray.init`, with the environment of workers."""
    # Ray rejects a variable that a submitted job has set, even with the same value.
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    from_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    ours = dict(WORKER_ENVIRONMENT)
    if OLDER_ALLOCATOR in os.environ or OLDER_ALLOCATOR in from_job:
        ours[OLDER_ALLOCATOR] = ours.pop(ALLOCATOR)
    # The user's own values win.
    values = {name: os.environ.get(name, value) for name, value in ours.items() if name not in from_job}
    runtime = {"env_vars": values}
    return {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime}


def capacity() -> tuple[Node, ...]:
    """Return the live nodes of the cluster that was joined."""
    nodes = []
    for node in ray.nodes():
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


async def lives(node: str) -> bool:
    """Return whether a node still runs tasks. Ray lists a dead node as alive for up to half a minute."""
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
    """Return the function as a task on a node. A task with GPUs ends its process.

    Only so does CUDA return its memory, and a reused process would stay on the GPU that it saw first.
    """
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    return _remote(function, cpus, gpus).options(scheduling_strategy=pinned)


@functools.cache
def _remote(function: Callable[..., Any], cpus: int, gpus: int) -> RemoteFunction:
    # `options` cannot set `max_calls`, and Ray takes a function that is declared again for another one.
    calls = 1 if gpus else 0
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=calls, max_retries=0)(function)


def _read_probe(file: Location) -> str:
    return file.read_text()


def require_shared_storage(store: Store, nodes: Sequence[Node]) -> None:
    """Check that every node reads what the driver wrote. Raises StorageError, or PlanError where rmsweep is not installed."""
    probe = store.root / f".probe-{os.getpid()}"
    written = str(time.time())
    replace(probe, written)
    try:
        for node in nodes:
            seen = ""
            try:
                seen = ray.get(task_on(node.id, _read_probe).remote(probe))
            except RayError as error:
                cause = getattr(error, "cause", error)
                if not isinstance(cause, OSError):
                    raise PlanError(
                        f"node {node.id[:8]} of the cluster cannot run rmsweep ({cause}); install the repository there, "
                        "or run again."
                    ) from error
            if seen != written:
                raise StorageError(
                    f"node {node.id[:8]} cannot read {store.root}; give a --storage that every node of the cluster sees "
                    "(a bucket: with credentials that each node has for itself)."
                )
    finally:
        probe.unlink()
