"""Encoded images of robot datasets: PNG or JPEG bytes that stay encoded until their pixels are used."""

import io

import numpy as np
from PIL import Image

from nanochat.files import DataError
from nanochat.vision.images import letterbox, open_image, square


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file, with the fastest compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_square(image: np.ndarray, size: int) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file of `size` x `size` pixels, letterboxed."""
    return encode_png(letterbox(image, size)[0])


def encoded_square(picture: bytes, size: int) -> bytes:
    """An encoded image, letterboxed to `size` x `size` pixels; the same bytes if it has that size already and can be decoded.
    Raises ImageError for one that cannot be decoded."""
    return picture if is_whole_square(picture, size) else encode_png(square(picture, size)[0])


def decoded_square(picture: bytes) -> np.ndarray:
    """(S, S, 3) uint8 RGB of what `encoded_square` returned. `open_image` treats 16 bits, transparency and orientation as it does
    where a policy runs, so training and serving see the same pixels."""
    return np.asarray(open_image(picture))


def is_whole_square(picture: bytes, size: int) -> bool:
    """Whether these are the bytes of an undamaged RGB picture of this size, PNG or JPEG."""
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            if (image.mode, image.size, getattr(image, "n_frames", 1)) != ("RGB", (size, size), 1):
                return False
            if image.format == "PNG":
                image.verify()  # compares checksums; faster than decoding
            else:
                image.load()
            return True
    except Exception:  # a broken file: open_image decides, and explains
        return False


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
