"""Decoding with fixed shapes, and what they make possible: torch.compile, and on a GPU a CUDA graph.

A cache that grows has another shape in every step. torch.compile would compile each of them, and a graph replays one. So a step
here reads the whole cache, behind a mask. Only the blocks are compiled: what a step reads is made outside. A graph has all of it.
"""

import shutil

import torch

from nanochat.bench.ours import model_of, prompt
from nanochat.gpt import GPT, Inputs, norm
from nanochat.kv_cache import KVCache

SAME = 1e-3  # of the logits' standard deviation: more than rounding


class FixedCache(KVCache):
    """One new token, at `place` (1, 1), is read together with all max_len places of the cache; the mask hides those behind it."""

    def __init__(self, config, max_len: int, device: torch.device):
        super().__init__(config, 1, max_len, device)
        self.place = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.places = torch.arange(max_len, device=device)

    def plan(self, T: int):
        if T > 1:
            return super().plan(T)
        self.positions, self.end = self.place, self.max_len
        return self.place, (self.places <= self.place[..., None])[:, None]


class FixedSteps:
    """Tokens one by one, at most max_len with the prompt. On a GPU, a step is one replay of a CUDA graph."""

    def __init__(self, model: GPT, max_len: int, compiled: bool):
        self.model, self.cache = model, FixedCache(model.config, max_len, model.device)
        self.run = torch.compile(self.blocks, fullgraph=True, dynamic=False) if compiled else self.blocks
        self.token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        self.graph = None

    def blocks(self, x: torch.Tensor, cos, sin, mask) -> torch.Tensor:
        x = norm(x)
        for number in range(self.model.config.n_layer):
            x = self.model.layer(number, x, None, cos, sin, mask, self.cache, 0.0)
        return self.model.logits(norm(x)[:, -1])

    def read(self) -> torch.Tensor:
        """(1, vocab_size) logits after `token`, at the cache's `place`."""
        positions, mask = self.cache.plan(1)
        return self.run(
            self.model.transformer.wte(self.token), self.model.cos[positions], self.model.sin[positions], mask
        )

    def capture(self) -> None:
        stream = torch.cuda.Stream()  # what runs for the first time allocates, which a graph must not
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.read()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.read()

    def step(self, token: int) -> torch.Tensor:
        """(1, vocab_size) logits after one more token."""
        self.token.fill_(token)
        self.cache.place.fill_(self.cache.longest)
        self.cache.advance(1)
        if self.model.device.type != "cuda":
            return self.read()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.logits

    def generate(self, ids: list[int], n: int) -> tuple[list[int], torch.Tensor]:
        """The n likeliest next tokens, and the logits (1, vocab_size) of the last one."""
        self.cache.rewind([0])
        inputs = Inputs(torch.tensor([ids], device=self.model.device))
        logits, row = self.model.logits(self.model.hidden(inputs, self.cache)[:, -1]), []
        while True:
            row.append(int(logits.argmax()))
            if len(row) == n:
                return row, logits
            logits = self.step(row[-1])


def decode(shape: str, n_prompt: int, n_tokens: int, compiled: bool, device: str = "cpu"):
    """A contestant, see `ours`. Raises ImportError where there is no compiler, and where the logits are not the model's own."""
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ImportError("torch.compile needs a C++ compiler, such as g++")
    model = model_of(shape, device)
    steps, ids = FixedSteps(model, n_prompt + n_tokens, compiled), prompt(n_prompt, model.config.vocab_size)
    with torch.no_grad():
        row, logits = steps.generate(ids, n_tokens)
        expected = model(torch.tensor([ids + row[:-1]], device=device))[:, -1]
    if (logits - expected).abs().max() > SAME * expected.std():
        raise ImportError("it says something else than the model itself")
    return lambda: steps.generate(ids, n_tokens), {"parameters": model.num_parameters()}
