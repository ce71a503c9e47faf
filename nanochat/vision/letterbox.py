"""Fit images into the square, or the rectangle, that an encoder takes. numpy and Pillow, no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nanochat.vision.images import ImageSource, as_list, open_image

STRIDE = 32  # of an encoder's coarsest map; input sides are multiples of it
MAX_IMAGE_SIZE = 4096  # pixels a side of an encoder's square input; the first map of yolov9t then has 268 MB
PAD = 114  # grey value of the letterbox's borders, as in YOLO training


@dataclass(frozen=True)
class Letterbox:
    """How an image of width x height was fitted into a square or rectangle: scaled, then pad_x, pad_y added at left and top."""

    scale: float
    pad_x: int
    pad_y: int
    width: int
    height: int

    @property
    def fitted(self) -> tuple[int, int]:
        """(width, height) of the scaled image. They are whole pixels, so the two axes scale slightly differently."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) as x1, y1, x2, y2 in pixels of the square or rectangle -> in pixels of the image, clipped to it."""
        sides = np.array([self.width, self.height] * 2, dtype=np.float64)
        boxes = np.asarray(boxes, dtype=np.float64) - [self.pad_x, self.pad_y] * 2
        return np.clip(boxes * (sides / (self.fitted * 2)), 0, sides)


def square(source: ImageSource, size: int, antialias: bool = False) -> tuple[np.ndarray, Letterbox]:
    """Any image source -> ((size, size, 3) uint8 RGB, how it was fitted). Raises ImageError, see `open_image`."""
    return letterbox(open_image(source), size, antialias)


def rectangle(source: ImageSource, size: int, antialias: bool = False) -> tuple[np.ndarray, Letterbox]:
    """As `square`, with less border: (H, W, 3), the longer side `size`, the other a multiple of STRIDE."""
    return letterbox(open_image(source), size, antialias, STRIDE)


def of_rectangles(
    images: ImageSource | Sequence[ImageSource],
    size: int,
    antialias: bool,
    compute: Callable[[np.ndarray, list[Letterbox]], Iterable],
) -> list:
    """What `compute(pixels, fits)` says of each picture, in the order of the images.

    images: one or a list; each is fitted by `rectangle`. Those of one shape are computed together: pixels is (B, H, W, 3) uint8
    RGB, fits says how each was fitted. Raises ImageError for an image that cannot be opened, ValueError for an empty list.
    """
    fitted = [rectangle(image, size, antialias) for image in as_list(images)]
    found = {}
    for shape in dict.fromkeys(pixels.shape for pixels, _ in fitted):
        numbers = [number for number, (pixels, _) in enumerate(fitted) if pixels.shape == shape]
        pixels, fits = zip(*(fitted[number] for number in numbers), strict=True)
        found |= zip(numbers, compute(np.stack(pixels), list(fits)), strict=True)
    return [found[number] for number in range(len(fitted))]


def letterbox(
    image: Image.Image | np.ndarray, size: int, antialias: bool = False, multiple: int | None = None
) -> tuple[np.ndarray, Letterbox]:
    """RGB image -> ((size, size, 3) uint8, how it was fitted): scaled to fit, centred, borders grey.

    Equals ultralytics' LetterBox to one grey level, so detections agree. antialias: average over the pixels that become one, as
    photographs are shrunk for classifiers. multiple: of which both sides are; by default `size`, so that tensor shapes are
    static. With 32 it is their LetterBox(auto=True), and a picture of 640 x 480 has a quarter less to compute.
    """
    pixels = np.asarray(image)  # (H, W, 3)
    height, width = pixels.shape[:2]
    scale = min(size / height, size / width)
    new_width, new_height = Letterbox(scale, 0, 0, width, height).fitted
    multiple = multiple or size
    out_height, out_width = (-(-side // multiple) * multiple for side in (new_height, new_width))
    pad_x, pad_y = round((out_width - new_width) / 2 - 0.1), round((out_height - new_height) / 2 - 0.1)
    fitted = np.full((out_height, out_width, 3), PAD, np.uint8)
    resize = resize_antialiased if antialias else resize_bilinear
    fitted[pad_y : pad_y + new_height, pad_x : pad_x + new_width] = resize(pixels, new_height, new_width)
    return fitted, Letterbox(scale, pad_x, pad_y, width, height)


def resize_antialiased(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8 by Pillow's bilinear filter, which widens when it shrinks."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8: bilinear, half-pixel centres, no antialiasing.

    Uses the fixed-point arithmetic of OpenCV's INTER_LINEAR, so the result is bitwise the same on most machines.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    (y0, y1, wy), (x0, x1, wx) = neighbours(pixels.shape[0], height), neighbours(pixels.shape[1], width)
    used, at = np.unique(np.concatenate([y0, y1]), return_inverse=True)  # only the rows that are read
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
    """For each of m target pixels: the two source pixels around its centre, and the weight of the second, of 2048."""
    centre = ((np.arange(m) + 0.5) * (n / m) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.intp)
    weight = np.rint((centre - first) * 2048).astype(np.int32)
    return first.clip(0, n - 1), (first + 1).clip(0, n - 1), weight  # at the borders both are the same
