"""Pictures as an encoder takes them, kept in memory as long as it lasts."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.vision.encoder import Encoder
from nanochat.vision.images import ImageSource
from nanochat.vision.letterbox import square
from nanochat.vision.pixels import to_pixels


class Squares:
    """Letterboxed pictures, kept as bytes (64 x 64: 12 kB each, 224 x 224: 150 kB), since decoding them in every epoch takes
    longer than a small encoder does.

    memory: bytes for that; the pictures that do not fit are decoded each time.
    """

    def __init__(self, encoder: Encoder, images: Sequence[ImageSource], memory: float):
        self.encoder, self.images = encoder, images
        self.squares: dict[int, np.ndarray] = {}
        self.n_kept = min(len(images), int(memory // (3 * encoder.image_size**2)))

    @property
    def n_bytes(self) -> int:
        """Bytes of the pictures that are kept."""
        return self.n_kept * 3 * self.encoder.image_size**2

    def square(self, number: int) -> np.ndarray:
        """(S, S, 3) uint8."""
        if number in self.squares:
            return self.squares[number]
        found = square(self.images[number], self.encoder.image_size, self.encoder.antialias)[0]
        if number < self.n_kept:  # every epoch needs every picture once, so no choice is better than another
            self.squares[number] = found
        return found

    def pixels(self, numbers: Sequence[int]) -> torch.Tensor:
        """(U, 3, S, S) in 0..1, on the encoder's device."""
        device = next(self.encoder.parameters()).device
        pixels = to_pixels(np.stack([self.square(number) for number in numbers]), device, torch.float32)
        return pixels.contiguous(memory_format=torch.channels_last)


def warp(pixels: torch.Tensor, theta: np.ndarray, size: int) -> torch.Tensor:
    """(B, 3, S, S) -> (B, 3, size, size): where an affine map, theta (B, 2, 3) in units of half a picture, finds each pixel.
    Beyond the border, the border goes on."""
    grid = F.affine_grid(torch.from_numpy(theta).to(pixels.device), [len(pixels), 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
