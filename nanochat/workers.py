"""Jobs in worker processes, for simulators and for decoding. Imports nothing of the project."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


def in_processes(
    work: Callable, jobs: Sequence, processes: int, initializer: Callable | None = None, initargs: tuple = ()
) -> Iterator:
    """Results of work(job), in the order in which they finish. initializer(*initargs) runs once in each process.

    Raises what `work` raises, and MemoryError if a process dies: multiprocessing.Pool would wait for it forever.
    """
    # spawn: a forked process would share the parent's OpenGL context
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(processes, len(jobs))), context, start_worker, (initializer, initargs))
    try:
        with without_main():
            futures = [pool.submit(work, job) for job in jobs]  # starts the processes
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()  # waits, so that getrusage includes the memory of the processes
    except BrokenProcessPool as error:
        raise MemoryError(
            "a worker process died, most likely because memory ran out: use fewer processes (--processes)"
        ) from error
    finally:
        for process in multiprocessing.active_children():  # after Ctrl-C, their current jobs are not needed
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started now do not run the user's script again, which they need for nothing: it may have no
    `if __name__ == "__main__":`."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(hidden)


def default_processes() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(initializer: Callable | None, initargs: tuple) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def exit_with_parent() -> None:
    """A parent that is killed cannot stop its workers. Without this, they would wait for jobs forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
