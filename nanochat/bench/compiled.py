"""What torch.compile gains for decoding: the engine's step with fixed shapes, compiled.

A cache that grows has another shape in every step, and torch.compile would compile each of them. So a step here reads the whole
cache, behind a mask, and is compiled once. Only the blocks are compiled: what a step reads is made outside.
"""

import shutil

import torch

from nanochat.bench.ours import model_of, prompt
from nanochat.gpt import GPT, Inputs, norm
from nanochat.kv_cache import KVCache

SAME = 1e-3  # of the logits' standard deviation: more than rounding


class FixedCache(KVCache):
    """One new token is read together with all max_len places of the cache; the mask hides those that are not filled."""

    def plan(self, T: int):
        if T > 1:
            return super().plan(T)
        self.positions, self.end = torch.tensor(self.lengths)[:, None], self.max_len
        return self.positions, (torch.arange(self.max_len) <= self.positions[..., None])[:, None]


class CompiledSteps:
    def __init__(self, model: GPT):
        self.model = model
        self.run = torch.compile(self.blocks, fullgraph=True, dynamic=False)

    def blocks(self, x: torch.Tensor, cos, sin, mask, cache: KVCache) -> torch.Tensor:
        x = norm(x)
        for number in range(self.model.config.n_layer):
            x = self.model.layer(number, x, None, cos, sin, mask, cache, 0.0)
        return self.model.logits(norm(x)[:, -1])

    def step(self, token: int, cache: KVCache) -> torch.Tensor:
        """(1, vocab_size) logits after one more token."""
        positions, mask = cache.plan(1)
        x = self.model.transformer.wte(torch.tensor([[token]]))
        logits = self.run(x, self.model.cos[positions], self.model.sin[positions], mask, cache)
        cache.advance(1)
        return logits

    def generate(self, ids: list[int], n: int) -> tuple[list[int], torch.Tensor]:
        """The n likeliest next tokens, and the logits (1, vocab_size) of the last one."""
        cache = FixedCache(self.model.config, 1, len(ids) + n)
        logits, row = self.model.logits(self.model.hidden(Inputs(torch.tensor([ids])), cache)[:, -1]), []
        while True:
            row.append(int(logits.argmax()))
            if len(row) == n:
                return row, logits
            logits = self.step(row[-1], cache)


def decode(shape: str, n_prompt: int, n_tokens: int):
    """A contestant, see `ours`. Raises ImportError where there is no compiler, and where the logits are not the model's own."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ImportError("torch.compile needs a C++ compiler, such as g++")
    model = model_of(shape)
    steps, ids = CompiledSteps(model), prompt(n_prompt, model.config.vocab_size)
    with torch.no_grad():
        row, logits = steps.generate(ids, n_tokens)
        expected = model(torch.tensor([ids + row[:-1]]))[:, -1]
    if (logits - expected).abs().max() > SAME * expected.std():
        raise ImportError("the compiled model says something else")
    return lambda: steps.generate(ids, n_tokens), {"parameters": model.num_parameters()}
