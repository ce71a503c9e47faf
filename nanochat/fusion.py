"""How vision reaches the text: an encoder's map is pooled to a few vectors, which are projected to the model's width.

map (B, D, H, W) ── pool_to_tokens, or Glances ──> (B, N, D) ── VisionProjector ──> (B, N, C), N tokens of the row
                                                            └── CellProjector ──> (B, N, C), read by cross-attention
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.config import grid_side
from nanochat.gpt import Linear, norm

GLANCE_GRID = 8  # cells a side that a glance tells apart
MATCH_SHARPNESS = 20.0  # of the softmax over cosines, by which a cell finds those that look like it


def pool_to_tokens(maps: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """(B, C, H, W) maps -> (B, n_tokens, C): averages over an h x h grid, row by row from the top left."""
    return F.adaptive_avg_pool2d(maps, grid_side(n_tokens)).flatten(2).transpose(1, 2)


class Glances(nn.Module):
    """(B, C, H, W) -> (B, N, D): N linear functions of the whole map, pooled to GLANCE_GRID x GLANCE_GRID cells.

    A robot's camera does not move, so a place in the picture is a place in the world (for a camera at the wrist: a place in
    front of the hand): with its own weights for every cell, a glance reads positions off the map. Soft-argmax keypoints and a
    grid of cells as tokens were slower to learn it.

    Each camera has weights of its own, because the same place in the pictures of two cameras is not the same place in the world.
    Its bias is added to whatever it sees: it is the learnt embedding by which the decoder tells the cameras apart.
    """

    def __init__(self, channels: int, n_tokens: int, width: int, n_cameras: int = 1):
        super().__init__()
        self.n_tokens, self.n_cameras = n_tokens, n_cameras
        # one camera's rows after another's, so that one camera has the tensors that it had before there were several
        self.linear = nn.Linear(channels * GLANCE_GRID * GLANCE_GRID, n_cameras * n_tokens * width)

    def forward(self, maps: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """counts: how many of the maps are of each camera; those of the first come first. Without it all are of the first."""
        cells = F.adaptive_avg_pool2d(maps, GLANCE_GRID).flatten(1)  # (B, C * GLANCE_GRID * GLANCE_GRID)
        parts = cells.split([len(cells)] if counts is None else list(counts))
        weights, biases = self.linear.weight.chunk(self.n_cameras), self.linear.bias.chunk(self.n_cameras)
        seen = torch.cat([F.linear(*its) for its in zip(parts, weights, biases, strict=False)])  # (B, N * D)
        return seen.unflatten(-1, (self.n_tokens, -1))

    def of_every_camera(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, K, N, D): each map as each of the K cameras would see it. With static shapes, for export."""
        cells = F.adaptive_avg_pool2d(maps, GLANCE_GRID).flatten(1)
        return self.linear(cells).unflatten(-1, (self.n_cameras, self.n_tokens, -1))


class VisionProjector(nn.Module):
    """Two layers with ReLU², as in the GPT's MLP, from the encoder's channels to the model's: (..., D) -> (..., C).

    Vectors are RMS-normed first, since the scale of a detector's maps says nothing to a language model. Cells of a grid get a
    learnt position each, starting at zero: along the row of tokens, rotary positions tell left from right but not up.
    Kept and run in float32 whatever the input's dtype; the caller casts the result.
    """

    def __init__(self, vision_dim: int, n_embd: int, n_hidden: int, n_tokens: int = 1):
        super().__init__()
        self.c_fc = Linear(vision_dim, n_hidden)
        self.c_proj = Linear(n_hidden, n_embd)
        self.position = nn.Parameter(torch.zeros(n_tokens, n_embd)) if n_tokens > 1 else None

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        x = norm(vectors.to(self.c_fc.weight.dtype))
        x = self.c_proj(F.relu(self.c_fc(x)).square())
        if self.position is None:
            return x
        # vectors come as whole images, so the flat list is a multiple of the grid
        return (x.view(-1, *self.position.shape) + self.position).view(x.shape)


class CellProjector(nn.Module):
    """From the encoder's cells to those that cross-attention reads: (U, N, D) -> (U, N, C), float32 whatever the input's dtype.

    One layer. Vectors are RMS-normed first, and as attention does not tell cells apart by their order, each gets a learnt vector
    of its place in the picture, starting at zero. See `in_row` for what a row adds.
    """

    def __init__(self, vision_dim: int, n_embd: int, n_tokens: int, max_images: int):
        super().__init__()
        self.linear = Linear(vision_dim, n_embd)
        self.cell = nn.Parameter(torch.zeros(n_tokens, n_embd))
        self.picture = nn.Parameter(torch.zeros(max_images, n_embd))
        self.change = Change(n_embd)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.linear(norm(vectors.to(self.linear.weight.dtype))) + self.cell

    def in_row(self, cells: torch.Tensor, before: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """(V, N, C) cells of pictures as their rows show them: with a learnt vector of the picture's number in the row, (V,)
        int64, and, for all but the first, with what has changed since the picture before it, (V, N, C).

        Cell by cell, a change is easy to see; by attention alone, from a few words to the cells of two pictures, it was hardly
        learnt (see `data.pairs`).
        """
        later = (numbers > 0)[:, None, None]
        return cells + self.picture[numbers][:, None] + later * self.change(cells, before)


class Change(nn.Module):
    """What a picture's cells (V, N, C) have that those of the picture before it (V, N, C) have not, (V, N, C): each is compared
    with the cell at its place, and with those that look most like it, wherever they are. A new one is zero everywhere."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = Linear(3 * n_embd, n_embd)
        self.c_proj = Linear(n_embd, n_embd)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, cells: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        cosine = F.normalize(cells, dim=-1) @ F.normalize(before, dim=-1).mT  # (V, N, N)
        alike = (MATCH_SHARPNESS * cosine).softmax(-1) @ before
        return self.c_proj(F.relu(self.c_fc(torch.cat([cells, cells - before, cells - alike], -1))).square())

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """Weights from before there was this layer: they see no change, as the start does."""
        for name, parameter in self.named_parameters():
            state_dict.setdefault(prefix + name, parameter.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)
