"""Generation with a key/value cache. Token ids in, token ids out: strings are the tokenizer's business.

    engine = Engine(model)
    row = engine.add(prompt, max_new_tokens=20)      # rows may be added and dropped while others run
    while row in engine.rows:
        token = engine.step().get(row)

A prompt is read in one pass (pictures included), then each step reads one token of every running row. Rows have their own
length, sampling and stop ids. A row can continue a cache that its owner keeps: a chat's turns, or many questions about one
picture.

The model may run on any runtime: this file imports none. Vision vectors are whatever its `look` returns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanochat.errors import UserError
from nanochat.sampling import Sampling, choose

LITTLE = 32  # tokens, see `Unread.is_little`


class Cache(Protocol):
    """What a model remembers of B rows of tokens. lengths: the tokens of each row that it holds. max_len: the most of a row."""

    lengths: list[int]
    max_len: int

    @property
    def longest(self) -> int: ...

    def n_pictures(self, row: int) -> int:
        """Pictures that the row has been shown, if the model looks at them by cross-attention, else 0."""
        ...

    @property
    def nbytes(self) -> int: ...

    def branch(self, row: int, length: int, max_len: int) -> "Cache":
        """A new cache of one row: the first `length` tokens of a row, with room for max_len."""
        ...

    @classmethod
    def joined(cls, *caches: "Cache") -> "Cache":
        """A new cache with the rows of all, in this order."""
        ...

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget everything behind the given length of each row, pictures that were shown there too."""
        ...

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows; a row may be named twice to branch it."""
        ...


@dataclass
class Unread:
    """What a model still has to read of a row. tokens: at least one. images: (M, D) vision vectors for the placeholders among
    them. states: (S, state_dim), normalised, for their <|state|> tokens."""

    tokens: list[int]
    images: Any = None
    states: Any = None

    @property
    def is_little(self) -> bool:
        """Whether to read it takes hardly longer than a token: a few words, and no picture."""
        return len(self.tokens) <= LITTLE and self.images is None


class Model(Protocol):
    """What the engine needs of a model. One that reads pictures has `checked_vectors` too, see `MultimodalGPT`."""

    config: Any
    continues_many: (
        bool  # whether `read` takes several rows at once that continue what the cache holds by several tokens
    )

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> Cache:
        """A cache of empty rows; by default with room for the whole context."""
        ...

    def read(self, rows: Sequence[Unread], cache: Any) -> np.ndarray:
        """Read what is unread of the rows of the cache, and put it there. Returns the logits after the last token of each row,
        (B, vocab_size) float32."""
        ...


@dataclass
class Row:
    """One answer in the making. unread: what the cache does not hold yet: the prompt, then the last token."""

    answer: list[int]  # the tokens so far, for the repetition penalty
    unread: Unread
    left: int  # tokens that may still come
    sampling: Sampling
    rng: np.random.Generator
    stop_ids: frozenset[int]
    cache: Cache | None  # of the caller, to continue


class Engine:
    """A batch of rows that come and go.

    rows: number -> Row, those that are waiting or running. A row leaves when it has ended or is dropped.
    """

    def __init__(self, model: Model):
        self.model = model
        self.rows: dict[int, Row] = {}
        self.lines: list[int] = []  # the row behind each line of the cache; rows that are not in it wait to be read
        self.cache: Cache | None = None
        self.added = 0
        self.hurried = False  # the last step was for new rows only

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> Cache:
        return self.model.new_cache(batch_size, max_len)

    # ---- rows come and go

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] = (),
        images=None,
        states=None,
        cache: Cache | None = None,
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
            images = self.model.checked_vectors(images, placeholders, 0 if cache is None else cache.n_pictures(0))
        sampling = sampling or Sampling()
        number, self.added = self.added, self.added + 1
        unread = Unread(prompt, images, states)
        self.rows[number] = Row(
            [], unread, max_new_tokens, sampling, sampling.generator(sample), frozenset(stop_ids), cache
        )  # fmt: skip
        return number

    def drop(self, *numbers: int) -> None:
        """Forget rows, running or waiting. A number that is not there (any more) is ignored."""
        for number in numbers:
            self.rows.pop(number, None)
        if not any(number in self.rows for number in self.lines):
            self.lines, self.cache = [], None

    def compact(self) -> None:
        """Take the rows that were dropped since the last step out of the cache, all at once: it is copied."""
        kept = [line for line, number in enumerate(self.lines) if number in self.rows]
        if len(kept) < len(self.lines):
            self.cache.keep_rows(kept)
            self.lines = [self.lines[line] for line in kept]

    def step(self) -> dict[int, int]:
        """One token for every row: {row: token id}. Rows that hit a stop id are left out; ended rows leave `rows`.

        New rows with little to read get their first token in a step of their own, in which the others get none: a short
        question does not wait for the answers that run, and they wait hardly any longer. The step after it is for all.
        """
        self.compact()
        waiting = [number for number in self.rows if number not in self.lines]
        quick = [number for number in waiting if self.rows[number].unread.is_little and not self.hurried]
        self.hurried = bool(quick and self.lines)
        logits = self.read(self.lines, self.cache) if self.lines and not quick else {}
        caches = [self.cache] if self.lines else []
        for numbers, cache in self.prefills(quick or waiting):
            logits |= self.read(numbers, cache)
            self.lines = [*self.lines, *numbers]
            caches.append(cache)
        self.cache = joined(caches)
        said, ended = {}, []
        for number, line in logits.items():
            row = self.rows[number]
            token = choose(line, row.sampling, row.rng, row.answer)
            row.left -= 1
            if token not in row.stop_ids:
                said[number] = token
                row.answer.append(token)
                row.unread = Unread([token])
            if token in row.stop_ids or row.left == 0:
                ended.append(number)
        self.drop(*ended)
        return said

    def prefills(self, waiting: list[int]) -> Iterator[tuple[list[int], Cache]]:
        """Rows that are read together, and their cache: new rows in one batch; of those that continue a cache, the ones with
        little to read in another one, if the model can do so."""
        new = [number for number in waiting if self.rows[number].cache is None]
        if new:
            longest = max(len(self.rows[number].unread.tokens) + self.rows[number].left for number in new)
            yield new, self.new_cache(len(new), longest)
        others = [number for number in waiting if self.rows[number].cache is not None]
        together = [number for number in others if self.rows[number].unread.is_little]
        caches = [self.rows[number].cache for number in together]
        # padding follows the longest row: it must fit too
        fits = together and max(cache.longest for cache in caches) + LITTLE <= max(cache.max_len for cache in caches)
        if fits and self.model.continues_many:
            yield together, joined(caches)
            others = [number for number in others if number not in together]
        for number in others:
            yield [number], self.rows[number].cache

    def read(self, numbers: list[int], cache: Cache) -> dict[int, np.ndarray]:
        """Read what is unread of the rows, line by line of the cache. Returns the logits after each row's last token, (V,)."""
        rows = [self.rows[number] for number in numbers]
        return dict(zip(numbers, self.model.read([row.unread for row in rows], cache), strict=True))

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


def joined(caches: Sequence[Cache]) -> Cache | None:
    """A cache with the rows of all: the only one itself, else a new one."""
    return type(caches[0]).joined(*caches) if len(caches) > 1 else next(iter(caches), None)
