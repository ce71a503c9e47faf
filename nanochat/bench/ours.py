"""The contestants of this project. Each function returns what is timed, and what is said about it. device: of torch."""

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

QUESTION = "what is the person wearing?"
SHAPES = {  # decoders by their name: width, layers, heads, vocabulary
    "2.1 M": (256, 2, 4, 1000),
    "10 M": (320, 6, 5, 4096),
    "134 M": (768, 12, 6, 32000),
}
CONTEXT = 1024
EXPORTS = "NANOCHAT_BENCH_EXPORTS"  # environment variable
ACTION = {"low": [-1.0] * 4, "high": [1.0] * 4}


def pictures(n: int, height: int = 480, width: int = 640) -> list[np.ndarray]:
    """n RGB arrays (height, width, 3) uint8, all different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, height // 16, width // 16, 3), np.uint8)
    return [np.ascontiguousarray(picture.repeat(16, 0).repeat(16, 1)) for picture in coarse]


def prompt(n: int, vocab: int) -> list[int]:
    return np.random.default_rng(0).integers(1, vocab - 1, n).tolist()


# ---- encoders


def embed(weights: str, n: int, dtype: str = "bfloat16", rectangles: bool = False, device: str = "cpu"):
    import torch

    from nanochat.vision.encoder import open_encoder
    from nanochat.vision.inference import computes_bfloat16, embeddings

    encoder, shown = open_encoder(weights, device=device), pictures(n)
    if dtype == "bfloat16" and not computes_bfloat16(torch.device(device)):
        raise ImportError("this processor computes no bfloat16")
    return lambda: embeddings(encoder, shown, "avg", "p5", getattr(torch, dtype), rectangles), {"dtype": dtype}


def embed_onnx(weights: str, n: int, int8: bool, rectangles: bool = False):
    """The same by a model on ONNX Runtime that has this encoder: a picture's vector is the mean of its map, as above."""
    agent, shown = agent_of(exported("export_encoder", weights, int8)), pictures(n)
    return lambda: agent.model.embed(shown, rectangles), {}


def export_encoder(folder: str, weights: str, int8: bool) -> None:
    from nanochat.checkpoint import save_checkpoint
    from nanochat.config import MultimodalGPTConfig
    from nanochat.multimodal_gpt import MultimodalGPT
    from nanochat.tokenizer import Tokenizer
    from nanochat.vision.encoder import open_encoder

    encoder, tokenizer = open_encoder(weights).truncate("p5"), Tokenizer.train(["a few words"], 300)
    vision = dict(vision_embedding_dim=encoder.channels("p5"), vision_layer="p5", vision_image_size=640)
    vision["vision_token_id"] = tokenizer.special("<|image|>")
    model = MultimodalGPT(MultimodalGPTConfig(64, 300, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, **vision))
    model.init_weights()
    model.attach_encoder(encoder)
    save_checkpoint(f"{folder}/torch", model, tokenizer, {})
    export_checkpoint(folder, f"{folder}/torch", int8)


def detect(weights: str, device: str = "cpu"):
    from nanochat.vision.encoder import open_encoder

    encoder, shown = open_encoder(weights, device=device), pictures(1)
    return lambda: encoder.detect(shown), {}


# ---- pictures to words


def agent_of(checkpoint: str, runtime: str = "torch", device: str = "cpu"):
    """runtime: torch, or onnx or int8 for the checkpoint's export to ONNX Runtime. An export runs as it is."""
    from nanochat.agent import Agent

    if runtime == "torch":
        return Agent.load(checkpoint, device)
    return Agent.load(exported("export_checkpoint", checkpoint, runtime == "int8"))


def exported(function: str, *arguments) -> str:
    """The folder of an export that another process made, so that this one needs no torch. Contestants of one command share it:
    the command names a folder for all of them in EXPORTS and deletes it."""
    made = hashlib.sha256(repr((function, arguments)).encode()).hexdigest()[:16]
    folder = str(Path(os.environ.get(EXPORTS) or temporary_folder(), made))
    if Path(folder, "onnx").is_dir():
        return f"{folder}/onnx"
    new = f"{folder}.{os.getpid()}"  # contestants that load at once may want the same export
    code = f"from nanochat.bench import ours; ours.{function}(*{(new, *arguments)!r})"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if ran.returncode:
        raise ImportError(f"no export: {(ran.stderr.strip().splitlines() or ['it ended'])[-1]}")
    with suppress(OSError):  # another one was first
        os.rename(new, folder)
    return f"{folder}/onnx"


def temporary_folder() -> str:
    """Deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="nanochat-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def export_checkpoint(folder: str, checkpoint: str, int8: bool) -> None:
    from PIL import Image

    from nanochat.export import export

    calibrate = Path(folder, "pictures") if int8 else None
    if calibrate is not None:
        calibrate.mkdir(parents=True)
        for number, picture in enumerate(pictures(8)):
            Image.fromarray(picture).save(calibrate / f"{number}.png")
    export(checkpoint, f"{folder}/onnx", int8=int8, calibrate=calibrate)


def ask(
    checkpoint: str,
    picture: str,
    question: str = "",
    n_tokens: int | None = None,
    runtime: str = "torch",
    device: str = "cpu",
):
    """From the file of a picture to the text. An empty question asks for a caption; n_tokens: 1 for the first token alone."""
    from nanochat.agent import question_message
    from nanochat.data.sample import CAPTION_PROMPT
    from nanochat.engine import Engine

    agent, message = agent_of(checkpoint, runtime, device), question_message(question or CAPTION_PROMPT, 1)

    def reply() -> str:
        vectors, ids = agent.look([picture]), agent.prompt([message])
        stop_ids = agent.stop_ids if n_tokens is None else ()
        rows = Engine(agent.model).generate([ids], agent.room(len(ids), n_tokens), stop_ids=stop_ids, images=[vectors])
        return agent.tokenizer.decode(rows[0])

    return reply, {"says": reply()}


COLD = """
import sys
from nanochat.agent import Agent
agent = Agent.load(sys.argv[1], sys.argv[4])
print("".join(agent.ask(sys.argv[3], agent.look(sys.argv[2]))))
"""


def cold(checkpoint: str, picture: str, question: str, runtime: str = "torch", device: str = "cpu"):
    """A new process that loads a model and answers a question."""
    name = checkpoint if runtime == "torch" else exported("export_checkpoint", checkpoint, runtime == "int8")
    words = [sys.executable, "-P", "-c", COLD, name, picture, question, device]
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL), {}


def look(checkpoint: str, picture: str, runtime: str = "torch", device: str = "cpu"):
    agent = agent_of(checkpoint, runtime, device)
    return lambda: agent.look([picture]), {}


# ---- words


def model_of(shape: str, device: str = "cpu"):
    """A GPT in float32 with random weights, none of them zero."""
    import torch

    from nanochat.gpt import GPT, GPTConfig

    width, layers, heads, vocab = SHAPES[shape]
    torch.manual_seed(0)
    model = GPT(GPTConfig(CONTEXT, vocab, layers, heads, heads, width))
    model.init_weights()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.02)
    return model.eval().to(device)


def decode(shape: str, n_prompt: int, n_tokens: int, device: str = "cpu"):
    from nanochat.engine import Engine

    model = model_of(shape, device)
    ids = prompt(n_prompt, model.config.vocab_size)
    return lambda: Engine(model).generate([ids], n_tokens), {"parameters": model.num_parameters()}


def decode_onnx(shape: str, n_prompt: int, n_tokens: int, int8: bool):
    """The same shape on ONNX Runtime."""
    from nanochat.engine import Engine
    from nanochat.runtime import load

    model = load(exported("export_shape", shape, int8)).model
    ids = prompt(n_prompt, model.config.vocab_size)
    return lambda: Engine(model).generate([ids], n_tokens), {}


def export_shape(folder: str, shape: str, int8: bool) -> None:
    from nanochat.checkpoint import save_checkpoint
    from nanochat.export import export
    from nanochat.tokenizer import Tokenizer

    save_checkpoint(f"{folder}/torch", model_of(shape), Tokenizer.train(["a few words"], 300), {})
    export(f"{folder}/torch", f"{folder}/onnx", int8=int8)


def decode_uncached(shape: str, n_prompt: int, n_tokens: int, device: str = "cpu"):
    """The loop of a model without a cache: every token reads the whole row again."""
    import torch

    model = model_of(shape, device)
    ids = prompt(n_prompt, model.config.vocab_size)

    def generate() -> None:
        row = list(ids)
        for _ in range(n_tokens):
            row.append(int(model(torch.tensor([row], device=device))[0, -1].argmax()))

    return generate, {}


# ---- actions


def act(checkpoint: str, cameras: int, height: int, width: int, runtime: str = "torch", device: str = "cpu"):
    """From camera frames to a chunk of actions. A policy that has another number of cameras is made with random weights."""
    if cameras == 1 or runtime == "torch":
        agent = agent_of(checkpoint, runtime, device)
    else:
        agent = agent_of(exported("export_cameras", checkpoint, cameras, runtime == "int8"))
    if cameras != len(agent.metadata["cameras"] or [""]):
        agent = with_cameras(agent, cameras)
    names, dim = agent.metadata["cameras"], agent.metadata["state_dim"]
    shown = pictures(cameras, height, width)
    seen = dict(zip(names, shown, strict=True)) if cameras > 1 else shown[0]
    state = np.full((1, dim), 0.2, np.float32) if dim else None
    about = {"pixels": agent.metadata["image_size"], "chunk": agent.metadata["chunk"]}
    return lambda: agent.act([seen], state, ["open the door"]), about


def with_cameras(agent, n: int):
    from nanochat.agent import Agent
    from nanochat.robot_gpt import RobotGPT

    model = RobotGPT(replace(agent.model.config, cameras=[f"camera_{number}" for number in range(n)]))
    model.init_weights()
    model.attach_encoder(agent.model.vision_encoder)
    model.to(agent.model.device).set_compute_dtype(agent.model.compute_dtype)
    return Agent(model.eval(), agent.tokenizer)


def export_cameras(folder: str, checkpoint: str, n: int, int8: bool) -> None:
    from nanochat.agent import Agent
    from nanochat.checkpoint import save_checkpoint

    agent = with_cameras(Agent.load(checkpoint), n)
    save_checkpoint(f"{folder}/torch", agent.model, agent.tokenizer, {"learnt": {"actions": True}})
    export_checkpoint(folder, f"{folder}/torch", int8)


# ---- training, and the description's table


def train(shape: str, rows: int, length: int, device: str = "cpu"):
    """Forward and backward of a batch (rows, length), without the optimiser."""
    import torch

    model = model_of(shape, device).train()
    ids = torch.tensor([prompt(length + 1, model.config.vocab_size)] * rows, device=device)

    @torch.enable_grad()
    def step() -> None:
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        model.zero_grad()

    return step, {"parameters": model.num_parameters()}


def small_model(device: str):
    import torch

    from nanochat.config import MultimodalGPTConfig
    from nanochat.multimodal_gpt import create_multimodal_gpt

    torch.manual_seed(0)
    shape = dict(sequence_len=512, vocab_size=1000, n_layer=2, n_head=4, n_kv_head=4, n_embd=256)
    model = create_multimodal_gpt(MultimodalGPTConfig(**shape))
    model.init_weights()
    return model.eval().to(device)


def forward(length: int, device: str = "cpu"):
    import torch

    model = small_model(device)
    ids = torch.tensor([prompt(length, 999)], device=device)
    return lambda: model(ids), {"parameters": model.num_parameters()}


def generate(n_tokens: int, device: str = "cpu"):
    """Tokens after a picture's vectors, as the description's `generate_with_image` makes them."""
    import torch

    model, ids = small_model(device), prompt(15, 999)
    options = dict(vision_embeddings=torch.rand(1, 1, 84, device=device), max_new_tokens=n_tokens, temperature=0.0)
    return lambda: model.generate_with_image(ids, **options), {}


def load_encoder(weights: str, device: str = "cpu"):
    from nanochat.vision.encoder import open_encoder

    since = time.perf_counter()
    open_encoder(weights, device=device)
    return lambda: open_encoder(weights, device=device), {"first_seconds": round(time.perf_counter() - since, 2)}
