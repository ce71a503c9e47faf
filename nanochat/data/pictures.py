"""Encoded images of robot datasets: PNG or JPEG bytes."""

import io

import numpy as np
from PIL import Image

from nanochat.files import DataError


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file, with the fastest compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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
