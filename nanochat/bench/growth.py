"""How cost grows with what a user makes larger: seconds and memory at several sizes, and the exponent of a power law
through them.

An exponent of 1 is linear. Small sizes are cheaper to handle at once than one by one, so exponents below 1 are usual.
"""

import atexit
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat.bench.ours import CONTEXT, pictures, prompt
from nanochat.bench.worker import peak

REPEATS = 5


@dataclass(frozen=True)
class Curve:
    """what: on the x axis. most: the exponent that it must not exceed by more than noise."""

    name: str
    what: str
    sizes: tuple[int, ...]
    most: float


CURVES = {
    "prefill": Curve("read a row", "tokens", (64, 128, 256, 512, 1024), 2.0),
    "position": Curve("a token after others", "tokens before it", (64, 128, 256, 512, 960), 1.0),
    "batch": Curve("a token for each row", "rows", (1, 2, 4, 8, 16, 32), 1.0),
    "shown": Curve("pictures to the first token", "pictures", (1, 2, 4, 8, 16), 1.0),
    "parameters": Curve("a token", "parameters", (1, 10, 34, 134), 1.0),
    "cameras": Curve("frames to a chunk of actions", "cameras", (1, 2, 3, 4), 1.0),
    "frames": Curve("training pictures read at a start", "pictures", (1_000, 10_000, 100_000), 1.0),
}
WIDTHS = {1: (160, 3, 1500), 10: (320, 6, 4096), 34: (512, 8, 8192), 134: (768, 12, 32000)}  # width, layers, vocabulary


@torch.no_grad()
def grow(curve: str, sizes: list[int]):
    """A contestant of worker.py that measures at once: {"rows": [[size, seconds, most bytes so far], ...]}, sizes rising."""
    rows = []
    for size in sizes:
        call, units = globals()[curve](size)
        call()
        times = []
        for _ in range(REPEATS):
            since = time.perf_counter(), time.process_time()
            call()
            times.append((time.perf_counter() - since[0], time.process_time() - since[1]))
        wall, own = np.median(times, axis=0) / units
        rows.append([parameters_of(size) if curve == "parameters" else size, wall, own, peak()])
        del call
        gc.collect()
    return lambda: None, {"rows": rows}


def exponent(sizes: list[float], costs: list[float]) -> float:
    """k of the power law cost = c * size^k nearest to the points, in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# ---- what is timed: a function of the size returns (a call, how many units it does)


def decoder(width: int = 320, layers: int = 6, vocab: int = 4096, context: int = CONTEXT):
    from nanochat.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    heads = width // 64 or 1
    heads = heads if width % (2 * heads) == 0 else 1
    model = GPT(GPTConfig(context, vocab, layers, heads, heads, width))
    model.init_weights()
    return model.eval()


def prefill(n: int) -> tuple[Callable, int]:
    from nanochat.gpt import Inputs

    model, ids = decoder(), torch.tensor([prompt(n, 4096)])
    return lambda: model.hidden(Inputs(ids)), 1


def position(n: int) -> tuple[Callable, int]:
    """Tokens n to n + 32. The cache is rewound, so that every call does the same."""
    from nanochat.gpt import Inputs

    model = decoder()
    cache, ids = model.new_cache(1), torch.tensor([prompt(n, 4096)])
    model.hidden(Inputs(ids), cache)

    def step() -> None:
        for _ in range(32):
            model.logits(model.hidden(Inputs(ids[:, :1]), cache)[:, -1])
        cache.rewind([n])

    return step, 32


def batch(n: int) -> tuple[Callable, int]:
    from nanochat.engine import Engine

    model = decoder()
    rows = [prompt(16 + number, 4096) for number in range(n)]
    return lambda: Engine(model).generate(rows, 32), 32


def shown(n: int) -> tuple[Callable, int]:
    """n photographs of 224 x 224 and a question: encoder, prompt, first token. Random weights, 49 cells, cross-attention."""
    from nanochat.config import MultimodalGPTConfig
    from nanochat.engine import Engine
    from nanochat.multimodal_gpt import MultimodalGPT
    from nanochat.vision.encoder import open_encoder

    torch.manual_seed(0)
    encoder = open_encoder("yolov9t.yaml", image_size=224)
    vision = dict(vision_embedding_dim=encoder.channels("p5"), vision_layer="p5", vision_tokens_per_image=49)
    model = MultimodalGPT(
        MultimodalGPTConfig(CONTEXT, 4096, 3, 5, 5, 320, **vision, vision_image_size=224, fusion="cross", max_images=16)
    )
    model.init_weights()
    model.attach_encoder(encoder)
    model.eval()
    images = pictures(n, 224, 224)
    ids = [model.config.vision_token_id] * n + prompt(16, 4000)
    return lambda: Engine(model).generate([ids], 1, images=[model.look(images)]), 1


def parameters(millions: int) -> tuple[Callable, int]:
    from nanochat.engine import Engine

    width, layers, vocab = WIDTHS[millions]
    model = decoder(width, layers, vocab, context=128)
    return lambda: Engine(model).generate([prompt(16, vocab)], 8), 8


def parameters_of(millions: int) -> int:
    width, layers, vocab = WIDTHS[millions]
    return 12 * layers * width**2 + 2 * vocab * width


def cameras(n: int) -> tuple[Callable, int]:
    from nanochat.bench.ours import act

    return act("robot", n, 480, 640)[0], 1


def frames(n: int) -> tuple[Callable, int]:
    """A start of training on n frames of 128 x 128 that an earlier start has decoded: from the folder to all pictures."""
    from nanochat.data.lerobot import Episode
    from nanochat.data.lerobot_writer import write_dataset
    from nanochat.data.pictures import encode_png
    from nanochat.training.recipes import Robot
    from nanochat.training.robot_data import read_data

    folder = Path(tempfile.mkdtemp(prefix="nanochat-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng, per_episode = np.random.default_rng(0), 250
    shown = [encode_png(picture) for picture in pictures(20, 128, 128)]

    def episodes():
        for number in range(n // per_episode):
            path = rng.normal(size=(per_episode + 1, 7)).cumsum(0).astype(np.float32)
            images = {"observation.images.front": [shown[(number + frame) % 20] for frame in range(per_episode)]}
            yield Episode("lift the cube", {"observation.state": path[:-1], "action": path[1:]}, images)

    write_dataset(folder / "data", episodes(), 30, "arm", (128, 128, 3))
    os.environ["NANOCHAT_CACHE"] = str(folder / "cache")
    recipe = Robot(data=str(folder / "data"), out=str(folder / "run"), vocab_size=300)
    return lambda: read_data(recipe), 1
