"""Generation with a key/value cache. Token ids in, token ids out: strings are the tokenizer's business.

    engine = Engine(model)
    row = engine.add(prompt, max_new_tokens=20)      # rows may be added and dropped while others run
    while row in engine.rows:
        token = engine.step().get(row)

A prompt is read in one pass (pictures included), then each step reads one token of every running row. Rows have their own
length, sampling and stop ids. A row can continue a cache that its owner keeps: a chat's turns, or many questions about one
picture.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.cross_attention import Pictures
from nanochat.errors import UserError
from nanochat.gpt import Inputs
from nanochat.sampling import Sampling, choose


class KVCache:
    """Preallocated keys and values, (n_layer, B, n_kv_head, max_len, head_dim) each; every row has its own length.

    Rows are filled from position 0, so a shorter row's padding lies behind its end, where the mask hides it until
    real tokens overwrite it. pictures: those of the rows, for a model that looks at them by cross-attention, else None.
    """

    def __init__(self, config, batch_size: int, max_len: int, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        crosses = getattr(config, "fusion", "prefix") == "cross"
        self.pictures = Pictures.none(config, batch_size, device, dtype) if crosses else None
        self.max_len = max_len
        self.lengths = [0] * batch_size

    @classmethod
    def joined(cls, first: "KVCache", second: "KVCache") -> "KVCache":
        """A new cache with the rows of both, `first` in front."""
        whole = object.__new__(cls)
        whole.max_len = max(first.max_len, second.max_len)
        whole.lengths = [*first.lengths, *second.lengths]
        whole.k, whole.v = (
            torch.cat([F.pad(part, (0, 0, 0, whole.max_len - part.size(3))) for part in parts], dim=1)
            for parts in ((first.k, second.k), (first.v, second.v))
        )
        whole.pictures = None if first.pictures is None else Pictures.joined(first.pictures, second.pictures)
        return whole

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def plan(self, T: int) -> tuple[slice | torch.Tensor, torch.Tensor | None]:
        """Positions of T new tokens in each row, and what they may attend to.

        Returns positions (a slice when all rows have one length, else (B, T) int64) and a boolean mask that broadcasts to
        (B, H, T, seen), or None where plain causal attention, or no restriction for a single token, is right.
        """
        self.end = self.longest + T
        if self.end > self.max_len:
            raise UserError(f"the cache holds {self.max_len} tokens and {self.end} are needed: make it larger")
        if self.uniform:
            start = self.lengths[0]
            self.positions = slice(start, self.end)
            if T == 1 or start == 0:
                return self.positions, None
            query = torch.arange(start, self.end, device=self.k.device)
            return self.positions, torch.arange(self.end, device=self.k.device) <= query[:, None]  # (T, seen)
        starts = torch.tensor(self.lengths, device=self.k.device)
        self.positions = starts[:, None] + torch.arange(T, device=self.k.device)  # (B, T)
        mask = torch.arange(self.end, device=self.k.device) <= self.positions[..., None]  # (B, T, seen)
        return self.positions, mask[:, None]

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, H_kv, T, D) at the planned positions; return all that is cached, (B, H_kv, seen, D)."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if isinstance(self.positions, slice):
                store[:, :, self.positions] = new
            else:
                rows = torch.arange(new.size(0), device=new.device)[:, None]
                store.transpose(1, 2)[rows, self.positions] = new.transpose(1, 2).to(store.dtype)
        return self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]

    def advance(self, T: int) -> None:
        self.lengths = [n + T for n in self.lengths]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget everything behind the given length of each row, pictures that were shown there too."""
        for row, (now, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if not 0 <= new <= now:
                raise UserError(f"row {row} of the cache holds {now} tokens and cannot be rewound to {new}")
        self.lengths = list(lengths)
        if self.pictures is not None:
            self.pictures = self.pictures.rewound(lengths)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows; a row may be named twice to branch it."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[row] for row in rows]
        if self.pictures is not None:
            self.pictures = self.pictures.of_rows(index)


@dataclass
class Row:
    """One answer in the making. unread: tokens that the cache does not hold yet: the prompt, then the last token."""

    answer: list[int]  # the tokens so far, for the repetition penalty
    unread: list[int]
    left: int  # tokens that may still come
    sampling: Sampling
    rng: np.random.Generator
    stop_ids: frozenset[int]
    images: torch.Tensor | None  # (M, D), until the prompt has been read
    states: torch.Tensor | None  # (S, state_dim)
    cache: KVCache | None  # of the caller, to continue


class Engine:
    """A batch of rows that come and go, for any model with `config`, `device`, `compute_dtype`, `hidden` and `logits`.

    rows: number -> Row, those that are waiting or running. A row leaves when it has ended or is dropped.
    """

    def __init__(self, model):
        self.model = model
        self.rows: dict[int, Row] = {}
        self.lines: list[int] = []  # the row behind each line of the cache; rows that are not in it wait to be read
        self.cache: KVCache | None = None
        self.added = 0

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> KVCache:
        config = self.model.config
        return KVCache(config, batch_size, max_len or config.sequence_len, self.model.device, self.model.compute_dtype)

    # ---- rows come and go

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] = (),
        images: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        cache: KVCache | None = None,
        sample: int = 0,
    ) -> int:
        """Add a row; the next `step` reads its prompt. Returns the row's number.

        prompt: token ids. stop_ids: each of these ends the row and is not returned.
        images: (M, D) or (n, N, D) vision vectors for the placeholders in the prompt. states: (S, state_dim), normalised, for
        its <|state|> tokens. cache: of one row, to be continued; the prompt is then only what is new. While the row runs alone,
        that cache is filled in place. The last token of an answer has not been read, so it belongs to the next prompt.
        sample: tells answers to the same prompt and seed apart.
        Raises ValueError for an empty prompt, ids out of range, more tokens than fit the context, and vision vectors that do
        not match the placeholders.
        """
        if cache is not None and len(cache.lengths) != 1:
            raise UserError(f"a cache continues one row, this one has {len(cache.lengths)}")
        if cache is not None and any(row.cache is cache for row in self.rows.values()):
            raise UserError("a cache continues one row at a time, and a row that has not ended uses this one")
        prompt, held = list(prompt), cache.longest if cache is not None else 0
        self.check(prompt, max_new_tokens, held)
        if cache is not None and held + len(prompt) + max_new_tokens > cache.max_len:
            raise UserError(
                f"the cache holds {cache.max_len} tokens, and {held + len(prompt) + max_new_tokens} are needed: "
                "make it larger"
            )
        if images is not None and not hasattr(self.model, "checked_vectors"):
            raise UserError("this is a text model: it cannot read vision vectors")
        if images is not None:
            placeholders = prompt.count(self.model.config.vision_token_id)
            shown = int(cache.pictures.counts) if cache is not None and cache.pictures is not None else 0
            images = self.model.checked_vectors(images.flatten(0, -2), placeholders, shown)
        sampling = sampling or Sampling()
        number, self.added = self.added, self.added + 1
        self.rows[number] = Row(
            [], prompt, max_new_tokens, sampling, sampling.generator(sample), frozenset(stop_ids), images, states, cache
        )  # fmt: skip
        return number

    def drop(self, *numbers: int) -> None:
        """Forget rows, running or waiting. A number that is not there (any more) is ignored."""
        for number in numbers:
            self.rows.pop(number, None)
        kept = [line for line, number in enumerate(self.lines) if number in self.rows]
        if not kept:
            self.cache = None
        elif len(kept) < len(self.lines):
            self.cache.keep_rows(kept)
        self.lines = [self.lines[line] for line in kept]

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """One token for every row: {row: token id}. Rows that hit a stop id are left out; ended rows leave `rows`."""
        logits = self.read(self.lines, self.cache) if self.lines else {}
        waiting = [number for number in self.rows if number not in self.lines]
        for numbers, cache in self.prefills(waiting):
            logits |= self.read(numbers, cache)
            self.cache = cache if self.cache is None else KVCache.joined(self.cache, cache)
            self.lines = [*self.lines, *numbers]
        said, ended = {}, []
        for number, line in logits.items():
            row = self.rows[number]
            token = choose(line, row.sampling, row.rng, row.answer)
            row.left -= 1
            if token not in row.stop_ids:
                said[number] = token
                row.answer.append(token)
                row.unread = [token]
            if token in row.stop_ids or row.left == 0:
                ended.append(number)
        self.drop(*ended)
        return said

    def prefills(self, waiting: list[int]) -> Iterator[tuple[list[int], KVCache]]:
        """Rows that are read together, and their cache: new rows in one batch, a row that continues a cache on its own."""
        new = [number for number in waiting if self.rows[number].cache is None]
        if new:
            longest = max(len(self.rows[number].unread) + self.rows[number].left for number in new)
            yield new, self.new_cache(len(new), longest)
        for number in waiting:
            if self.rows[number].cache is not None:
                yield [number], self.rows[number].cache

    def read(self, numbers: list[int], cache: KVCache) -> dict[int, np.ndarray]:
        """Read the unread tokens of rows, line by line of the cache. Returns the logits after each row's last token, (V,)."""
        rows = [self.rows[number] for number in numbers]
        lengths = [held + len(row.unread) for held, row in zip(cache.lengths, rows, strict=True)]
        last = [len(row.unread) - 1 for row in rows]
        hidden = self.model.hidden(self.inputs(rows), cache)
        cache.rewind(lengths)  # padding lies behind a row's end
        # only one position a row goes through the vocabulary-wide head
        hidden = hidden[:, -1] if min(last) == max(last) else hidden[torch.arange(len(rows)), last]
        for row in rows:
            row.images = row.states = None
        return dict(zip(numbers, self.model.logits(hidden).cpu().numpy(), strict=True))

    def inputs(self, rows: list[Row]) -> Inputs:
        config, device = self.model.config, self.model.device
        # padding is any id that is no <|state|>: what it writes lies behind the row's end and is overwritten
        idx = pad_rows([row.unread for row in rows], int(getattr(config, "state_token_id", None) == 0)).to(device)
        inputs = Inputs(idx)
        if any(row.images is not None for row in rows):
            shown = torch.tensor([row.images is not None for row in rows], device=device)
            lengths = torch.tensor([len(row.unread) for row in rows], device=device)
            in_row = torch.arange(idx.size(1), device=device) < lengths[:, None]
            inputs.places = (idx == config.vision_token_id) & shown[:, None] & in_row  # (B, T)
            inputs.images = torch.cat([row.images for row in rows if row.images is not None]).to(device)
        if any(row.states is not None for row in rows):
            inputs.states = torch.cat([row.states for row in rows if row.states is not None]).to(device)
        return inputs

    def check(self, prompt: list[int], max_new_tokens: int, held: int) -> None:
        config = self.model.config
        if not prompt:
            raise UserError("every prompt needs at least one token, got an empty one")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise UserError(f"token id {bad[0]} is outside the vocabulary 0..{config.vocab_size - 1}")
        if held + len(prompt) + max_new_tokens > config.sequence_len:
            raise UserError(
                f"a prompt of {held + len(prompt)} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{config.sequence_len} tokens: shorten the prompt or lower max_new_tokens"
            )

    # ---- whole answers

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, images=None, states=None, **options
    ) -> Iterator[dict[int, int]]:
        """Yield one {row: token id} a step, for the prompts that are still running, numbered from 0.

        images, states: a tensor or None for each prompt; options: as `add` takes them, the same for all prompts.
        Raises ValueError, here and not at the first step, where `add` does.
        """
        if not prompts:
            raise UserError("every prompt needs at least one token, got an empty list of prompts")
        if options.get("cache") is not None and len(prompts) > 1:
            raise UserError(f"a cache continues one row, got {len(prompts)} prompts")
        nothing = [None] * len(prompts)
        images, states = (nothing if given is None else given for given in (images, states))
        engine = Engine(self.model)  # of its own, so that steps of others are not consumed
        for sample, (prompt, image, state) in enumerate(zip(prompts, images, states, strict=True)):
            engine.add(prompt, max_new_tokens, images=image, states=state, sample=sample, **options)

        def steps():
            while engine.rows:
                if said := engine.step():
                    yield said

        return steps()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options) -> list[list[int]]:
        """Like `stream`, but returns the new ids of each prompt."""
        rows = [[] for _ in prompts]
        for said in self.stream(prompts, max_new_tokens, **options):
            for row, token in said.items():
                rows[row].append(token)
        return rows


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """(B, T) int64, padded on the right: attention is causal, so nothing attends to what is behind a row's end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
