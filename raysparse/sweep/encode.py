"""Preparing pictures on Ray: the shards of a data set as tasks, on this machine's cores and GPUs or on a cluster.

`raysparse.data` knows nothing of Ray: it is given a `Run`, a function that applies another one to every task. This one
sends them to worker processes. Tasks write their shard themselves, so on several nodes the data root must be a shared
folder; a shard that is written stays, whatever happens to the driver.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from raysparse.config import TrialConfig
from raysparse.data.shards import Run
from raysparse.errors import UsageError
from raysparse.resources import Resources
from raysparse.sweep.cluster import concurrency, ray_for

T = TypeVar("T")
R = TypeVar("R")
LOST_PROCESS_RETRIES = 2  # of a task whose process or node was lost; what a task itself raises is not tried again
IN_FLIGHT = 2  # tasks handed out per one that fits: a free core finds the next at once, and a cluster sees the demand


# What encoding 8 pictures of 256 px (FirstStage's batch) with VQ-f4 takes at its peak: 2.4 GB measured, torch included.
ENCODING_BYTES = 3 * 2**30


@contextmanager
def ray_run(
    log: Path,
    *,
    threads: int = 1,
    gpus_per_task: float = 0,
    memory: int = 0,
    address: str | None = None,
    num_cpus: float | None = None,
    temp_dir: Path | None = None,
) -> Iterator[Run]:
    """A `Run` over Ray tasks, as long as the block lasts.

    log: folder of ray.log, what Ray itself has to say. threads: of a task, each a CPU. gpus_per_task: share of a GPU
    for a task, which sees no other one. memory: bytes that a task takes; no more run on a node than it has room for, at
    least one. address, num_cpus, temp_dir: as `cluster.ray_for`. UsageError where not one task fits.
    """
    if gpus_per_task < 0:
        raise UsageError(f"GPUs per task must be 0 or more, got {gpus_per_task:g}")
    log.mkdir(parents=True, exist_ok=True)
    resources = Resources(cpus_per_worker=threads, gpus_per_worker=gpus_per_task)
    with ray_for(log, resources, address=address, num_cpus=num_cpus, temp_dir=temp_dir):
        concurrency(resources)

        def run(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
            return _run(function, tasks, resources, memory)

        yield run


def _run(function: Callable[[T], R], tasks: Sequence[T], resources: Resources, memory: int) -> Iterator[R]:
    """The results as they come. What a task raises is raised here as it was, without Ray's own traceback around it."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    threads, gpus = int(resources.cpus_per_worker), resources.gpus_per_worker
    # Retries are counted here: Ray repeats a task that ran out of memory for ever.
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, memory=_room(memory), max_retries=0)(_apply)
    function_ref = ray.put(function)
    waiting = deque((task, 0) for task in tasks)
    running: dict[Any, tuple[T, int]] = {}
    try:
        while waiting or running:
            limit = IN_FLIGHT * concurrency(resources) if waiting else 0  # asked again: a cluster grows
            while waiting and len(running) < limit:
                task, lost = waiting.popleft()
                running[remote.remote(function_ref, task, threads, gpus)] = (task, lost)
            for done in ray.wait(list(running), num_returns=1)[0]:
                task, lost = running.pop(done)
                try:
                    result: R = ray.get(done)
                except RayTaskError as error:
                    raise _raised(error) from None
                except (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError) as error:
                    if lost == LOST_PROCESS_RETRIES:
                        raise UsageError(_gave_up(error, lost)) from error
                    waiting.append((task, lost + 1))
                else:
                    yield result
    finally:
        for left in running:  # an error, Ctrl-C, or nobody wants more
            ray.cancel(left, force=True)


def _apply(function: Callable[[T], R], task: T, threads: int, gpus: float) -> R:
    """In a worker process, which may have done other tasks before."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else every CPU task would put its model on the first GPU
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    return function(task)


def _room(memory: int) -> int | None:
    """What to ask of Ray for a task: no more than its largest node has, or it would wait for ever."""
    import ray

    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return min(memory, int(max(nodes))) or None


def _raised(error: Any) -> BaseException:
    """What the task itself raised. Its traceback, which is a text, stays with all but a user's mistake."""
    cause: BaseException = error.cause
    if not isinstance(cause, UsageError):
        cause.add_note(str(error))
    return cause


def _gave_up(error: BaseException, lost: int) -> str:
    kind = type(error).__name__
    return (
        f"the process that encoded a shard died {lost + 1} times ({kind}); out of memory is the usual reason: use fewer"
        " at a time (--cpus). Finished shards are kept, the same command goes on"
    )


def run_on(log: Path, **options: Any) -> Run:
    """A `Run` that starts Ray when it is first asked for results: nothing starts where all is prepared already.

    options: as `ray_run`.
    """

    def run(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
        if not tasks:
            return
        with ray_run(log, **options) as started:
            yield from started(function, tasks)

    return run


def prepare(
    trial: TrialConfig,
    *,
    cpus: int | None = None,
    gpus_per_task: float | None = None,
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **ray: Any,
) -> Path:
    """The prepared data set that a trial asks for, made now unless it is there; pictures by a Ray task per shard.

    cpus: of this machine; 1, without an address: in this process, without Ray, and so it is where Ray is not installed.
    gpus_per_task: None: 1 where this machine has a GPU and there is a first stage. ray: as `ray_run`.
    UsageError as `prepared.prepare`, for weights that cannot be had, and for what does not fit.
    """
    import torch

    from raysparse import plugins
    from raysparse.data import prepared
    from raysparse.train.first_stage import FirstStage

    data = trial.data
    root = Path(data.root or prepared.default_root()).expanduser().absolute()  # a worker may be in another folder
    source = Path(data.source).expanduser().absolute() if data.source else None
    if gpus_per_task is None:
        gpus_per_task = float(trial.first_stage is not None and torch.cuda.is_available())
    encoder = FirstStage.of(trial.first_stage, "cuda" if gpus_per_task else "cpu") if trial.first_stage else None
    address = address or os.environ.get("RAY_ADDRESS")
    run = prepared.in_order
    if plugins.load("datasets", data.name).SPEC.kind == "image" and (address or (cpus != 1 and has_ray())):
        memory = ENCODING_BYTES if encoder else 0
        run = run_on(root, gpus_per_task=gpus_per_task, memory=memory, address=address, num_cpus=cpus, **ray)
    elif cpus:
        torch.set_num_threads(cpus)
    return prepared.prepare(
        data.name, data.options, source=source, root=root, progress=progress, encoder=encoder, run=run
    )


def has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def facts(folder: Path) -> dict[str, Any]:
    """What a prepared folder holds, as plain data."""
    from raysparse.data import prepared

    manifest = prepared.read_manifest(folder)
    splits = manifest["splits"].items()
    return {
        "folder": str(folder),
        "examples": {name: place.get("rows", place.get("stop", 0) - place.get("start", 0)) for name, place in splits},
        "classes": len(manifest["classes"]),
        "encoder": manifest.get("encoder"),
        "latent_shape": manifest.get("latent_shape"),
        "other_files": sum(n for name, n in manifest.get("facts", {}).items() if name.startswith("other_files")),
        "damaged": [{"id": name, "reason": reason} for name, reason in prepared.damaged(folder)],
    }
