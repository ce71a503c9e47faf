"""Pictures beside the row of tokens: every layer of the decoder may look at them through a gate (Flamingo, Alayrac et al. 2022,
arXiv 2204.14198).

    x ──> x + tanh(gate) * attention(x, cells of the pictures) ──> self-attention ──> MLP

The gate starts at zero, so a new model says exactly what the text model says. A picture takes one place in the row, which only
says from where on it can be seen: a token sees the pictures whose place is at or before its own. Keys and values are made once a
picture and layer, and then kept in the cache of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import GPTConfig, Linear, norm

NEVER = 2**62  # the position of a picture that is not there: behind every token


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
    def joined(cls, first: "Pictures", second: "Pictures") -> "Pictures":
        """The rows of both, `first` in front."""
        width = max(first.positions.size(1), second.positions.size(1))
        parts = (first.widened(width), second.widened(width))
        return cls(
            [torch.cat(pair) for pair in zip(*(part.keys for part in parts), strict=True)],
            [torch.cat(pair) for pair in zip(*(part.values for part in parts), strict=True)],
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

    def seen(self, query: torch.Tensor) -> Seen:
        """As tokens at the positions `query` (B or 1, T) see them."""
        visible = self.positions[:, None] <= query[..., None]  # (B, T, P)
        blind = ~visible.any(-1, keepdim=True)
        mask = (visible | blind).repeat_interleave(self.keys[0].size(2), -1)
        keys, values = ([part.flatten(1, 2) for part in parts] for parts in (self.keys, self.values))
        return Seen(keys, values, mask[:, None], blind[:, None])


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) * attention(norm(x), pictures), one gate a layer, with normed queries and keys as in self-attention.

    No rotary positions: which picture and which cell it is has been added to the cells (see `fusion.CellProjector`).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.shape = (config.n_head, config.head_dim)
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.n_embd)
        self.c_v = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.gate = nn.Parameter(torch.zeros(1))

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, H, D)."""
        return norm(self.c_q(norm(x)).unflatten(-1, self.shape))

    def keys_and_values(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected cells (S, N, C) of S pictures -> two (S, N, H, D)."""
        return norm(self.c_k(cells).unflatten(-1, self.shape)), self.c_v(cells).unflatten(-1, self.shape)

    def forward(self, x, keys, values, mask, blind, dropout):
        """x: (B, T, C); keys, values, mask and blind as in `Seen`. A token before any picture keeps its x."""
        q, k, v = (part.transpose(1, 2) for part in (self.queries(x), keys, values))
        # written out: with so few cells the fused kernel is slower on CPUs, above all backward
        scores = (q @ k.mT).float() * q.size(-1) ** -0.5  # (B, H, T, P * N)
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(x.dtype) @ v
        y = F.dropout(self.c_proj(y.masked_fill(blind, 0.0).transpose(1, 2).flatten(2)), dropout)
        return x + self.gate.tanh().to(x.dtype) * y
