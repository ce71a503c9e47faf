"""Jobs for processes of their own, as a simulator wants them."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool


def in_processes(
    work: Callable, jobs: Sequence, processes: int, initializer: Callable | None = None, initargs: tuple = ()
) -> Iterator:
    """Results of work(job), in the order in which they are done.

    Raises what `work` raises, and MemoryError where a process dies: a pool of multiprocessing's would wait for it for ever.
    """
    # spawned, since a forked one would share the parent's OpenGL
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(processes, len(jobs))), context, begin, (initializer, initargs))
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            yield future.result()
        pool.shutdown()  # waits for them, so that their use of memory is known
    except BrokenProcessPool as error:
        raise MemoryError("a process died, most likely for want of memory: try again with fewer --processes") from error
    finally:
        for process in multiprocessing.active_children():  # after Ctrl-C: nobody waits for what they are at
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def begin(initializer: Callable | None, initargs: tuple) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def end_with_parent() -> None:
    """A parent that is killed cannot stop its processes; without this they would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
