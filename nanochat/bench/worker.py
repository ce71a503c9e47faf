"""One contestant of a race in a process of its own: python -m nanochat.bench.worker

Reads one line of JSON, {"make": "ours:embed", "arguments": {...}}, and prints {"about": {...}}. Then for each line with a number
it calls the contestant so many times and prints {"wall": [...], "own": [...], "peak": ...}: seconds that passed, seconds of the
process on all of its threads, and the most bytes that it ever had in memory, the GPU's if it uses one. Ends with its input.
"""

import json
import os
import resource
import sys
import time
from contextlib import suppress
from importlib import import_module


def make(name: str, arguments: dict):
    """(a function to time, what to say about it), from a function of this package by the name module:function."""
    module, function = name.split(":")
    return getattr(import_module(f"nanochat.bench.{module}"), function)(**arguments)


def gpu():
    """torch.cuda where it is in use, else None. The runtime needs no torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def timed(call) -> tuple[float, float]:
    since, own = time.perf_counter(), own_seconds()
    call()
    if cuda := gpu():
        cuda.synchronize()
    return time.perf_counter() - since, own_seconds() - own


def own_seconds() -> float:
    """Seconds of the processor, those of ended children too."""
    return time.process_time() + sum(os.times()[2:4])


def peak() -> int:
    """Bytes, of the GPU where one is in use. Linux's ru_maxrss is no less than that of the process which started this one, so its
    VmHWM is read there."""
    if cuda := gpu():
        return cuda.max_memory_allocated()
    with suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    task = json.loads(sys.stdin.readline())
    call, about = make(task["make"], task["arguments"])
    if "torch" in sys.modules:  # the runtime needs none
        sys.modules["torch"].set_grad_enabled(False)
    print(json.dumps({"about": about}), file=answers, flush=True)
    for line in sys.stdin:
        wall, own = zip(*[timed(call) for _ in range(int(line))], strict=True)
        print(json.dumps({"wall": wall, "own": own, "peak": peak()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
