"""What this machine can do at most, and how near a contestant comes to it: the roofline (Williams, Waterman, Patterson 2009)."""

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from nanochat.bench.worker import timed


def roofline(device: str = "cpu"):
    """A contestant of worker.py that measures at once: bytes read a second, and float32 and bfloat16 operations a second."""
    import torch

    side = 2048 if device == "cpu" else 8192  # fills the machine
    large, square = torch.rand(2**28, device=device), torch.rand(side, side, device=device)  # 1 GB: no cache holds it
    flops, half = 2 * side**3, square.bfloat16()
    found = {
        "bytes": large.nbytes / best(large.sum, 20),
        "float32": flops / best(lambda: square @ square),
        "bfloat16": flops / best(lambda: half @ half),
    }
    return lambda: None, found


def best(call, n: int = 7) -> float:
    """Seconds of the fastest of n calls: what the machine can do if nobody disturbs it."""
    return min(timed(call)[0] for _ in range(n))


def described(threads: int, device: str) -> str:
    """The machine and the versions, for the head of a report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{graphics(device)}{processor()}, {cores} cores, {threads} thread{'s' * (threads > 1)}; "
        f"Python {platform.python_version()}, torch {version('torch')}; {time.strftime('%d %B %Y')}; "
        f"load of the machine before: {os.getloadavg()[0]:.1f}"
    )


def graphics(device: str) -> str:
    if device == "cpu":
        return ""
    import torch

    return (
        f"{torch.cuda.get_device_name(device)}; memory is that of the GPU; models that ship, and SmolVLM, compute in bfloat16, "
        "the others in float32 where no other dtype is named. Its host: "
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
