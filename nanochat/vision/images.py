"""Open anything as upright RGB, or say in one line why not; fit it into a square. numpy and Pillow only.

RGB everywhere: PIL is RGB, arrays are taken as RGB. OpenCV's arrays are BGR; turn them with `array[..., ::-1]` first.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # beyond any camera; a small file can claim to hold more (a decompression bomb)
MAX_BYTES = 1_000_000_000  # MAX_PIXELS at their rawest; also the end of files that have none, like /dev/zero
MIN_SIDE = 2  # pixels; a single one is no picture
PAD = 114  # grey of the letterbox's borders, as in YOLO training
# Formats of pictures. Pillow knows others, and opens some by running a program: Ghostscript, for EPS
FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "QOI"}

ImageSource = Image.Image | np.ndarray | torch.Tensor | str | Path | bytes | bytearray | memoryview | BinaryIO | dict


class ImageError(ValueError):
    """A picture that cannot be used; the message says what was found and what was expected."""


def open_image(source: ImageSource) -> Image.Image:
    """Any picture as a loaded RGB image, turned upright by its EXIF orientation.

    source: a path, encoded bytes or an open file of them, a PIL image, a Hugging Face {"bytes", "path"} dict, an RGB
    array (H, W, 3) or grey array (H, W), or a tensor (3, H, W) or (1, 3, H, W); arrays and tensors are uint8, or floats
    in 0..1. Transparent parts become white, 16-bit greys are scaled to 8 bit. Raises ImageError for all else: missing,
    empty, broken, animated, smaller than 2 pixels or larger than 100 million.
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        with refusing("the image"):
            return finished(source, "the image")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return finished(Image.fromarray(as_uint8(source)), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decoded(bytes(source), "the image bytes")
    if isinstance(source, (str, os.PathLike)):
        return decoded(file_bytes(source), str(source))
    if hasattr(source, "read"):
        return decoded(stream_bytes(source), "the open file")
    raise ImageError(
        f"cannot open {type(source).__name__} as a picture: give a path, bytes, a PIL image, an array or a tensor"
    )


def file_bytes(path: str | Path) -> bytes:
    """The content of a picture's file. Raises ImageError where there is none."""
    if str(path) == "":
        raise ImageError("the picture's path is empty")
    shown = str(path) if len(str(path)) < 300 else f"{str(path)[:40]}... ({len(str(path))} characters)"
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"there is no file {shown}") from None
    except IsADirectoryError:
        raise ImageError(f"{shown} is a folder, expected a picture file") from None
    except OSError as error:
        raise ImageError(f"{shown} cannot be read: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a null byte in the name, or no such user behind the ~
        raise ImageError(f"{shown!r} is no path: {error}") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{shown} is larger than {MAX_BYTES:,} bytes: scale the picture down first")
    return data


def stream_bytes(file: BinaryIO) -> bytes:
    """All that an open file holds, whatever has been read of it. Raises ImageError for one that gives no bytes."""
    with refusing("the open file"):
        with suppress(AttributeError, OSError):  # a pipe has no beginning to go back to
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"the open file gives {type(data).__name__}, expected bytes: open it with mode 'rb'")
    return data


def decoded(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes), expected a picture")
    with refusing(name):
        image = Image.open(io.BytesIO(data))
        if image.format not in FORMATS:
            raise ImageError(f"{name} is a {image.format} file, expected a picture: JPEG, PNG, WebP, BMP, TIFF, ...")
        return finished(image, name)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises for a broken file, and warns of before, into one ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except (
        UnidentifiedImageError,
        ImportError,
    ):  # ImportError: from ultralytics' own Image.open, where that is in place
        raise ImageError(
            f"{name} is no picture in a format that Pillow knows (JPEG, PNG, WebP, BMP, TIFF, ...)"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} is far larger than the limit of {MAX_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut off: {' '.join(str(error).split()) or repr(error)}") from error


def finished(image: Image.Image, name: str) -> Image.Image:
    """Checked (from the header, before anything is decoded), upright, 8-bit RGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, the limit is {MAX_PIXELS:,}: scale it down first")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}")
    # an MPO is a camera's JPEG with a preview or a second eye's view behind it: the first frame is the photo
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name} is animated or has pages ({frames} frames), expected one picture: extract one first")
    image.load()
    return to_rgb(ImageOps.exif_transpose(image), name)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of a loaded image of any mode."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow itself would clip at 255
        values = np.asarray(image).astype(np.int32)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ImageError(f"{name} has 32-bit pixels in {low}..{high}, expected 16 bit at most: convert it to 8 bit")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255
    if image.mode == "F":
        raise ImageError(f"{name} has float pixels of unknown range: convert it to 8 bit, or pass an array in 0..1")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def as_uint8(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """Array or tensor -> (H, W, 3) or (H, W) uint8, checked."""
    array, is_tensor = source, isinstance(source, torch.Tensor)
    if is_tensor:
        array = source.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if is_tensor and (array.ndim != 3 or array.shape[0] != 3):
        raise ImageError(f"a picture tensor has the shape (3, H, W) or (1, 3, H, W), got {tuple(source.shape)}")
    if is_tensor:
        array = array.transpose(1, 2, 0)
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ImageError(f"a picture array has the shape (H, W, 3) or (H, W), got {source.shape}")
    if 0 in array.shape:
        raise ImageError(f"the picture array is empty, shape {tuple(source.shape)}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"picture values are uint8, or floats in 0..1, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ImageError("the picture holds NaN or infinite values")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise ImageError(f"float pictures have values in 0..1, got {low:.3g}..{high:.3g}: divide by 255, or pass uint8")
    return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))


def image_digest(source: ImageSource) -> str:
    """SHA-256 of the decoded pixels and their shape: the same picture in another lossless file has the same digest."""
    pixels = np.asarray(open_image(source))
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Letterbox:
    """How a picture of width x height was fitted into a square: scaled, then padded by pad_x, pad_y at left and top."""

    scale: float
    pad_x: int
    pad_y: int
    width: int
    height: int

    @property
    def fitted(self) -> tuple[int, int]:
        """(width, height) of the picture in the square: whole pixels, so the two axes scale a little differently."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) as x1, y1, x2, y2 in pixels of the square -> in pixels of the picture, clipped to it."""
        sides = np.array([self.width, self.height] * 2, dtype=np.float64)
        boxes = np.asarray(boxes, dtype=np.float64) - [self.pad_x, self.pad_y] * 2
        return np.clip(boxes * (sides / (self.fitted * 2)), 0, sides)


def letterbox(image: Image.Image | np.ndarray, size: int) -> tuple[np.ndarray, Letterbox]:
    """RGB picture -> ((size, size, 3) uint8, how it was fitted): scaled to fit, centred, the rest grey.

    The same as ultralytics' LetterBox(auto=False) to one grey level, so that detections agree; always square, so that
    shapes are static.
    """
    pixels = np.asarray(image)  # (H, W, 3)
    height, width = pixels.shape[:2]
    scale = min(size / height, size / width)
    new_width, new_height = Letterbox(scale, 0, 0, width, height).fitted
    pad_x, pad_y = round((size - new_width) / 2 - 0.1), round((size - new_height) / 2 - 0.1)
    square = np.full((size, size, 3), PAD, np.uint8)
    square[pad_y : pad_y + new_height, pad_x : pad_x + new_width] = resize_bilinear(pixels, new_height, new_width)
    return square, Letterbox(scale, pad_x, pad_y, width, height)


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, each pixel from its four nearest (half-pixel centres, no smoothing).

    In the fixed-point steps of OpenCV's INTER_LINEAR, so that it comes out the same to the bit on most machines.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    (y0, y1, wy), (x0, x1, wx) = neighbours(pixels.shape[0], height), neighbours(pixels.shape[1], width)
    used, at = np.unique(np.concatenate([y0, y1]), return_inverse=True)  # only the rows that are looked at
    rows = pixels.reshape(len(pixels), -1)[used]  # (rows, W * 3): gathering single bytes is far faster than triples
    left, right = ((3 * x[:, None] + np.arange(3)).ravel() for x in (x0, x1))
    wx, wy = np.repeat(wx, 3), wy[:, None]
    across = rows.take(left, axis=1) * (2048 - wx)
    across += rows.take(right, axis=1) * wx
    across >>= 4
    above, below = across[at[:height]], across[at[height:]]  # (height, width * 3)
    above *= 2048 - wy
    below *= wy
    blend = (above >> 16) + (below >> 16)
    return ((blend + 2) >> 2).astype(np.uint8).reshape(height, width, 3)


def neighbours(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of m target pixels: the two source pixels around its centre, and the second's weight in 2048ths."""
    centre = ((np.arange(m) + 0.5) * (n / m) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.intp)
    weight = np.rint((centre - first) * 2048).astype(np.int32)
    return first.clip(0, n - 1), (first + 1).clip(0, n - 1), weight  # at the borders, twice the same one
