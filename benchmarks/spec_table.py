"""The description's benchmark table, measured on this machine next to the description's own figures (an RTX 2080 SUPER).

    python benchmarks/spec_table.py [--weights yolov9t.yaml] [--device cpu|cuda] [--repeats 30]

Times are medians after a warm-up. Encoder and model are measured in a process each. The peer is HF transformers' NanoChat
of the same shape and weights count, timed in turn with ours (skipped where transformers is not installed). Memory is
what the part adds: CUDA's allocator on a GPU, the process's resident set on a CPU.
"""

import gc
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from nanochat.engine import Engine
from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt
from nanochat.vision import YOLOv9Plus

SPEC = {  # component: memory, time of the description
    "YOLOv9 load": ("0.10 GB", "~2 s"),
    "Embedding extraction": ("0.11 GB", "~50 ms"),
    "Small model": ("0.01 GB", "-"),
    "Forward pass (batch 1, seq 16)": ("0.04 GB", "~10 ms"),
    "Generation (10 tokens, picture in the prompt)": ("0.04 GB", "~100 ms"),
}


@dataclass
class Args:
    weights: str = "yolov9t.yaml"
    "Official name, .pt path, or .yaml for random weights (the time is the same)."
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 30
    threads: int = 2


def start(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def memory(device: str) -> float:
    """GB in use now: allocated on the GPU, or resident in this process."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e9


def timed(function, device: str) -> float:
    """Seconds of one call, its GPU work included."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions: dict, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, called in turn so that a drift of the machine hits all alike."""
    for function in functions.values():
        for _ in range(3):
            function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(1e3 * timed(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def transformers_peer(config, device: str):
    """HF's NanoChat of the same shape, or None."""
    try:
        from transformers import NanoChatConfig, NanoChatForCausalLM
    except ImportError:
        return None
    peer = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
        )
    )  # fmt: skip
    return peer.to(device).eval()


def measure_model(args: Args) -> tuple[dict, list[str]]:
    """Rows of the table, and lines about the peers."""
    device = args.device
    config = MultimodalGPTConfig(sequence_len=512, vocab_size=1000, n_layer=2, n_head=4, n_kv_head=4, n_embd=256)
    tokens = torch.randint(0, 999, (1, 16), device=device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 0] = True
    vision, prompt = torch.rand(1, 84, device=device), tokens[0, 1:].tolist()

    before = memory(device)
    model = create_multimodal_gpt(config, device)
    model.init_weights()
    model.to(torch.float32).eval()
    used = [memory(device) - before]
    options = dict(max_new_tokens=10, temperature=0.0, vision_embeddings=vision[None])
    forward = {"ours": lambda: model(tokens, vision, mask)}
    generate = {"ours": lambda: model.generate_with_image(prompt, **options)}
    with torch.inference_mode():
        for function in (forward["ours"], generate["ours"]):
            function()
            used.append(memory(device) - before)  # before the peer takes its own

        peer, engine = transformers_peer(config, device), Engine(model)
        if peer is not None:
            fixed = dict(do_sample=False, min_new_tokens=10, max_new_tokens=10, pad_token_id=0)
            forward["transformers"] = lambda: peer(tokens)
            generate["transformers"] = lambda: peer.generate(tokens, **fixed)
        long = {"cached": lambda: engine.generate([prompt], 256), "uncached": lambda: uncached(model, prompt, 256)}
        forward, generate = medians(forward, device, args.repeats), medians(generate, device, args.repeats)
        long = medians(long, device, 3)

    took = (
        f"{model.num_parameters() / 1e6:.1f} M parameters",
        f"{forward['ours']:.2f} ms",
        f"{generate['ours']:.1f} ms",
    )
    notes = [
        f"{what}: transformers' NanoChat takes {times['transformers']:.2f} ms, "
        f"{times['transformers'] / times['ours']:.1f}x ours (text only)"
        for what, times in (("forward", forward), ("10 tokens", generate))
        if "transformers" in times
    ]
    notes.append(
        f"256 tokens: cached {long['cached']:.0f} ms, uncached {long['uncached']:.0f} ms, "
        f"{long['uncached'] / long['cached']:.1f}x"
    )
    return dict(zip(list(SPEC)[2:], zip(used, took, strict=True), strict=True)), notes


def uncached(model, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids], device=model.device))[0, -1].argmax()))
    return ids


def measure_encoder(args: Args) -> dict:
    """Rows of the table."""
    image = Image.effect_mandelbrot((640, 480), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    before, start = memory(args.device), time.perf_counter()
    yolo = YOLOv9Plus(args.weights, device=args.device)
    load = (f"{time.perf_counter() - start:.1f} s", memory(args.device) - before)
    look = medians({"ours": lambda: yolo.get_image_embeddings(image)}, args.device, max(5, args.repeats // 3))
    used = memory(args.device) - before
    return {"YOLOv9 load": load[::-1], "Embedding extraction": (used, f"{look['ours']:.0f} ms")}


def main(args: Args) -> None:
    # a process each: on a CPU the second would get the memory that the first has freed, and seem to need none
    with ProcessPoolExecutor(1, get_context("spawn"), start, (args,), max_tasks_per_child=1) as pool:
        rows, notes = pool.submit(measure_model, args).result()
        rows |= pool.submit(measure_encoder, args).result()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    table = Table(title=f"{name}; encoder {args.weights}")
    for column in ("component", "memory", "time", "description: memory", "time (RTX 2080 SUPER)"):
        table.add_column(column)
    for component, figures in SPEC.items():
        gigabytes, took = rows[component]
        table.add_row(component, f"{gigabytes:.2f} GB", took, *figures)
    console = Console(width=120)
    console.print(table)
    for line in notes:
        console.print(line)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
