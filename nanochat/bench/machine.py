"""What this machine can do at most, and how near a contestant comes to it: the roofline (Williams, Waterman, Patterson 2009)."""

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path


def roofline():
    """A contestant of worker.py that measures at once: bytes read a second, and float32 and bfloat16 operations a second."""
    import torch

    large, square = torch.rand(2**28), torch.rand(2048, 2048)  # 1 GB: no cache holds it
    moved = large.nbytes / best(large.sum, 20)
    flops = 2 * 2048**3
    found = {"bytes": moved, "float32": flops / best(lambda: square @ square)}
    half = square.bfloat16()
    found["bfloat16"] = flops / best(lambda: half @ half)
    return lambda: None, found


def best(call, n: int = 7) -> float:
    """Seconds of the fastest of n calls: what the machine can do if nobody disturbs it."""
    times = []
    for _ in range(n):
        since = time.perf_counter()
        call()
        times.append(time.perf_counter() - since)
    return min(times)


def described(threads: int) -> str:
    """The machine and the versions, for the head of a report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{processor()}, {cores} cores, {threads} thread{'s' * (threads > 1)}; Python {platform.python_version()}, torch "
        f"{version('torch')}; {time.strftime('%d %B %Y')}; load of the machine before: {os.getloadavg()[0]:.1f}"
    )


def processor() -> str:
    """Its name and what it can do with small numbers."""
    path = Path("/proc/cpuinfo")
    if sys.platform != "linux" or not path.exists():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16") if name in fields.get("flags", "").split()]
    return " with ".join(filter(None, [fields.get("model name", platform.machine()), ", ".join(flags)]))
