"""Vision vectors of a frozen encoder, computed once and kept on disk, so that an epoch does not run the encoder.

A cache folder holds one folder per key: a hash of the encoder's weights, layer, image size and tokens per image. In it are
parts of up to 512 pictures:

    NAME.npy    (m, N, D) float32, numpy's format, memory-mapped when read
    NAME.json   {"images": [SHA-256 of each picture's file], "npy_sha256": ...}

The JSON is written last: a part exists once its JSON does, so a killed run leaves at most an .npy without JSON, which the
next run overwrites. NAME is a hash of the content, so two processes that fill a cache at the same time do double work, but
never overwrite each other's parts. Pictures are identified by their bytes: files can be moved, and datasets that share
pictures share vectors.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nanochat.cache import check_writable, make_folder
from nanochat.errors import UserError
from nanochat.files import DataError, atomic_path, json_object, sha256
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.vision.images import ImageSource, file_bytes, image_digest, open_image

FORMAT = 3  # raise it when the files, or the way from a picture to pixels, change
PART_IMAGES = 512  # what a killed run can lose


class Features:
    """(n_images, N, D) float32, read from disk when indexed: `features[3]`, `features[[0, 2, 2]]`, `features[:8]`."""

    def __init__(self, parts: list[np.ndarray], rows: list[tuple[int, int]]):
        """parts: arrays (m, N, D). rows: for each image the index of its part, and its row there."""
        self._parts, self._rows = parts, np.array(rows)  # (n_images, 2)
        self.shape, self.dtype = (len(rows), *parts[0].shape[1:]), np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        rows = self._rows[index]  # (2,) for a single image, else (n, 2)
        if rows.ndim == 1:
            return np.array(self._parts[rows[0]][rows[1]])
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part in np.unique(rows[:, 0]):
            of_part = rows[:, 0] == part
            found[of_part] = self._parts[part][rows[of_part, 1]]
        return found


def cached_features(
    model: MultimodalGPT,
    images: Sequence[ImageSource],
    folder: str | Path,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    mirrored: bool = False,
) -> Features:
    """`model.look(images)` from the cache in `folder`; only pictures that are not in it go through the encoder.

    mirrored: of the pictures with left and right exchanged, which are kept in a folder of their own.
    progress: called with (images done, images to do) after each batch.

    Returns (n_images, N, D) in the order of `images`.

    Raises:
        ValueError: no images; vectors that are not finite numbers.
        DataError: a file of the cache is damaged (it is named, and is to be deleted).
        ImageError: an image cannot be read. OSError: the disk is full. Vectors computed before are kept.
    """
    if not images:
        raise UserError("there are no images to compute features of")
    place = Path(folder).expanduser() / cache_key(model, mirrored)
    digests = [source_digest(image) for image in images]
    make_folder(place)
    cached = {digest for path in place.glob("*.json") for digest in read_index(path)["images"]}
    missing = {digest: image for digest, image in zip(digests, images, strict=True) if digest not in cached}
    if missing:
        check_writable(place)
    compute(missing, place, lambda some: look(model, some, mirrored), batch_size, progress)
    parts: list[np.ndarray] = []
    rows: dict[str, tuple[int, int]] = {}
    for path in sorted(place.glob("*.json")):
        index = read_index(path)
        if not set(digests).isdisjoint(index["images"]):
            rows |= {digest: (len(parts), row) for row, digest in enumerate(index["images"])}
            parts.append(read_vectors(path.with_suffix(".npy"), index))
    return Features(parts, [rows[digest] for digest in digests])


def cache_key(model: MultimodalGPT, mirrored: bool = False) -> str:
    """A SHA-256 over all that a picture's vectors depend on: every weight and buffer of the encoder, its architecture and
    input size, the layer, the tokens per image."""
    encoder, config = model.vision_encoder, model.config
    settings = [
        FORMAT, encoder.architecture, encoder.image_size, config.vision_layer, config.vision_tokens_per_image,
        str(model.compute_dtype), *(["mirrored"] if mirrored else []),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


def source_digest(source: ImageSource) -> str:
    """The SHA-256 of a picture's file, without decoding it; of the pixels where there is no file."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, (str, Path)):
        source = file_bytes(Path(source))
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return image_digest(source)


def compute(images: dict[str, ImageSource], place: Path, look: Callable, batch_size: int, progress) -> None:
    """Write parts with the vectors of all `images` (by their digests). An error or Ctrl-C loses one batch at most."""
    digests = list(images)
    for first in range(0, len(digests), PART_IMAGES):
        part, vectors = digests[first : first + PART_IMAGES], []
        try:
            for start in range(0, len(part), batch_size):
                vectors += list(look([images[digest] for digest in part[start : start + batch_size]]))
                if progress is not None:
                    progress(first + len(vectors), len(digests))
        finally:
            if vectors:
                write_part(place, part[: len(vectors)], vectors)


def look(model: MultimodalGPT, images: list[ImageSource], mirrored: bool) -> list[np.ndarray]:
    """(N, D) float32 of each image."""
    if mirrored:
        images = [np.asarray(open_image(image))[:, ::-1] for image in images]
    vectors = model.look(images).float().cpu().numpy()
    if not np.isfinite(vectors).all():
        layer = model.config.vision_layer
        raise UserError(f"the encoder's layer {layer!r} gives NaN or infinite features: check its weights")
    return list(vectors)


def write_part(place: Path, digests: list[str], vectors: list[np.ndarray]) -> None:
    """First NAME.npy, then the NAME.json that makes it count; each file appears in one step."""
    file = io.BytesIO()
    np.save(file, np.stack(vectors).astype(np.float32), allow_pickle=False)
    npy_sha256 = hashlib.sha256(file.getbuffer()).hexdigest()
    name = hashlib.sha256("".join([*digests, npy_sha256]).encode()).hexdigest()[:32]
    with atomic_path(place / f"{name}.npy") as new:
        new.write_bytes(file.getbuffer())
    with atomic_path(place / f"{name}.json") as new:
        new.write_text(json.dumps({"images": digests, "npy_sha256": npy_sha256}))


def read_index(path: Path) -> dict:
    """The content of a NAME.json. Raises DataError where it is damaged."""
    index = json_object(path.read_bytes(), f"{path} is damaged, delete it and run again")
    images = index.get("images")
    if not isinstance(images, list) or not all(isinstance(digest, str) for digest in images):
        raise DataError(f'{path} is damaged, it has no list "images": delete it and run again')
    return index


def read_vectors(path: Path, index: dict) -> np.ndarray:
    """(m, N, D) float32, memory-mapped. Raises DataError where the file is not the one that `index` was written for."""
    if not path.is_file():
        raise DataError(f"{path} is missing: delete {path.with_suffix('.json')} and run again")
    is_whole = sha256(path) == index.get("npy_sha256")
    vectors = np.load(path, mmap_mode="r", allow_pickle=False) if is_whole else None
    if vectors is None or len(vectors) != len(index["images"]):
        raise DataError(
            f"{path} is damaged, its content is not what {path.stem}.json says: delete both files and run again"
        )
    return vectors
