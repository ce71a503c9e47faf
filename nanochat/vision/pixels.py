"""From images to the pixels of an encoder, the same for training and inference."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn

from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.vision.images import ImageSource, as_list
from nanochat.vision.letterbox import MAX_IMAGE_SIZE, STRIDE, Letterbox, square


def checked_size(size: int) -> int:
    """`size` if it is a usable side of an encoder's input in pixels. Raises ValueError otherwise."""
    if type(size) is not int or size < STRIDE or size % STRIDE or size > MAX_IMAGE_SIZE:
        raise UserError(
            f"image_size must be at most {MAX_IMAGE_SIZE} and a positive multiple of {STRIDE}, got {short_repr(size)}"
        )
    return size


class SquareInput:
    """What an encoder's `image_size` is: the side of its square input in pixels, checked when it is set."""

    @property
    def image_size(self) -> int:
        return self._image_size

    @image_size.setter
    def image_size(self, size: int) -> None:
        self._image_size = checked_size(size)


def check_pixels(pixels: torch.Tensor) -> None:
    """Raises ValueError unless these are pixels that an encoder takes: (B, 3, H, W), sides multiples of STRIDE."""
    if pixels.dim() != 4 or pixels.size(1) != 3 or any(side % STRIDE for side in pixels.shape[2:]):
        raise UserError(f"pixels must be (B, 3, H, W), sides multiples of {STRIDE}, got {tuple(pixels.shape)}")


def to_pixels(
    squares: np.ndarray,
    device: str | torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) in 0..1. Raises ValueError for another shape or dtype."""
    if squares.ndim != 4 or squares.shape[3] != 3 or squares.dtype != np.uint8:
        raise UserError(f"pictures must be (B, H, W, 3) uint8, got {squares.shape} {squares.dtype}")
    return scaled(torch.from_numpy(squares).to(device), dtype).contiguous(memory_format=memory_format)


def scaled(squares: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) in 0..1. The only place where pixel values are divided by 255."""
    return squares.permute(0, 3, 1, 2).to(dtype) / 255


def read_squares(encoder: nn.Module, images: ImageSource | Sequence[ImageSource]) -> tuple[np.ndarray, list[Letterbox]]:
    """One image or a list of B -> ((B, S, S, 3) uint8 RGB for the encoder, how each was fitted).

    Raises ImageError for an image that cannot be opened, ValueError for an empty list.
    """
    fitted = [square(image, encoder.image_size, encoder.antialias) for image in as_list(images)]
    return np.stack([pixels for pixels, _ in fitted]), [fit for _, fit in fitted]


def read_pixels(
    encoder: nn.Module, images: ImageSource | Sequence[ImageSource]
) -> tuple[torch.Tensor, list[Letterbox]]:
    """`read_squares` as pixels (B, 3, S, S) in the encoder's dtype and on its device."""
    squares, fits = read_squares(encoder, images)
    weight = next(encoder.parameters())
    return to_pixels(squares, weight.device, weight.dtype), fits


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, so BatchNorm's statistics do not change; afterwards each module's own mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
