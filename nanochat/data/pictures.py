"""Encoded images of robot datasets: PNG or JPEG bytes that stay encoded until their pixels are used."""

import io
from contextlib import suppress

import numpy as np
from PIL import Image

from nanochat.files import DataError
from nanochat.vision.images import letterbox, open_image


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file, with the fastest compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encoded_square(picture: bytes, size: int) -> bytes:
    """An encoded image, letterboxed to `size` x `size` pixels; the same bytes if it has that size already.
    Raises ImageError for one that cannot be decoded."""
    with suppress(OSError), Image.open(io.BytesIO(picture)) as image:  # open_image explains a broken one
        if image.size == (size, size):
            return picture
    return encode_png(letterbox(open_image(picture), size)[0])


def check_picture(picture: bytes, shape: tuple[int, int, int], where: str) -> None:
    """Raises DataError for what is not an RGB image of this shape (H, W, 3), encoded as PNG or JPEG."""
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            mode, found = image.mode, (image.height, image.width, 3)
            image.verify()
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} must be the bytes of a PNG or JPEG file: {error}") from error
    if (mode, found) != ("RGB", shape):
        raise DataError(f"{where} must be RGB of shape {shape}, found {mode} of {found[0]} x {found[1]}")
