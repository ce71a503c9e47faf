"""A frozen encoder as a teacher: its maps of pictures, reduced to principal components, and kept on disk.

A student sees a new view of a picture in every epoch. The teacher sees each picture twice, once and for all: as it is and
mirrored. A view is one of the two, or a window of it that lies on the grid of the teacher's cells, so that its target is a
window of the teacher's map.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nanochat.errors import UserError
from nanochat.files import atomic_path
from nanochat.training.features import (
    PART_IMAGES,
    Features,
    check_writable,
    read_index,
    read_vectors,
    source_digest,
    write_part,
)
from nanochat.training.squares import Squares
from nanochat.vision.encoder import Encoder
from nanochat.vision.pixels import STRIDE

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
    """side: cells along a side of its map of a whole picture. mean (C,), basis (C, K): principal components, after `fit`."""

    def __init__(self, encoder: Encoder, image_size: int, dtype: torch.dtype, device: torch.device):
        """dtype: of the activations. Raises ValueError for an encoder without a last map at stride 32."""
        self.encoder = encoder.to(device=device, memory_format=torch.channels_last).eval()
        self.dtype, self.device = dtype, device
        shape = self.maps(torch.zeros(1, 3, image_size, image_size, device=device)).shape
        self.side = shape[1]
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

    def fit(self, pictures: Squares, components: int, seed: int, folder: Path) -> None:
        """Find the principal components of the cells of up to FIT_PICTURES pictures, or read them from `folder`.

        They are stored, since the same sums on another machine give slightly other ones. Raises ValueError where there are
        fewer than `components`.
        """
        numbers = np.random.default_rng([seed, 0, 4]).permutation(len(pictures.images))[:FIT_PICTURES].tolist()
        digests = [source_digest(pictures.images[number]) for number in numbers]
        self.folder = folder / self.key(digests, components)
        make_folder(self.folder)
        file = self.folder / "components.safetensors"
        if not file.is_file():
            parts = (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH))
            cells = torch.cat([self.maps(pictures.pixels(part)).flatten(0, 2).cpu() for part in parts])
            mean, basis = principal_components(cells, components)
            with atomic_path(file) as new:
                save_file({"mean": mean, "basis": basis}, new)
        found = load_file(file)
        self.mean, self.basis = (found[name].to(self.device) for name in ("mean", "basis"))

    def key(self, digests: list[str], components: int) -> str:
        """A SHA-256 over all that a target depends on, except its picture."""
        settings = [1, self.encoder.architecture, self.side, str(self.dtype), components, digests]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in self.encoder.state_dict().items():
            key.update(name.encode())
            key.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return key.hexdigest()

    def look(self, pictures: torch.Tensor, mirrored: bool) -> torch.Tensor:
        """(B, 3, S, S) -> (B, M, K): the cells of each picture, then with `mirrored` those of its mirror image."""
        seen = [pictures, pictures.flip(-1)] if mirrored else [pictures]
        return torch.cat([(self.maps(pixels).flatten(1, 2) - self.mean) @ self.basis for pixels in seen], 1)

    def release(self) -> None:
        """Free the encoder: all targets are known."""
        del self.encoder


def principal_components(cells: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, C) -> mean (C,) and the directions of largest variance (C, K), both float32, the largest first."""
    if components > cells.size(1):
        raise UserError(f"components must be at most the {cells.size(1)} channels of the teacher, got {components}")
    cells = cells.double()
    mean = cells.mean(0)
    cells -= mean
    basis = torch.linalg.eigh(cells.T @ cells).eigenvectors.flip(1)[:, :components]
    return mean.float(), basis.float().contiguous()


def cached_targets(
    teacher: Teacher,
    pictures: Squares,
    mirrored: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    place = teacher.folder / ("mirrored" if mirrored else "whole")
    make_folder(place)
    digests = [source_digest(image) for image in pictures.images]
    cached = {digest for path in place.glob("*.json") for digest in read_index(path)["images"]}
    missing = list({digest: number for number, digest in enumerate(digests) if digest not in cached}.items())
    for first in range(0, len(missing), PART_IMAGES):
        part, found = missing[first : first + PART_IMAGES], []
        try:
            for start in range(0, len(part), BATCH):
                numbers = [number for _, number in part[start : start + BATCH]]
                found += list(teacher.look(pictures.pixels(numbers), mirrored).cpu().numpy())
                if progress is not None:
                    progress(first + len(found), len(missing))
        finally:
            if found:
                write_part(place, [digest for digest, _ in part[: len(found)]], found)
    parts: list[np.ndarray] = []
    rows: dict[str, tuple[int, int]] = {}
    for path in sorted(place.glob("*.json")):
        index = read_index(path)
        if not set(digests).isdisjoint(index["images"]):
            rows |= {digest: (len(parts), row) for row, digest in enumerate(index["images"])}
            parts.append(read_vectors(path.with_suffix(".npy"), index))
    return Features(parts, [rows[digest] for digest in digests])


def make_folder(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache {place} cannot be made: {error.strerror}: choose another --cache") from error
    check_writable(place)
