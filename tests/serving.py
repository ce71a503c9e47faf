"""A small agent behind a real HTTP server, for the tests of serving."""

import base64
import io
import threading
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from nanochat.agent import Agent
from nanochat.cli.serve import LimitFlags
from nanochat.serving.app import create_app
from nanochat.serving.batching import Batcher
from nanochat.serving.guard import Entrance
from nanochat.serving.http import make_server
from nanochat.serving.models import Models, Served
from nanochat.serving.sources import Sources
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model

LIMITS = LimitFlags(max_seconds=20)
TRAINING = {"learnt": {"questions": True, "captions": True}, "images": 2}


class TinyAgent(Agent):
    """Random weights, and vectors made of a picture's pixels. looked: the pictures that it has encoded."""

    looked = 0

    def look(self, images):
        self.looked += len(images)
        pixels = np.stack([np.asarray(image.convert("RGB").resize((4, 4)), np.float32) for image in images])
        return torch.from_numpy(pixels.reshape(len(images), 4, 12) / 255)


def make_agent(sequence_len: int = 64, **training) -> TinyAgent:
    tokenizer = Tokenizer.train(["what is it? is it red? a red box. and what else?"] * 3, 300)
    model = make_model(
        sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, vision_token_id=tokenizer.special("<|image|>"),
        vision_tokens_per_image=4,
    )  # fmt: skip
    return TinyAgent(model, tokenizer, TRAINING | training)


def png(colour: str = "red", size=(8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_uri(colour: str = "red") -> str:
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def about(*colours: str, question: str = "what is it?") -> list[dict]:
    """The messages of a question about plain pictures."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(colour)}} for colour in colours]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


@contextmanager
def running(
    agents: dict,
    sources: Sources | None = None,
    key: str | None = None,
    limits: LimitFlags = LIMITS,
    entrance: Entrance | None = None,
    **parts,
):
    """The address of a server in another thread. agents: by name. parts: further arguments of `create_app`."""
    batchers = {
        name: Batcher(agent, limits.max_rows, limits.max_queue, limits.max_pixels) for name, agent in agents.items()
    }
    models = Models({name: Served(name, agent, batchers[name]) for name, agent in agents.items()})
    app = create_app(models, sources or Sources(), limits, entrance or Entrance(key), **parts)
    server = make_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
