"""What a row of tokens leaves behind for the next pass: keys and values of its tokens, and of the pictures beside it. For GPT and
its kind; a model on another runtime has a cache of its own with the same `lengths`, `max_len`, `longest`, `nbytes`, `n_pictures`,
`branch`, `joined`, `rewind` and `keep_rows`, which is all that `engine` knows of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.errors import UserError

NEVER = 2**62  # the position of a picture that is not there: behind every token


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
    def joined(cls, *caches: "KVCache") -> "KVCache":
        """A new cache with the rows of all, in this order."""
        whole = object.__new__(cls)
        whole.max_len = max(cache.max_len for cache in caches)
        whole.lengths = [length for cache in caches for length in cache.lengths]
        whole.k = roomy([cache.k[:, :, :, : cache.longest] for cache in caches], whole.max_len)
        whole.v = roomy([cache.v[:, :, :, : cache.longest] for cache in caches], whole.max_len)
        crosses = caches[0].pictures is not None
        whole.pictures = Pictures.joined(*(cache.pictures for cache in caches)) if crosses else None
        return whole

    def branch(self, row: int, length: int, max_len: int) -> "KVCache":
        """A new cache of one row: the first `length` tokens of a row, with room for max_len."""
        new = object.__new__(type(self))
        new.max_len, new.lengths = max_len, [length]
        new.k, new.v = (roomy([part[:, row : row + 1, :, :length]], max_len) for part in (self.k, self.v))
        new.pictures = None if self.pictures is None else self.pictures.of_row(row, length)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, those of the pictures too."""
        return self.k.nbytes + self.v.nbytes + (0 if self.pictures is None else self.pictures.nbytes)

    def n_pictures(self, row: int) -> int:
        """Pictures that the row has been shown, if the model looks at them by cross-attention, else 0."""
        return 0 if self.pictures is None else int(self.pictures.counts[row])

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
        self.k, self.v = (roomy([part[:, index, :, : self.longest]], self.max_len) for part in (self.k, self.v))
        self.lengths = [self.lengths[row] for row in rows]
        if self.pictures is not None:
            self.pictures = self.pictures.of_rows(index)


def roomy(parts: Sequence[torch.Tensor], max_len: int) -> torch.Tensor:
    """Keys or values of rows that are filled to different lengths, (n_layer, B_i, H, T_i, D) each -> (n_layer, B, H, max_len, D)
    with the rows of all; zeros where they are not filled. Only what is filled is copied."""
    n_layer, _, n_head, _, head_dim = parts[0].shape
    whole = parts[0].new_zeros((n_layer, sum(part.size(1) for part in parts), n_head, max_len, head_dim))
    for part, rows in zip(parts, whole.split([part.size(1) for part in parts], dim=1), strict=True):
        rows[:, :, :, : part.size(3)] = part
    return whole


class Seen(NamedTuple):
    """What the cross-attention of one forward pass reads, for B rows of T tokens and at most P pictures of N cells.

    keys, values: for each layer (B, P * N, H, D). mask: (B, 1, T, P * N) bool, which cells a token attends to.
    blind: (B, 1, T, 1) bool, the tokens before any picture; `mask` is all True for them, so that their softmax is finite.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    blind: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """The pictures of B rows, at most P in one, N cells each, as the layers of cross-attention read them.

    keys, values: for each layer (B, P, N, H, D). cells: (B, P, N, C) float32, as projected, to which a later picture is compared.
    positions: (B, P) int64, the place of each picture in its row, ascending; NEVER where a row has fewer than P.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cells: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def none(cls, config, n_rows: int, device, dtype: torch.dtype) -> "Pictures":
        """Rows without pictures. config: of the model."""
        shape = (n_rows, 0, config.vision_tokens_per_image, config.n_head, config.head_dim)
        nothing = [torch.zeros(shape, device=device, dtype=dtype)] * config.n_layer
        cells = torch.zeros((*shape[:3], config.n_embd), device=device)
        return cls(nothing, nothing, cells, torch.zeros((n_rows, 0), dtype=torch.long, device=device))

    @classmethod
    def joined(cls, *pictures: "Pictures") -> "Pictures":
        """The rows of all, in this order."""
        width = max(each.positions.size(1) for each in pictures)
        parts = [each.widened(width) for each in pictures]
        return cls(
            [torch.cat(rows) for rows in zip(*(part.keys for part in parts), strict=True)],
            [torch.cat(rows) for rows in zip(*(part.values for part in parts), strict=True)],
            torch.cat([part.cells for part in parts]),
            torch.cat([part.positions for part in parts]),
        )

    @property
    def counts(self) -> torch.Tensor:
        """(B,) int64: pictures in each row."""
        return (self.positions != NEVER).sum(1)

    def last(self) -> torch.Tensor:
        """(B, N, C) cells of the last picture of each row; zeros in a row without one."""
        if self.cells.size(1) == 0:
            return self.cells.new_zeros(len(self.cells), *self.cells.shape[2:])
        rows = torch.arange(len(self.cells), device=self.cells.device)
        return self.cells[rows, (self.counts - 1).clamp_min(0)]

    def widened(self, width: int) -> "Pictures":
        """The same with room for `width` pictures a row."""
        extra = width - self.positions.size(1)
        if extra == 0:
            return self
        room = (0, 0, 0, 0, 0, 0, 0, extra)
        return Pictures(
            [F.pad(keys, room) for keys in self.keys],
            [F.pad(values, room) for values in self.values],
            F.pad(self.cells, room[2:]),
            F.pad(self.positions, (0, extra), value=NEVER),
        )

    def extended(self, new: "Pictures") -> "Pictures":
        """With the pictures of `new`, which come later in the same rows."""
        counts = self.counts
        whole = self.widened(max(self.positions.size(1), int((counts + new.counts).max())))
        rows, old = (new.positions != NEVER).nonzero(as_tuple=True)
        place = (rows, counts[rows] + old)
        return Pictures(
            [mine.index_put(place, keys[rows, old]) for mine, keys in zip(whole.keys, new.keys, strict=True)],
            [mine.index_put(place, values[rows, old]) for mine, values in zip(whole.values, new.values, strict=True)],
            whole.cells.index_put(place, new.cells[rows, old]),
            whole.positions.index_put(place, new.positions[rows, old]),
        )

    def rewound(self, lengths: Sequence[int]) -> "Pictures":
        """Without the pictures whose place is at or behind the given length of their row."""
        ends = torch.tensor(lengths, device=self.positions.device)[:, None]
        kept = self.positions.masked_fill(self.positions >= ends, NEVER)
        return Pictures(self.keys, self.values, self.cells, kept)

    def of_rows(self, rows: torch.Tensor) -> "Pictures":
        """The rows of these indices."""
        return Pictures(
            [keys[rows] for keys in self.keys],
            [values[rows] for values in self.values],
            self.cells[rows],
            self.positions[rows],
        )

    def of_row(self, row: int, length: int) -> "Pictures":
        """A copy of the pictures of one row whose place is before `length`."""
        n = int((self.positions[row] < length).sum())
        return Pictures(
            [keys[row : row + 1, :n].clone() for keys in self.keys],
            [values[row : row + 1, :n].clone() for values in self.values],
            self.cells[row : row + 1, :n].clone(),
            self.positions[row : row + 1, :n].clone(),
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values, self.cells, self.positions))

    def seen(self, query: torch.Tensor) -> Seen:
        """As tokens at the positions `query` (B or 1, T) see them."""
        visible = self.positions[:, None] <= query[..., None]  # (B, T, P)
        blind = ~visible.any(-1, keepdim=True)
        mask = (visible | blind).repeat_interleave(self.keys[0].size(2), -1)
        keys, values = ([part.flatten(1, 2) for part in parts] for parts in (self.keys, self.values))
        return Seen(keys, values, mask[:, None], blind[:, None])
