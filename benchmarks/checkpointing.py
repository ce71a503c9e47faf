"""What gradient checkpointing saves and costs: peak memory and time of a training step, with and without.

    python benchmarks/checkpointing.py [--device cpu|cuda] [--n-layer 8] [--rows 32] [--tokens 256]

Each mode runs in a process of its own, since a process's peak memory never falls. The loss of both must be the same.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import tyro

from nanochat.gpt import GPT, GPTConfig


@dataclass
class Args:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    n_layer: int = 8
    rows: int = 32
    tokens: int = 256
    steps: int = 3
    mode: str = "both"
    "plain, checkpointed, or both (in turn)."


def measure(args: Args) -> dict:
    torch.manual_seed(0)
    config = GPTConfig(args.tokens, 1000, args.n_layer, n_head=4, n_kv_head=4, n_embd=256)
    model = GPT(config).to(args.device)
    model.init_weights()
    model.gradient_checkpointing = args.mode == "checkpointed"
    idx = torch.randint(0, 1000, (args.rows, args.tokens), device=args.device)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = model(idx, targets=idx)
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    return {"loss": loss.item(), "peak_gb": peak, "seconds": statistics.median(times)}


def main(args: Args) -> None:
    if args.mode != "both":
        print(json.dumps(measure(args)))
        return
    results = {}
    for mode in ("plain", "checkpointed"):
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        results[mode] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{mode:13s} loss {{loss:.6f}}  peak {{peak_gb:.2f}} GB  {{seconds:.2f}} s a step".format(**results[mode])
        )
    plain, checkpointed = results["plain"], results["checkpointed"]
    print(
        f"checkpointing: {checkpointed['peak_gb'] / plain['peak_gb']:.2f} of the memory, "
        f"{checkpointed['seconds'] / plain['seconds']:.2f} of the time, "
        f"losses differ by {abs(checkpointed['loss'] - plain['loss']):.1e}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
