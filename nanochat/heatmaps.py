"""Drawings of what the words of an answer looked at: each picture with the attention of each word as a heat map on it.

What is drawn is the mean over all layers and heads: no single head was chosen to look good. How far such maps can be trusted is
measured in evaluation/pointing.py. They show cells, not objects: a cell's vector also knows what is around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageOps

from nanochat.attention import WordAttention
from nanochat.files import atomic_path
from nanochat.fusion import grid_side
from nanochat.vision.images import ImageSource, Letterbox, letterbox, open_image

# Words about the sentence and not about the picture: left out where there are others
FUNCTION_WORDS = frozenset(
    "a an the of in on at by to for with and or is are was be it its his her their that this from as which who there".split()
)
PER_LINE = 6  # panels
PANEL = 360  # pixels of the longer side of the picture in a panel
PANEL_INCHES = 2.2
TITLE_WIDTH = 36  # characters of a line above a panel
OPACITY = 0.75  # of the colour where the attention is greatest


@dataclass(frozen=True)
class Drawn:
    """An answer to draw. images: copies of its P pictures in the size of a panel; titles: of each; fits: how they were fitted
    into the encoder's square of image_size pixels. words: see `attention.attention_of_words`."""

    images: Sequence[Image.Image]
    titles: Sequence[str]
    fits: Sequence[Letterbox]
    image_size: int
    words: Sequence[WordAttention]

    @classmethod
    def of(cls, images: Sequence[ImageSource], titles: Sequence[str], image_size: int, words) -> "Drawn":
        """images: the pictures as the model looked at them. Raises ImageError for what is not a picture."""
        small = [ImageOps.contain(open_image(image), (PANEL, PANEL)) for image in images]
        fits = [letterbox(image, image_size)[1] for image in small]  # of the same shape
        return cls(small, titles, fits, image_size, words)


def shown_words(words: Sequence[WordAttention]) -> list[WordAttention]:
    """Those that are drawn: words of content, or all if there are none; one that comes twice is drawn twice."""
    content = [word for word in words if bare(word.text) and bare(word.text) not in FUNCTION_WORDS]
    return content or list(words)


def bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def heat(cells: np.ndarray, fit: Letterbox, image_size: int, size: tuple[int, int]) -> np.ndarray:
    """(height, width) float32: the values of N cells, row by row, over a picture of size (width, height), smoothly; the square's
    grey borders are cut off. fit: of the picture in the encoder's square of image_size pixels."""
    side = grid_side(len(cells))
    grid = Image.fromarray(np.asarray(cells, np.float32).reshape(side, side))
    (width, height), cell = fit.fitted, image_size / side
    inner = [fit.pad_x / cell, fit.pad_y / cell, (fit.pad_x + width) / cell, (fit.pad_y + height) / cell]
    return np.asarray(grid.resize(size, Image.Resampling.BILINEAR, box=inner))


def with_heat(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A copy of the picture with values (height, width) in 0..1 on it: clear where they are 0, through red to yellow at 1."""
    from matplotlib import colormaps

    colour = 255 * colormaps["autumn"](values)[..., :3]
    opacity = OPACITY * values[..., None]
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_attention(answers: Sequence[Drawn], out: Path) -> None:
    """Write a PNG file, atomically: for each picture of each answer the picture, then a panel for each word of content, its
    strongest cell in yellow. Several pictures of an answer share one scale, so the one that a word looked at more is brighter.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may open windows

    lines = [line for answer in answers for number in range(len(answer.images)) for line in panels(answer, number)]
    shape = (len(lines), max(map(len, lines)))
    figure = Figure(figsize=(shape[1] * PANEL_INCHES, shape[0] * PANEL_INCHES * 1.15), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, lines, strict=True):
        for axis, (title, image) in zip(row, line, strict=False):
            axis.imshow(image)
            axis.set_title(fill(title, TITLE_WIDTH), fontsize=8, parse_math=False)
    with atomic_path(out) as new:
        figure.savefig(new, dpi=100, format="png")


def panels(answer: Drawn, number: int) -> list[list[tuple[str, Image.Image]]]:
    """(title, picture) of one picture of an answer, in lines of PER_LINE."""
    image, words = answer.images[number], shown_words(answer.words)
    found = [(answer.titles[number], image)]
    for word in words:
        cells = (word.mean / word.mean.max()).numpy()[number]
        values = heat(cells, answer.fits[number], answer.image_size, image.size)
        found.append((word.text, with_heat(image, values.clip(0, 1))))
    return [found[start : start + PER_LINE] for start in range(0, len(found), PER_LINE)]
