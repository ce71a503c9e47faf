"""Pictures beside the row of tokens: every layer of the decoder may look at them through a gate (Flamingo, Alayrac et al. 2022,
arXiv 2204.14198).

    x ──> x + tanh(gate) * attention(x, cells of the pictures) ──> self-attention ──> MLP

The gate starts at zero, so a new model says exactly what the text model says. A picture takes one place in the row, which only
says from where on it can be seen: a token sees the pictures whose place is at or before its own. Keys and values are made once a
picture and layer, and then kept in the cache of the row.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import GPTConfig, Linear, norm


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
        """x: (B, T, C); keys, values, mask and blind as in `kv_cache.Seen`. A token before any picture keeps its x."""
        q, k, v = (part.transpose(1, 2) for part in (self.queries(x), keys, values))
        # written out: with so few cells the fused kernel is slower on CPUs, above all backward
        scores = (q @ k.mT).float() * q.size(-1) ** -0.5  # (B, H, T, P * N)
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(x.dtype) @ v
        y = F.dropout(self.c_proj(y.masked_fill(blind, 0.0).transpose(1, 2).flatten(2)), dropout)
        return x + self.gate.tanh().to(x.dtype) * y
