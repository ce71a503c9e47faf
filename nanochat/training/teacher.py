"""A frozen encoder as a teacher: its maps of pictures, reduced to principal components, and kept on disk.

A student sees a new view of a picture in every epoch. The teacher sees each picture twice, once and for all: as it is and
mirrored. A view is one of the two, or a window of it that lies on the grid of the teacher's cells, so that its target is a
window of the teacher's map.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nanochat.cache import make_folder
from nanochat.errors import UserError
from nanochat.files import atomic_path
from nanochat.training.features import FORMAT, Features, cached_vectors, source_digest
from nanochat.vision.encoder import Encoder
from nanochat.vision.images import ImageSource
from nanochat.vision.pixels import STRIDE, read_pixels

LAYER = "features"  # the teacher's map: the last one, which its classifier averages
MARGIN = 2  # cells by which a window is smaller than the picture
FIT_PICTURES = 512  # pictures whose cells give the principal components
BATCH = 16


class View(NamedTuple):
    """A square part of a picture. row, column: of its top left cell, after mirroring. side: in cells."""

    mirrored: bool
    row: int
    column: int
    side: int


def draw_views(rng: np.random.Generator, n: int, side: int, windows: bool) -> list[View]:
    """Random views of n pictures of side * side cells: all of them whole, or all of them windows of one size."""
    width = max(1, side - MARGIN) if windows else side
    mirrored, corners = rng.random(n) < 0.5, rng.integers(0, side - width + 1, (n, 2))
    return [View(bool(flip), *corner, width) for flip, corner in zip(mirrored, corners.tolist(), strict=True)]


def pixels_of(picture: torch.Tensor, view: View) -> torch.Tensor:
    """(3, S, S) -> the view's (3, S', S')."""
    if view.mirrored:
        picture = picture.flip(-1)
    top, left, size = view.row * STRIDE, view.column * STRIDE, view.side * STRIDE
    return picture[:, top : top + size, left : left + size]


def cells_of(targets: np.ndarray, view: View) -> np.ndarray:
    """The teacher's cells of a picture and of its mirror image, (2, H, W, K) -> (side * side, K) of a view."""
    rows, columns = slice(view.row, view.row + view.side), slice(view.column, view.column + view.side)
    return targets[int(view.mirrored), rows, columns].reshape(view.side**2, -1)


class Teacher:
    """side: cells along a side of its map of a whole picture. channels: C of that map. mean (C,), basis (C, K): principal
    components, after `fit`."""

    def __init__(self, encoder: Encoder, image_size: int, dtype: torch.dtype, device: torch.device):
        """dtype: of the activations. Raises ValueError for an encoder without a last map at stride 32."""
        self.encoder = encoder.to(device=device, memory_format=torch.channels_last).eval()
        self.encoder.image_size = image_size
        self.dtype, self.device = dtype, device
        shape = self.maps(torch.zeros(1, 3, image_size, image_size, device=device)).shape
        self.side, self.channels = shape[1], shape[3]
        if shape[1] != shape[2] or shape[1] * STRIDE != image_size:
            raise UserError(
                f"the teacher's map has {shape[1]} x {shape[2]} cells at {image_size} pixels, expected one in {STRIDE} pixels"
            )

    @torch.no_grad()
    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in 0..1 -> (B, H, W, C) float32."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.encoder.maps(pixels, [LAYER])[LAYER].permute(0, 2, 3, 1).float()

    def fit(self, images: Sequence[ImageSource], components: int, seed: int, folder: Path) -> None:
        """Find the principal components of the cells of up to FIT_PICTURES images, or read them from the cache in `folder`.

        They are stored, since the same sums on another machine give slightly other ones. Raises ValueError where there are
        fewer than `components`.
        """
        numbers = np.random.default_rng([seed, 0, 4]).permutation(len(images))[:FIT_PICTURES]
        chosen = [images[number] for number in numbers]
        self.folder = folder / self.key([source_digest(image) for image in chosen], components)
        file = self.folder / "components.safetensors"
        if not file.is_file():
            make_folder(self.folder)
            batches = (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))
            cells = [self.maps(read_pixels(self.encoder, batch)[0]).flatten(0, 2).cpu() for batch in batches]
            mean, basis = principal_components(torch.cat(cells), components)
            with atomic_path(file) as new:
                save_file({"mean": mean, "basis": basis}, new)
        found = load_file(file)
        self.mean, self.basis = (found[name].to(self.device) for name in ("mean", "basis"))

    def key(self, digests: list[str], components: int) -> str:
        """A SHA-256 over all that a target depends on, except its picture. digests: of the pictures that `fit` sees."""
        settings = [FORMAT, self.encoder.architecture, self.side, str(self.dtype), components, digests]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in self.encoder.state_dict().items():
            key.update(name.encode())
            key.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return key.hexdigest()

    def look(self, images: Sequence[ImageSource], mirrored: bool) -> np.ndarray:
        """(B, M, K) float32: the cells of each image, row by row; with `mirrored` then those of its mirror image."""
        pixels = read_pixels(self.encoder, images)[0]
        seen = [pixels, pixels.flip(-1)] if mirrored else [pixels]
        found = torch.cat([(self.maps(view).flatten(1, 2) - self.mean) @ self.basis for view in seen], 1).cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError("the teacher's map holds NaN or infinite values: check its weights")
        return found

    def targets(self, images: Sequence[ImageSource], mirrored: bool, progress: Callable[[int, int], None]) -> Features:
        """`look(images)` from the cache; only images that are not in it are looked at. progress: images done, images to do."""
        place = self.folder / ("mirrored" if mirrored else "whole")
        return cached_vectors(place, images, lambda missing: self.look(missing, mirrored), BATCH, progress)

    def release(self) -> None:
        """Free the encoder: all targets are known."""
        del self.encoder


def principal_components(cells: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, C) -> mean (C,) and the directions of largest variance (C, K), both float32, the largest first."""
    if components > cells.size(1):
        raise UserError(f"--components must be at most the {cells.size(1)} channels of the teacher, got {components}")
    cells = cells.double()
    mean = cells.mean(0)
    cells -= mean
    basis = torch.linalg.eigh(cells.T @ cells).eigenvectors.flip(1)[:, :components]
    return mean.float(), basis.float().contiguous()
