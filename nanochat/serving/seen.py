"""Pictures that the model has looked at, by their SHA-256: the second question about a picture costs no encoder. No torch."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from nanochat.vision.images import ImageError, open_image

MOST_BYTES = 64 * 2**20  # of vectors that are kept
Key = tuple[bytes, ...]


class Seen:
    """look: [picture, ...] -> (n, N, D) vectors, of torch or numpy. The least recently used vectors are forgotten. `vectors`
    is for one thread, `known` for all."""

    def __init__(self, look: Callable[[list], Any], max_pixels: int, most_bytes: int = MOST_BYTES):
        self.look, self.max_pixels, self.most_bytes = look, max_pixels, most_bytes
        self.found: OrderedDict[Key, Any] = OrderedDict()
        self.bytes = self.hits = self.misses = 0
        self.lock = threading.Lock()  # guards `found`

    def vectors(self, key: Key, pictures: Sequence[bytes]) -> tuple[Any, int]:
        """((n, N, D) vectors of encoded image files, how many of them were known). Pictures that are shown together are kept
        together. key: `key_of` them. Raises ImageError for what is no picture, or has too many pixels."""
        if (vectors := self.known(key)) is not None:
            return vectors, len(pictures)
        self.misses += 1
        names = ["the picture"] if len(pictures) == 1 else [f"picture {i}" for i in range(1, len(pictures) + 1)]
        images = [opened(data, name, self.max_pixels) for data, name in zip(pictures, names, strict=True)]
        vectors = self.look(images)
        with self.lock:
            self.found[key] = vectors
            self.bytes += vectors.nbytes
            while self.bytes > self.most_bytes and len(self.found) > 1:
                self.bytes -= self.found.popitem(last=False)[1].nbytes
        return vectors, 0

    def known(self, key: Key) -> Any:
        """The vectors of pictures that were shown together before, else None."""
        with self.lock:
            if key not in self.found:
                return None
            self.found.move_to_end(key)
            self.hits += 1
            return self.found[key]


def key_of(pictures: Sequence[bytes]) -> Key:
    """The SHA-256 of each."""
    return tuple(hashlib.sha256(data).digest() for data in pictures)


def opened(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """An encoded image file -> RGB. Its size is checked in the header, before anything is decoded."""
    width = height = 0
    with suppress(Exception):  # `open_image` says what is wrong
        width, height = Image.open(io.BytesIO(data)).size
    if width * height > max_pixels:
        raise TooLarge(
            f"{name} has {width} x {height} pixels, the limit of this server is {max_pixels:,}: scale it down first"
        )
    try:
        return open_image(data)
    except ImageError as error:
        raise ImageError(str(error).replace("the image bytes", name)) from error


class TooLarge(ImageError):
    """More pixels than the server reads."""
