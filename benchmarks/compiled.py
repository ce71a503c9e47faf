"""What torch.compile gains for decoding: the engine's step, the same with fixed shapes, and that compiled.

    python benchmarks/compiled.py

A cache that grows has another shape in every step, and torch.compile would compile each of them. So a step here reads the whole
cache, behind a mask. Milliseconds of the processor a token, one thread, batch 1, medians of runs in turn.
"""

import statistics
import time

import torch

from nanochat.gpt import GPT, GPTConfig, Inputs, norm
from nanochat.kv_cache import KVCache

SHAPES = {"2.1 M": (1000, 2, 4, 256), "10 M": (4096, 6, 5, 320)}  # vocabulary, layers, heads, width
PROMPT, MAX_LEN = 16, 256
TOKENS, ROUNDS = 64, 7


class FixedCache(KVCache):
    """One new token is read together with all max_len places of the cache; the mask hides those that are not filled."""

    def plan(self, T: int):
        if T > 1:
            return super().plan(T)
        self.positions, self.end = torch.tensor(self.lengths)[:, None], self.max_len
        return self.positions, (torch.arange(self.max_len) <= self.positions[..., None])[:, None]


class Fixed:
    """A step in which only `layers` is compiled: what a step reads is made outside."""

    def __init__(self, model: GPT, compiled: bool):
        self.model = model
        self.run = torch.compile(self.layers, fullgraph=True, dynamic=False) if compiled else self.layers

    def layers(self, x: torch.Tensor, cos, sin, mask, cache: KVCache) -> torch.Tensor:
        x = norm(x)
        for number in range(self.model.config.n_layer):
            x = self.model.layer(number, x, None, cos, sin, mask, cache, 0.0)
        return self.model.logits(norm(x)[:, -1])

    def new_cache(self) -> KVCache:
        return FixedCache(self.model.config, 1, MAX_LEN)

    def step(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        positions, mask = cache.plan(1)
        model = self.model
        logits = self.run(model.transformer.wte(ids), model.cos[positions], model.sin[positions], mask, cache)
        cache.advance(1)
        return logits


class Growing:
    """The engine's step."""

    def __init__(self, model: GPT):
        self.model = model

    def new_cache(self) -> KVCache:
        return KVCache(self.model.config, 1, MAX_LEN)

    def step(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.model.logits(self.model.hidden(Inputs(ids), cache)[:, -1])


@torch.inference_mode()
def decode(how, n: int) -> tuple[float, torch.Tensor]:
    """(milliseconds of the processor a token, logits of the last one)"""
    cache, ids = how.new_cache(), torch.full((1, 1), 7)
    how.model.hidden(Inputs(torch.arange(PROMPT)[None]), cache)
    start = time.process_time()
    for _ in range(n):
        logits = how.step(ids, cache)
    return 1e3 * (time.process_time() - start) / n, logits


def main() -> None:
    torch.set_num_threads(1)
    for shape, (vocab, n_layer, n_head, n_embd) in SHAPES.items():
        torch.manual_seed(0)
        config = GPTConfig(
            vocab_size=vocab, n_layer=n_layer, n_head=n_head, n_kv_head=n_head, n_embd=n_embd, sequence_len=MAX_LEN
        )
        model = GPT(config).eval()
        model.init_weights()
        for parameter in model.parameters():  # a new model's logits are all equal, so that nothing could disagree
            torch.nn.init.normal_(parameter, std=0.1)
        ways = {"engine": Growing(model), "fixed shapes": Fixed(model, False), "compiled": Fixed(model, True)}
        start = time.perf_counter()
        logits = [decode(way, 3)[1] for way in ways.values()]
        seconds = time.perf_counter() - start
        assert logits[0].std() > 0.01
        assert all(torch.allclose(logits[0], other, atol=1e-4) for other in logits), "the three ways disagree"
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                times[name].append(decode(way, TOKENS)[0])
        middle = {name: statistics.median(of) for name, of in times.items()}
        print(
            f"{shape}: "
            + ", ".join(f"{name} {ms:.2f} ms" for name, ms in middle.items())
            + f"; compiled in {seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
