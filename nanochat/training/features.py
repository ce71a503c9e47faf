"""Features of a frozen encoder, computed once and kept on disk, so that an epoch costs no YOLO.

A cache folder holds one folder for each combination of weights, layer, image size and tokens an image. In it are

    features.f16   rows of N x D float16 numbers, one an image, appended batch by batch
    index.txt      a line for each row: SHA-256 of the image file, the row's exponent, CRC-32 of both and of the row

Rows are on the disk before their lines are, so a run that is killed leaves rows without a line at worst; the next one
writes over them. Images are known by their bytes: they can be moved, and datasets that share images share rows.
Half precision halves the files (7,000 images at 49 x 288 take 200 MB). A row is scaled by a power of two to a largest
value of 0.5..1, or the features of a randomly initialised YOLO (1e-6 and less) would round to nothing.
"""

import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from nanochat.data.sample import DataError
from nanochat.multimodal_gpt import pool_to_tokens
from nanochat.vision.images import ImageSource, file_bytes, image_digest
from nanochat.vision.yolov9 import YOLOv9Plus

FORMAT = 2  # a change of the files or of how images become pixels must raise it
DTYPE = np.dtype("<f2")
INDEX_LINE = re.compile(rb"([0-9a-f]{64}) ([+-][0-9]{4}) ([0-9a-f]{8})\n")
LINE_BYTES = 80


class Features:
    """(n_images, N, D) float32, read from disk when indexed: `features[3]`, `features[[0, 2, 2]]`, `features[:8]`."""

    def __init__(self, stored: np.ndarray, places: list[tuple[int, int]]):
        self._stored, (self._rows, self._exponents) = stored, np.array(places).T
        self.shape, self.dtype = (len(places), *stored.shape[1:]), np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        rows = self._stored[self._rows[index]].astype(np.float32)
        return np.ldexp(rows, self._exponents[index][..., None, None])


def cached_features(
    encoder: YOLOv9Plus,
    images: Sequence[ImageSource],
    layer: str | int,
    tokens_per_image: int,
    folder: str | Path,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """The encoder's maps of `layer`, pooled to `tokens_per_image` vectors each; only images that `folder` does not know
    go through the encoder.

    progress: called with (images done, images to do) after each batch.

    Returns (n_images, tokens_per_image, encoder.embedding_dim(layer)), precise to about 2^-11, in the order of `images`.

    Raises:
        ValueError: no images; features that are not finite numbers.
        DataError: the files of the cache are damaged (named, to be deleted).
        ImageError: an image cannot be read. OSError: the disk is full. What was computed before is kept.
    """
    if not images:
        raise ValueError("there are no images to compute features of")
    digests = [source_digest(image) for image in images]
    row_shape = (tokens_per_image, encoder.embedding_dim(layer))
    place = Path(folder).expanduser() / cache_key(encoder, layer, tokens_per_image)
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        places = _read_index(place, row_shape)
        missing = {digest: image for digest, image in zip(digests, images, strict=True) if digest not in places}
        todo = list(missing.items())
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            vectors = _encode(encoder, [image for _, image in batch], layer, tokens_per_image)
            _append(place, places, [digest for digest, _ in batch], vectors)
            if progress is not None:
                progress(start + len(batch), len(todo))
    return Features(_stored(place, row_shape, len(places)), [places[digest] for digest in digests])


def cache_key(encoder: YOLOv9Plus, layer: str | int, tokens_per_image: int) -> str:
    """A SHA-256 over all that the features of an image depend on: every weight and buffer, architecture and input size,
    layer, tokens."""
    key = hashlib.sha256(json.dumps([FORMAT, encoder.architecture, layer, tokens_per_image], sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


def source_digest(source: ImageSource) -> str:
    """The SHA-256 of an image's file as it is, which costs no decoding; of the pixels where there is no file."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, (str, Path)):
        source = file_bytes(Path(source))
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return image_digest(source)


def _encode(encoder: YOLOv9Plus, images: list[ImageSource], layer: str | int, tokens_per_image: int) -> np.ndarray:
    """(B, N, D) float32"""
    maps = encoder.extract_features(images, layer)  # (B, C, H, W), in evaluation mode whatever the encoder's own is
    vectors = pool_to_tokens(maps.float(), tokens_per_image).cpu().numpy()
    if not np.isfinite(vectors).all():
        raise ValueError(f"the encoder's layer {layer!r} gives NaN or infinite features; check its weights")
    return vectors


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time fills a cache; a second one waits, and finds the rows done. A killed one leaves no lock."""
    with open(place / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stored(place: Path, row_shape: tuple[int, int], n: int) -> np.ndarray:
    return np.memmap(place / "features.f16", DTYPE, mode="r", shape=(n, *row_shape))


def _read_index(place: Path, row_shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Image digest -> (row, exponent) of every complete line, once the rows are known to be what was written."""
    index, features = place / "index.txt", place / "features.f16"
    lines = index.read_bytes() if index.exists() else b""
    n = len(lines) // LINE_BYTES  # a part of a line is from a write that was cut off
    if n == 0:
        return {}
    records = [INDEX_LINE.fullmatch(lines, i * LINE_BYTES, (i + 1) * LINE_BYTES) for i in range(n)]
    places = {record[1].decode(): (i, int(record[2])) for i, record in enumerate(records) if record}
    row_bytes = int(np.prod(row_shape)) * DTYPE.itemsize
    if len(places) < n:
        raise DataError(f"{index} is damaged: not all lines are digests, each once; delete the folder {place}")
    if not features.exists() or features.stat().st_size < n * row_bytes:
        raise DataError(f"{features} is damaged: it is shorter than its index says; delete the folder {place}")
    for record, row in zip(records, _stored(place, row_shape, n), strict=True):
        if _checksum(record[1], record[2], row) != record[3]:
            raise DataError(f"{features} is damaged: a row's checksum is wrong; delete the folder {place}")
    return places


def _append(place: Path, places: dict[str, tuple[int, int]], digests: list[str], vectors: np.ndarray) -> None:
    """Put a batch on the disk and into `places`: the features first, then the lines that make them count."""
    exponents = np.frexp(np.abs(vectors).max(axis=(1, 2)))[1]
    rows = np.ldexp(vectors, -exponents[:, None, None]).astype(DTYPE, order="C")  # (B, N, D)
    lines, first = b"", len(places)
    for i, (digest, exponent, row) in enumerate(zip(digests, exponents.tolist(), rows, strict=True)):
        keys = digest.encode(), b"%+05d" % exponent
        lines += b"%s %s %s\n" % (*keys, _checksum(*keys, row))
        places[digest] = first + i, exponent
    _write_at(place / "features.f16", first * rows[0].nbytes, rows.tobytes())
    _write_at(place / "index.txt", first * LINE_BYTES, lines)


def _checksum(digest: bytes, exponent: bytes, row: np.ndarray) -> bytes:
    return b"%08x" % zlib.crc32(row, zlib.crc32(digest + exponent))


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Write at `offset` and end the file there, through to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
