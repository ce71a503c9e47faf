"""Several processes that train one model together: torchrun --nproc_per_node 2 -m nanochat train RECIPE ...

A step is cut into parts of `device_batch_size` pictures, each with random numbers of its own. Of n processes, number r computes
the parts r, r + n, ...; the gradients are summed, and every process then makes the same step. So a step depends on its parts, not
on who computes them: one process that accumulates all of them makes the same step.

This is data parallelism (Li et al. 2020, arXiv 2006.15704) without a wrapper around the model: the sum is made once a step, where
`Run.take_step` has all gradients. A BatchNorm that trains normalises each part with the part's own statistics, in one process as
in several, so nothing is exchanged for it; its running statistics follow from weights, data and seed alone, see `statistics`.

In a run of one process nothing is exchanged, and every function gives back what it got.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.workers import default_processes

PATIENCE = timedelta(
    days=1
)  # with the first process: it validates, saves and fills caches. A dead one is noticed at once
LARGE = 2**18  # numbers from which on a gradient is a message of its own, which saves a copy of it
_store: dist.Store | None = None  # of the processes' words to each other, None in a run of one


class LostProcess(UserError):
    """Another process of the run has ended."""


def join() -> None:
    """Wait for the other processes that torchrun started, if it did, and if this was not done before."""
    global _store
    if dist.is_initialized() or not started_by_torchrun():
        return
    _store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with peers():
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=PATIENCE)


def started_by_torchrun() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def leave() -> None:
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that prints, validates and saves."""
    return number() == 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: each has a GPU of its own. Raises UserError where there are too few."""
    if count() == 1 or device.type == "cpu":
        return device
    own, of_machine = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.index is not None:
        raise UserError(
            f"{count()} processes cannot share {device}: use --device cuda, and each takes a GPU of its own"
        )
    if torch.cuda.device_count() < of_machine:
        raise UserError(
            f"{of_machine} processes need a GPU each, but there are {torch.cuda.device_count()} here: start fewer processes, or "
            "use --device cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def own_threads() -> int:
    """The CPU threads of each process where all cores are shared equally."""
    return max(1, default_processes() // int(os.environ.get("LOCAL_WORLD_SIZE", count())))


def part_size(images: int, size: int | None) -> int | None:
    """`device_batch_size`: how many of a step's images make a part; None for all, in a run of one process.

    size: as the recipe has it; None for as many parts as there are processes. Raises UserError where there are fewer parts.
    """
    if count() == 1:
        return size
    if images < count():
        raise UserError(f"{count()} processes need --images-per-step {count()} at least, got {images}")
    size = size or -(-images // count())
    if -(-images // size) < count():
        raise UserError(
            f"{count()} processes share the {images} pictures of a step in parts of {size}: lower --device-batch-size to "
            f"{images // count()}, so that each has one, or start fewer processes"
        )
    return size


# ---- what the processes exchange


def sum_numbers(*numbers: float) -> list[float]:
    """Each of the numbers, summed over the processes."""
    if count() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with peers():
        dist.all_reduce(sums)
    return sums.tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes."""
    return sum_numbers(flag)[0] > 0


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over the processes, in place. A parameter without a gradient in any process stays without one."""
    if count() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    owners = sum_numbers(*(parameter.grad is not None for parameter in parameters))
    learnt = [parameter for parameter, n in zip(parameters, owners, strict=True) if n]
    for parameter in learnt:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    small: dict[tuple, list[torch.Tensor]] = {}  # those of a device and dtype go in one message
    with peers():
        for gradient in (parameter.grad for parameter in learnt):
            if gradient.numel() < LARGE or not gradient.is_contiguous():
                small.setdefault((gradient.device, gradient.dtype), []).append(gradient)
            else:
                dist.all_reduce(gradient)
        for gradients in small.values():
            sums = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(sums)
            for gradient, part in zip(gradients, sums.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))


def meet() -> None:
    """Wait until all processes are here."""
    sum_numbers(0)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process alone runs the block, then the others do: they find in a cache what it has put there."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def check_alike(**digests: str) -> None:
    """Raises UserError unless each of the things is the same in all processes. digests: their SHA-256, by name."""
    own = torch.tensor([list(bytes.fromhex(found)) for found in digests.values()], dtype=torch.uint8)  # (n, 32)
    found = [torch.empty_like(own) for _ in range(count())]
    with peers():
        dist.all_gather(found, own)
    different = torch.stack(found).ne(found[0]).any(0).any(1).tolist()
    if any(different):
        names = " and ".join(name for name, differs in zip(digests, different, strict=True) if differs)
        raise UserError(
            f"the processes have different {names}: start all of them with the same data, flags and version"
        )


@contextmanager
def peers() -> Iterator[None]:
    """Raises LostProcess where a process that is needed in the block has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo and nccl have no error of their own for this
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        raise LostProcess("another process of this run has ended, so all of them end") from error


# ---- what the processes say


@contextmanager
def one_voice() -> Iterator[None]:
    """All processes run the block; one speaks. The first one's output is shown, and the first error, whoever has it."""
    with ExitStack() as silence:
        if os.environ.get("RANK", "0") != "0":
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        try:
            join()
            yield
        except (Exception, KeyboardInterrupt) as error:
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # of torchrun, which ends all when one ends: the reason is said first
            if not speaks_first() and not os.environ.get("NANOCHAT_DEBUG"):
                sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
            raise
        leave()


def speaks_first() -> bool:
    """Whether no other process has said yet why the run ends."""
    try:
        return _store is None or _store.add("spoken", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


def parts_of(n: int) -> Sequence[int]:
    """Which of the n parts of a step this process computes."""
    return range(n)[number() :: count()]
