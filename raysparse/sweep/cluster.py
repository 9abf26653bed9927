"""Ray for one sweep: a local one of its own, or the cluster at an address; what fits; and an end without leftovers."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from raysparse.errors import UsageError
from raysparse.resources import Resources
from raysparse.sweep.auth import make_token

WAIT_S = 45.0  # so long a cluster that may grow gets to show enough resources
SHORT_S = 20.0  # and one that has lost its nodes, before it is said: a spot machine is often followed by another

HANDOVER = "TUNE_FUNCTION_THREAD_TIMEOUT_S"
# Read by Ray when it is imported or started; a value that the user has set stays.
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # tuner.py has its own, for SIGTERM too
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "-1",  # asked beforehand
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the records and in trials/<id>/error.txt
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the default, 2 s, lets one report through per 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per trial and 4 s of its start; leaving.py asks itself
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard's Train page is empty
    # The next trial of a process waits so long for the one before to end there, which may be waiting for storage. After
    # 2 s, the default, Tune drops it without a word to anyone, and its place among the trials that run at a time.
    HANDOVER: "86400",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints even at verbose=0
    "RAY_prestart_worker_first_driver": "0",  # a process per core, .4 s of CPU each, none of which becomes a trial's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # 2.60 warns at every start unless it is chosen: keep CUDA's own
}


@contextmanager
def ray_for(
    results: Path,
    resources: Resources,
    *,
    address: str | None = None,
    num_cpus: float | None = None,
    temp_dir: Path | None = None,
) -> Iterator[None]:
    """Ray, connected; disconnected (and, if it was ours, ended with all its processes) when the block ends.

    address: of a running cluster; None: $RAY_ADDRESS, or a local Ray that dies with this process, even by kill -9.
    num_cpus: of a local one. temp_dir: for its sockets and logs; a short path, Unix sockets allow 107 bytes.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    options = {"num_cpus": num_cpus, "_temp_dir": str(temp_dir) if temp_dir else None} if local else {}
    if local:
        _check_fits([{"CPU": float(num_cpus or os.cpu_count() or 1), "GPU": math.inf}], resources, "this machine")
        make_token()
    try:
        ray.init(
            address=address,
            # A stopped trial's worker group is freed through the dashboard's State API; one worker has no such group.
            include_dashboard=resources.workers > 1 if local else None,
            log_to_driver=False,
            logging_level="ERROR",  # on the terminal, until there is the file
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UsageError(f"cannot start or reach Ray at {address!r}: {error}") from error
    except Exception as error:  # of a Ray that does not come up in time it says Exception itself
        if not local:
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"cannot start Ray on this machine: {why}; try again") from error
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.add(HANDOVER)  # to processes on other nodes too
    with _said_to(results / "ray.log"):
        try:
            with _one_ray() if resources.workers > 1 else nullcontext(), _killed_is_lost():
                yield
        finally:
            ray.shutdown()


@contextmanager
def _one_ray() -> Iterator[None]:
    """Tell every process of a trial which Ray is meant.

    Ray Train's cleaner looks for the only Ray of the machine; with two of them it dies, and a stopped trial's workers
    keep their place for ever. Tune hands on a fixed list of variables, so this one is added to it.
    """
    import ray
    from ray.tune.execution import class_cache

    before = os.environ.get("RAY_ADDRESS")
    class_cache.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


@contextmanager
def _killed_is_lost() -> Iterator[None]:
    """Let Tune take a trial's process that Ray killed because memory ran low for one that was lost.

    It knows RayActorError alone: at an OutOfMemoryError, whoever used the memory, it ended the whole sweep.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    before = RayActorManager._actor_task_failed

    def failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        lost = RayActorError(error_msg=str(exception)) if isinstance(exception, OutOfMemoryError) else exception
        before(manager, tracked_actor_task, lost)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = before


def concurrency(resources: Resources) -> int:
    """Trials at a time: as many as fit, at most `max_concurrent`. UsageError where not one fits, with what is missing.

    On a cluster that an autoscaler makes larger, what it may still start counts. Another one may be about to be
    joined by its nodes, so one that is too small is asked again for 45 s.
    """
    from raysparse.sweep import autoscaling

    growing = autoscaling.nodes_at_most() if _can_grow() else None
    deadline = time.monotonic() + (WAIT_S if _can_grow() and growing is None else 0)
    while True:
        nodes = growing or _alive()
        where = f"the cluster of {len(nodes)} nodes" if len(nodes) > 1 else "this machine"
        try:
            fit = _check_fits(nodes, resources, where)
            break
        except UsageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    return min(fit, resources.max_concurrent or fit)


def _check_fits(nodes: list[dict[str, float]], resources: Resources, where: str) -> int:
    """Trials that fit on nodes with these resources. A worker lies on one node, a trial's workers on any."""
    slots = sum(resources.workers_on(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    if slots >= resources.workers:
        return slots // resources.workers
    need = f"{resources.workers} worker{'s' * (resources.workers > 1)} x {resources.cpus_per_worker:g} CPUs"
    have = f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs"
    if resources.gpus_per_worker:
        need += f" and {resources.gpus_per_worker:g} GPUs"
        gpus = sum(node.get("GPU", 0) for node in nodes)
        have += f" and {gpus:g} GPUs" if math.isfinite(gpus) else ""
    raise NoRoom(
        f"one trial needs {need}, but {where} has {have}, room for {slots} such worker{'s' * (slots != 1)}",
        "change `resources:` in the sweep file or give a larger cluster",
    )


class NoRoom(UsageError):
    """Not one trial fits. found: what is needed and what is there."""

    def __init__(self, found: str, todo: str) -> None:
        super().__init__(f"{found}; {todo}")
        self.found = found


class RayLost(UsageError):
    """The Ray that this process started has no node left, and no other can join it."""


class Shortage:
    """Said by a sweep that runs: the nodes that are left have room for no trial, and when they have again."""

    def __init__(
        self,
        resources: Resources,
        nodes: Callable[[], list[dict[str, float]]] | None = None,
        can_grow: Callable[[], bool] | None = None,
    ) -> None:
        """nodes: the resources of each node that is alive; can_grow: whether others may join; None: Ray is asked."""
        self._resources, self._nodes, self._can_grow = resources, nodes or _alive, can_grow or _can_grow
        self._since: float | None = None
        self._said = False

    def __call__(self) -> str | None:
        """What there is to say now; a shortage that lasts is said once. RayLost where it would last for ever."""
        nodes = self._nodes()
        try:
            _check_fits(nodes, self._resources, f"the cluster of {len(nodes)} node{'s' * (len(nodes) != 1)}")
        except NoRoom as lack:
            self._since = time.monotonic() if self._since is None else self._since
            if self._said or time.monotonic() - self._since < SHORT_S:
                return None
            if not nodes and not self._can_grow():
                raise RayLost("the Ray of this machine was lost (its raylet ended)") from None
            self._said = True
            return f"no trial can run: {lack.found}; waiting for nodes to join (`ray status` shows what is asked for)"
        said, self._said, self._since = self._said, False, None
        return "there is room for trials again" if said else None


def _alive() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _can_grow() -> bool:
    """Whether nodes may join: it is a cluster that this process did not start."""
    from ray._private.worker import global_worker

    return not global_worker.node.is_head()


@contextmanager
def _said_to(path: Path) -> Iterator[None]:
    """What Ray says in this process goes to a file: the terminal is the command line's."""
    from ray._private import worker

    handler = _Log(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ray")
    before, printed = list(logger.handlers), worker.print_to_stdstream

    def say(data: dict[str, Any], ignore_prefix: bool) -> None:
        logger.warning("%s: %s", data.get("pid"), " ".join(data.get("lines", [])))

    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    worker.print_to_stdstream = say  # of lost workers it prints, whatever log_to_driver is
    try:
        yield
    finally:
        worker.print_to_stdstream = printed
        logger.handlers[:] = before
        handler.close()


class _Log(logging.FileHandler):
    """A log that cannot be written loses what it was told: that ends nothing, and hides no error that does."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # where it is opened only now
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass  # else a traceback on the terminal

    def close(self) -> None:
        with suppress(OSError):  # what is still to be written
            super().close()
