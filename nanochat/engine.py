"""Generation with a key/value cache. Token ids in, token ids out: strings are the tokenizer's business.

One prefill for the whole prompt (pictures included), then one token at a time. Rows of a batch may have different lengths
and stop at different times. A cache can be kept between calls (a chat's turns) or rewound (many questions, one picture).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from nanochat.sampling import Sampling, choose


class KVCache:
    """Preallocated keys and values, (n_layer, B, n_kv_head, max_len, head_dim) each; every row has its own length.

    Rows are filled from position 0, so a shorter row's padding lies behind its end, where the mask hides it until
    real tokens overwrite it.
    """

    def __init__(self, config, batch_size: int, max_len: int, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.lengths = [0] * batch_size

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def plan(self, T: int) -> tuple[slice | torch.Tensor, torch.Tensor | None]:
        """Where T new tokens a row will stand, and what they may see.

        Returns positions (a slice when the rows are level, else (B, T) int64) and a boolean mask that broadcasts to
        (B, H, T, seen), or None where plain causal attention, or no restriction for a single token, is right.
        """
        self.end = self.longest + T
        if self.end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens and {self.end} are needed: make it larger")
        if self.uniform:
            start = self.lengths[0]
            self.where = slice(start, self.end)
            if T == 1 or start == 0:
                return self.where, None
            query = torch.arange(start, self.end, device=self.k.device)
            return self.where, torch.arange(self.end, device=self.k.device) <= query[:, None]  # (T, seen)
        starts = torch.tensor(self.lengths, device=self.k.device)
        self.where = starts[:, None] + torch.arange(T, device=self.k.device)  # (B, T)
        mask = torch.arange(self.end, device=self.k.device) <= self.where[..., None]  # (B, T, seen)
        return self.where, mask[:, None]

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, H_kv, T, D) where `plan` said; return all that is seen, (B, H_kv, seen, D)."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if isinstance(self.where, slice):
                store[:, :, self.where] = new
            else:
                rows = torch.arange(new.size(0), device=new.device)[:, None]
                store.transpose(1, 2)[rows, self.where] = new.transpose(1, 2).to(store.dtype)
        return self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]

    def advance(self, T: int) -> None:
        self.lengths = [n + T for n in self.lengths]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget everything behind the given length of each row."""
        for row, (now, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if not 0 <= new <= now:
                raise ValueError(f"row {row} of the cache holds {now} tokens and cannot be rewound to {new}")
        self.lengths = list(lengths)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows; a row may be named twice to branch it."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[row] for row in rows]


class Engine:
    """Generates with any model that has `config`, `device`, `compute_dtype` and GPT's embed / trunk / logits."""

    def __init__(self, model):
        self.model = model

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> KVCache:
        config = self.model.config
        return KVCache(config, batch_size, max_len or config.sequence_len, self.model.device, self.model.compute_dtype)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] = (),
        vision_embeddings=None,
        cache: KVCache | None = None,
    ) -> Iterator[dict[int, int]]:
        """Yield one {row: token id} a step, for the rows that are still running.

        prompts: token ids of each row. A token of `stop_ids` ends its row and is not yielded.
        vision_embeddings: as MultimodalGPT.forward takes them, for the placeholders in the prompts.
        cache: continue what it holds; the prompts are then only what is new. The last token yielded has not been through
        the model, so it belongs to the next prompt. Lines of a given cache are kept when their row ends (and filled on
        with tokens that are not yielded: rewind them); those of the engine's own are dropped.
        Raises ValueError for empty prompts, ids out of range, and more tokens than the context holds.
        """
        prompts = [list(prompt) for prompt in prompts]
        sampling, stop_ids = sampling or Sampling(), frozenset(stop_ids)
        own_cache = cache is None
        self.check(prompts, max_new_tokens, [0] * len(prompts) if own_cache else cache.lengths)
        if own_cache:
            cache = self.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
        logits = self.prefill(prompts, vision_embeddings, cache)

        rows = list(range(len(prompts)))  # the row behind each line of the cache and of the logits
        rngs = [sampling.generator(row) for row in rows]
        finished = set()
        for step in range(max_new_tokens):
            chosen = {
                row: choose(line, sampling, rngs[row], prompts[row]) for row, line in zip(rows, logits, strict=True)
            }
            finished |= {row for row, token in chosen.items() if token in stop_ids}
            if len(finished) == len(prompts):
                return
            yield {row: token for row, token in chosen.items() if row not in finished}
            if step + 1 == max_new_tokens:
                return
            for row, token in chosen.items():
                prompts[row].append(token)
            if own_cache and finished.intersection(rows):
                cache.keep_rows([line for line, row in enumerate(rows) if row not in finished])
                rows = [row for row in rows if row not in finished]
            logits = self.logits([prompts[row][-1:] for row in rows], cache)

    def generate(self, prompts, max_new_tokens: int, **options) -> list[list[int]]:
        """Like `stream`, but returns the new ids of each row."""
        rows = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **options):
            for row, token in step.items():
                rows[row].append(token)
        return rows

    def check(self, prompts: list[list[int]], max_new_tokens: int, held: list[int]) -> None:
        config = self.model.config
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token, got an empty one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(prompts) != len(held):
            raise ValueError(f"{len(prompts)} prompts for a cache of {len(held)} rows")
        for row, prompt in enumerate(prompts):
            bad = [token for token in prompt if not 0 <= token < config.vocab_size]
            if bad:
                raise ValueError(f"row {row}: token id {bad[0]} is outside the vocabulary 0..{config.vocab_size - 1}")
        longest = max(n + len(prompt) for n, prompt in zip(held, prompts, strict=True))
        if longest + max_new_tokens > config.sequence_len:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{config.sequence_len} tokens: shorten the prompt or lower max_new_tokens"
            )

    def prefill(self, prompts: list[list[int]], vision_embeddings, cache: KVCache) -> np.ndarray:
        """Run whole prompts through the model; returns each row's logits after its last token, (B, V) float32."""
        longest = max(map(len, prompts))
        lengths = [n + len(prompt) for n, prompt in zip(cache.lengths, prompts, strict=True)]
        # Padding is any id that is no image placeholder; what it writes lies behind the row's end and is overwritten.
        pad = 0 if getattr(self.model.config, "vision_token_id", None) != 0 else 1
        rows = [prompt + [pad] * (longest - len(prompt)) for prompt in prompts]
        last = [len(prompt) - 1 for prompt in prompts]
        logits = self.logits(rows, cache, last, vision_embeddings)
        cache.rewind(lengths)
        return logits

    @torch.inference_mode()
    def logits(self, rows: list[list[int]], cache: KVCache, last: list[int] | None = None, vision_embeddings=None):
        """Feed rows of one length; returns the logits after position `last` of each (default: the end), (B, V) numpy."""
        model = self.model
        idx = torch.tensor(rows, device=model.device)  # (B, T)
        x = model.embed(idx) if vision_embeddings is None else model.embed(idx, vision_embeddings)
        x = model.trunk(x, cache)
        # only one position a row goes through the vocabulary-wide head
        x = x[:, -1] if last is None else x[torch.arange(len(rows)), last]
        return model.logits(x).cpu().numpy()
