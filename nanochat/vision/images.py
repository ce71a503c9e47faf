"""Open anything as upright RGB, or say in one line why not; fit it into a square. numpy and Pillow only.

RGB everywhere: PIL is RGB, arrays are taken as RGB. OpenCV's arrays are BGR; turn them with `array[..., ::-1]` first.
"""

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # beyond any camera; a small file can claim to hold more (a decompression bomb)
MIN_SIDE = 2  # pixels; a single one is no picture
PAD = 114  # grey of the letterbox's borders, as in YOLO training

ImageSource = Image.Image | np.ndarray | torch.Tensor | str | Path | bytes | dict


class ImageError(ValueError):
    """A picture that cannot be used; the message says what was found and what was expected."""


def open_image(source: ImageSource) -> Image.Image:
    """Any picture as a loaded RGB image, turned upright by its EXIF orientation.

    source: a path, encoded bytes, a PIL image, a Hugging Face {"bytes", "path"} dict, an RGB array (H, W, 3) or grey
    array (H, W), or a tensor (3, H, W) or (1, 3, H, W); arrays and tensors are uint8, or floats in 0..1. Transparent
    parts become white, 16-bit greys are scaled to 8 bit. Raises ImageError for all else: missing, empty, broken, animated,
    smaller than 2 pixels or larger than 100 million.
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        return finished(source, "the image")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return finished(Image.fromarray(as_uint8(source)), "the array")
    if isinstance(source, bytes):
        return decoded(source, "the image bytes")
    if isinstance(source, (str, os.PathLike)):
        return decoded(file_bytes(Path(source)), str(source))
    raise ImageError(
        f"cannot open {type(source).__name__} as a picture: give a path, bytes, a PIL image, an array or a tensor"
    )


def file_bytes(path: Path) -> bytes:
    if str(path) in ("", "."):
        raise ImageError("the picture's path is empty")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, expected a picture file")
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError:
        raise ImageError(f"there is no file {path}") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error


def decoded(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes), expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data))
        return finished(image, name)
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is no picture in a format that Pillow knows (JPEG, PNG, WebP, BMP, TIFF, ...)"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is larger than {MAX_PIXELS:,} pixels: {error}") from None
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise for broken files
        raise ImageError(f"{name} is damaged or cut off: {error}") from error


def finished(image: Image.Image, name: str) -> Image.Image:
    """Checked, upright, 8-bit RGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, the limit is {MAX_PIXELS:,}: scale it down first")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name} is animated ({frames} frames), expected one picture: extract a frame first")
    image.load()
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # 32-bit; 16-bit PNGs open as I in older Pillows. Pillow itself would clip at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        scale = 1.0 if values.max() <= 255 else 257.0
        return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def as_uint8(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """Array or tensor -> (H, W, 3) or (H, W) uint8, checked."""
    array, shapes = source, "(H, W, 3) or (H, W)"
    if isinstance(source, torch.Tensor):
        shapes = "(3, H, W) or (1, 3, H, W)"
        array = source.detach().cpu()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()
        if array.ndim == 4 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 3 or array.shape[0] != 3:
            raise ImageError(f"a picture tensor has the shape {shapes}, got {tuple(source.shape)}")
        array = array.transpose(1, 2, 0)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageError(f"a picture array has the shape {shapes}, got {tuple(source.shape)}")
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
    """How a picture of width x height was fitted into a square: scaled, then padded by pad_x, pad_y on the left and top."""

    scale: float
    pad_x: int
    pad_y: int
    width: int
    height: int

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) as x1, y1, x2, y2 in pixels of the square -> in pixels of the picture, clipped to it."""
        boxes = (np.asarray(boxes, dtype=np.float64) - [self.pad_x, self.pad_y] * 2) / self.scale
        return np.clip(boxes, 0, [self.width, self.height] * 2)


def letterbox(image: Image.Image | np.ndarray, size: int) -> tuple[np.ndarray, Letterbox]:
    """RGB picture -> ((size, size, 3) uint8, how it was fitted): scaled to fit, centred, the rest grey.

    The same as ultralytics' LetterBox(auto=False) to one grey level, so that detections agree; always square, so that
    shapes are static.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    scale = min(size / height, size / width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    pad_x, pad_y = round((size - new_width) / 2 - 0.1), round((size - new_height) / 2 - 0.1)
    square = np.full((size, size, 3), PAD, np.uint8)
    square[pad_y : pad_y + new_height, pad_x : pad_x + new_width] = resize_bilinear(pixels, new_height, new_width)
    return square, Letterbox(scale, pad_x, pad_y, width, height)


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, each pixel from its four nearest (half-pixel centres, no smoothing).

    In the fixed-point steps of OpenCV's INTER_LINEAR: nearly every pixel is the same, the rest differ by one grey level.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    (y0, y1, wy), (x0, x1, wx) = (neighbours(n, m) for n, m in zip(pixels.shape[:2], (height, width), strict=True))
    wx, wy = (np.rint(w * 2048).astype(np.int32) for w in (wx, wy))  # 11-bit weights
    wx, wy = wx[:, None], wy[:, None, None]
    used, at = np.unique(np.concatenate([y0, y1]), return_inverse=True)  # rows that are looked at
    rows = pixels[used].astype(np.int32)
    rows = (rows[:, x0] * (2048 - wx) + rows[:, x1] * wx) >> 4  # (rows, width, 3)
    blend = ((rows[at[:height]] * (2048 - wy)) >> 16) + ((rows[at[height:]] * wy) >> 16)
    return ((blend + 2) >> 2).astype(np.uint8)


def neighbours(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of m target pixels: the two source pixels around its centre, and the weight of the second."""
    centre = np.clip((np.arange(m) + 0.5) * (n / m) - 0.5, 0, n - 1)
    first = np.minimum(centre.astype(int), n - 1)
    return first, np.minimum(first + 1, n - 1), (centre - first).astype(np.float32)
