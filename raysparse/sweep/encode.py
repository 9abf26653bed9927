"""Preparing pictures on Ray: the shards of a data set as tasks, on this machine's cores and GPUs or on a cluster.

`raysparse.data` knows nothing of Ray: it is given a `Run`, a function that applies another one to every task. This one
sends them to worker processes. Tasks write their shard themselves, so on several nodes the data root must be a shared
folder; a shard that is written stays, whatever happens to the driver.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from raysparse.errors import UsageError
from raysparse.space import Resources
from raysparse.sweep.cluster import concurrency, ray_for

T = TypeVar("T")
R = TypeVar("R")
LOST_PROCESS_RETRIES = 2  # of a task whose process or node was lost; what a task itself raises is not tried again
IN_FLIGHT = 2  # tasks handed out per one that fits: a free core finds the next at once, and a cluster sees the demand


class Run(Protocol):
    """Applies a top-level picklable function to every task; results in any order, as they finish."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]: ...


@contextmanager
def ray_run(
    log: Path,
    *,
    threads: int = 1,
    gpus_per_task: float | None = 0,
    address: str | None = None,
    num_cpus: float | None = None,
    temp_dir: Path | None = None,
) -> Iterator[Run]:
    """A `Run` over Ray tasks, as long as the block lasts.

    log: folder of ray.log, what Ray itself has to say. threads: of a task, each a CPU. gpus_per_task: share of a GPU
    for a task, which sees no other one; None: 1 where Ray has GPUs. address, num_cpus, temp_dir: as `cluster.ray_for`.
    UsageError where not one task fits.
    """
    if gpus_per_task is not None and gpus_per_task < 0:
        raise UsageError(f"GPUs per task must be 0 or more, got {gpus_per_task:g}")
    log.mkdir(parents=True, exist_ok=True)
    resources = Resources(cpus_per_worker=threads, gpus_per_worker=gpus_per_task or 0)
    with ray_for(log, resources, address=address, num_cpus=num_cpus, temp_dir=temp_dir):
        if gpus_per_task is None:
            import ray

            resources = resources.model_copy(update={"gpus_per_worker": min(ray.cluster_resources().get("GPU", 0), 1)})
        concurrency(resources)

        def run(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
            return _run(function, tasks, resources)

        yield run


def _run(function: Callable[[T], R], tasks: Sequence[T], resources: Resources) -> Iterator[R]:
    """The results as they come. What a task raises is raised here as it was, without Ray's own traceback around it."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    threads, gpus = int(resources.cpus_per_worker), resources.gpus_per_worker
    # Retries are counted here: Ray repeats a task that ran out of memory for ever.
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_apply)
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
        with ray_run(log, **options) as started, closing(started(function, tasks)) as results:  # type: ignore[type-var]
            yield from results

    return run
