"""A frozen encoder as a teacher: its map of every view of a picture that its student sees."""

from collections.abc import Sequence

import numpy as np
import torch
from rich.progress import track

from nanochat.errors import UserError
from nanochat.training.auxiliary import Components
from nanochat.training.squares import warp
from nanochat.training.task import console
from nanochat.vision.encoder import Encoder
from nanochat.vision.images import ImageSource
from nanochat.vision.inference import make_copy
from nanochat.vision.letterbox import STRIDE
from nanochat.vision.pixels import read_pixels

LAYER = "features"  # the teacher's map: the last one, which its classifier averages
FIT_PICTURES = 512  # pictures whose cells give the principal components
BATCH = 16


class Teacher:
    """side: cells along a side of its map of a whole picture. channels: C of that map."""

    def __init__(self, encoder: Encoder, image_size: int, dtype: torch.dtype, device: torch.device):
        """dtype: of weights and activations. Raises UserError for an encoder without a last map at stride 32."""
        encoder.image_size = image_size
        self.encoder, self.dtype, self.device = make_copy(encoder.to(device), dtype), dtype, device
        shape = self.map(torch.zeros(1, 3, image_size, image_size, device=device)).shape
        self.side, self.channels = shape[2], shape[1]
        if shape[2] != shape[3] or shape[2] * STRIDE != image_size:
            raise UserError(
                f"the teacher's map has {shape[2]} x {shape[3]} cells at {image_size} pixels, expected one in {STRIDE} pixels"
            )

    @torch.no_grad()
    def map(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in 0..1 -> (B, C, H, W) float32."""
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.encoder.maps(pixels, [LAYER])[LAYER].float()

    def cells(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, cells, C) float32, row by row. Raises UserError for a map that is not finite."""
        found = self.map(pixels).flatten(2).transpose(1, 2)
        if not torch.isfinite(found).all():
            raise UserError("the teacher's map holds NaN or infinite values: check its weights")
        return found

    def components(self, images: Sequence[ImageSource], n: int, seed: int) -> Components:
        """The principal components of the cells of up to FIT_PICTURES images. Raises UserError where there are fewer than n."""
        numbers = np.random.default_rng([seed, 0, 4]).permutation(len(images))[:FIT_PICTURES]
        chosen = [images[number] for number in numbers]
        batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
        shown = track(batches, "running the teacher", console=console)
        cells = [self.cells(read_pixels(self.encoder, batch)[0].to(self.device)).flatten(0, 1) for batch in shown]
        return Components(*principal_components(torch.cat(cells).cpu(), n)).to(self.device)


def principal_components(cells: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, C) -> mean (C,), the directions of largest variance (C, n), the largest first, and the variance in them together."""
    if n > cells.size(1):
        raise UserError(f"--components must be at most the {cells.size(1)} channels of the teacher, got {n}")
    cells = cells.double()
    mean = cells.mean(0)
    cells -= mean
    found = torch.linalg.eigh(cells.T @ cells)
    variance = found.eigenvalues.flip(0)[:n].sum() / len(cells)
    return mean.float(), found.eigenvectors.flip(1)[:, :n].float().contiguous(), variance.float()


# ---- views


def random_views(pixels: torch.Tensor, rng: np.random.Generator, smallest: float, size: int) -> torch.Tensor:
    """(B, 3, S, S) -> (B, 3, size, size): a square of each picture, `smallest` to all of its side, half of them mirrored."""
    n = len(pixels)
    zoom, mirror = rng.uniform(smallest, 1, n), np.where(rng.random(n) < 0.5, -1, 1)
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror, zoom
    theta[:, :, 2] = (1 - zoom)[:, None] * rng.uniform(-1, 1, (n, 2))
    return warp(pixels, theta, size)


def mixed(pixels: torch.Tensor, rng: np.random.Generator, share: float) -> torch.Tensor:
    """The same pictures (B, 3, S, S), a random share of them with another one of the batch over it (mixup, Zhang et al. 2018,
    arXiv 1710.09412). A teacher has an answer to these too, so few pictures become many (Beyer et al. 2022, arXiv 2106.05237)."""
    weight = np.where(rng.random(len(pixels)) < share, rng.uniform(0.5, 1, len(pixels)), 1).astype(np.float32)
    return pixels.flip(0).lerp(pixels, torch.from_numpy(weight).to(pixels.device)[:, None, None, None])
