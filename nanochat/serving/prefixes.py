"""Beginnings of prompts that a model has read. A prompt that begins like an earlier one reads only the rest: the keys and values
of words and pictures are copied (as RadixAttention does, Zheng et al. 2023, arXiv 2312.07104, without its tree). No torch.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from nanochat.agent import n_common
from nanochat.engine import Cache, Engine

MOST_BYTES = 64 * 2**20  # of keys and values that are kept
WORTH = 16  # tokens of text that are worth a copy; a picture always is

Named = tuple[int | tuple[bytes, int], ...]  # a prompt in which the places of pictures name what stands there


def named(prompt: Sequence[int], pictures: Sequence[bytes], place: int | None, each: int) -> Named | None:
    """prompt: token ids. pictures: a digest of each. place: the id of their placeholder, of which a picture has `each`. None
    where pictures and placeholders do not match."""
    found, shown = [], 0
    for token in prompt:
        if pictures and token == place:
            if shown == each * len(pictures):
                return None
            token, shown = (pictures[shown // each], shown % each), shown + 1
        found.append(token)
    return tuple(found) if shown == each * len(pictures) else None


class Prefixes:
    """Caches of one row by the prompt that they hold. The least recently used ones are forgotten. For one thread."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes, self.bytes = most_bytes, 0
        self.kept: OrderedDict[Named, Cache] = OrderedDict()

    def common(self, prompt: Named) -> tuple[int, Named | None]:
        """(how many tokens of the prompt are known, the kept prompt that begins with them). The last token is never known: the
        answer follows from its logits."""
        most = len(prompt) - 1
        found = ((min(n_common(prompt, kept), most), kept) for kept in self.kept)
        return max(found, default=(0, None), key=first)

    def find(self, prompt: Named | None, max_len: int) -> tuple[int, Cache | None]:
        """(how many tokens of the prompt are known, a new cache of one row that holds them, with room for max_len). (0, None)
        where so little is known that a copy is not worth it."""
        known, best = self.common(prompt) if prompt is not None else (0, None)
        if best is None or not worth(prompt[:known]):
            return 0, None
        self.kept.move_to_end(best)
        return known, self.kept[best].branch(0, known, max_len)

    def keep(self, prompt: Named, cache: Cache, row: int) -> None:
        """Copy what a row of a cache holds of the prompt, unless nearly all of it is known."""
        known, _ = self.common(prompt)
        if not worth(prompt[known:]):
            return
        kept = self.kept[prompt] = cache.branch(row, len(prompt), len(prompt))
        self.bytes += kept.nbytes
        while self.bytes > self.most_bytes:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes


def worth(tokens: Named) -> bool:
    return len(tokens) >= WORTH or any(isinstance(token, tuple) for token in tokens)


def first(pair: tuple) -> Any:
    return pair[0]


class RememberingEngine(Engine):
    """An engine that keeps the prompts it has read. to_keep: row -> its prompt, until it has been read. logits: row -> (V,)
    float32 that its next token is chosen from, of the last step."""

    def __init__(self, model, prefixes: Prefixes):
        super().__init__(model)
        self.prefixes = prefixes
        self.to_keep: dict[int, Named] = {}
        self.logits: dict[int, Any] = {}

    def step(self) -> dict[int, int]:
        self.logits.clear()
        return super().step()

    def drop(self, *numbers: int) -> None:
        super().drop(*numbers)
        for number in numbers:
            self.to_keep.pop(number, None)

    def read(self, numbers, cache):
        found = super().read(numbers, cache)
        self.logits |= found
        for line, number in enumerate(numbers):
            if prompt := self.to_keep.pop(number, None):
                self.prefixes.keep(prompt, cache, line)
        return found
