"""What a row leaves behind for the next pass, as `kv_cache.KVCache`, for a decoder that runs on ONNX Runtime. In numpy.

The decoder writes new keys and values into the cache's own memory. For steps of one token a row, everything the decoder reads and
writes is bound once; a step then changes a few numbers in place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanochat.errors import UserError

HIDDEN = np.float32(-1e30)  # added to the scores of cells that a token does not see


def stored_width(head_dim: int) -> int:
    """Of a head's keys and values: ONNX Runtime's attention needs a multiple of 16, so others have zeros beside them."""
    return -(-head_dim // 16) * 16


class Picture(NamedTuple):
    """A picture that a row has been shown, for cross-attention. position: its place in the row. vectors: (N, D), to which the
    next one is compared. keys, values: (H, N, head_dim) of each layer."""

    position: int
    vectors: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]


class OnnxCache:
    """store: (2, n_layer, B, n_kv_head, max_len, stored_width(head_dim)) float32, keys and values; every row has its own length.
    pictures: those of each row, for cross-attention. bound: what a step of one token a row reads and writes, until the rows
    change."""

    def __init__(self, config, batch_size: int, max_len: int):
        self.config, self.max_len, self.lengths = config, max_len, [0] * batch_size
        shape = (2, config.n_layer, batch_size, config.n_kv_head, max_len, stored_width(config.head_dim))
        self.store = np.zeros(shape, np.float32)
        self.pictures: list[list[Picture]] = [[] for _ in range(batch_size)]
        self.bound = None

    @classmethod
    def joined(cls, *caches: "OnnxCache") -> "OnnxCache":
        """A new cache with the rows of all, in this order."""
        lengths = [length for cache in caches for length in cache.lengths]
        whole, at = cls(caches[0].config, len(lengths), max(cache.max_len for cache in caches)), 0
        for cache in caches:
            whole.store[:, :, at : at + len(cache.lengths), :, : cache.max_len] = cache.store
            at += len(cache.lengths)
        whole.lengths = lengths
        whole.pictures = [list(row) for cache in caches for row in cache.pictures]
        return whole

    def branch(self, row: int, length: int, max_len: int) -> "OnnxCache":
        """A new cache of one row: the first `length` tokens of a row, with room for max_len."""
        new = OnnxCache(self.config, 1, max_len)
        new.store[:, :, 0, :, :length] = self.store[:, :, row, :, :length]
        new.lengths = [length]
        new.pictures = [[one for one in self.pictures[row] if one.position < length]]
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, those of the pictures too."""
        shown = [array for row in self.pictures for one in row for array in (one.vectors, *one.keys, *one.values)]
        return self.store.nbytes + sum(array.nbytes for array in shown)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def n_pictures(self, row: int) -> int:
        return len(self.pictures[row])

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget everything behind the given length of each row, pictures that were shown there too."""
        for row, (now, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if not 0 <= new <= now:
                raise UserError(f"row {row} of the cache holds {now} tokens and cannot be rewound to {new}")
        self.lengths = list(lengths)
        kept = [[one for one in row if one.position < end] for row, end in zip(self.pictures, lengths, strict=True)]
        if any(len(new) < len(old) for new, old in zip(kept, self.pictures, strict=True)):
            self.pictures, self.bound = kept, None

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows; a row may be named twice to branch it."""
        self.store, self.bound = np.take(self.store, rows, 2), None  # in one piece: the decoder writes into it
        self.lengths = [self.lengths[row] for row in rows]
        self.pictures = [list(self.pictures[row]) for row in rows]

    def advance(self, n_tokens: Sequence[int], read: int) -> None:
        """read: tokens of each row that are read at once, padding included."""
        if (end := self.longest + read) > self.max_len:
            raise UserError(f"the cache holds {self.max_len} tokens and {end} are needed: make it larger")
        self.lengths = [held + n for held, n in zip(self.lengths, n_tokens, strict=True)]

    def show(self, row: int, picture: Picture) -> None:
        self.pictures[row].append(picture)
        self.bound = None

    # ---- what the decoder's cross-attention reads

    def cells(self) -> dict[str, np.ndarray]:
        """cells_k_0, cells_v_0, ...: (B, H, P * N, head_dim), zeros where a row has fewer than P pictures. P is at least 1."""
        config, most = self.config, max(1, *map(len, self.pictures))
        n = config.vision_tokens_per_image
        found = {}
        for number in range(config.n_layer):
            for name, field in (("k", "keys"), ("v", "values")):
                whole = np.zeros((len(self.pictures), config.n_head, most * n, config.head_dim), np.float32)
                for row, pictures in enumerate(self.pictures):
                    for i, picture in enumerate(pictures):
                        whole[row, :, i * n : (i + 1) * n] = getattr(picture, field)[number]
                found[f"cells_{name}_{number}"] = whole
        return found

    def visible(self, starts: Sequence[int], n_tokens: int) -> dict[str, np.ndarray]:
        """What n_tokens from each row's start on see. bias (B, 1, T, P * N): 0 or HIDDEN. sees (B, T, 1): 0 for a token before
        any picture."""
        most = max(1, *map(len, self.pictures))
        places = np.array([[*(one.position for one in row), *[2**62] * (most - len(row))] for row in self.pictures])
        query = np.asarray(starts)[:, None] + np.arange(n_tokens)  # (B, T)
        seen = places[:, None] <= query[..., None]  # (B, T, P)
        some = seen.any(-1, keepdims=True)
        bias = np.where(seen | ~some, np.float32(0), HIDDEN)
        bias = np.repeat(bias, self.config.vision_tokens_per_image, -1)[:, None]
        return {"bias": np.ascontiguousarray(bias), "sees": some.astype(np.float32)}
