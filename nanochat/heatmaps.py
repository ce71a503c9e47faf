"""Drawings of what the words of an answer looked at: for each word the picture, as bright as the attention is there.

What is drawn is the mean over all layers and heads: no single head was chosen to look good. How far such maps can be trusted is
measured in evaluation/pointing.py. They show cells, not objects: a cell's vector also knows what is around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image

from nanochat.attention import WordAttention
from nanochat.config import grid_side
from nanochat.files import atomic_path
from nanochat.vision.images import ImageSource, open_image
from nanochat.vision.letterbox import Letterbox, letterbox

# Words about the sentence and not about the picture: left out where there are others
FUNCTION_WORDS = frozenset(
    "a an the of in on at by to for with and or is are was be it its his her their that this from as which who there through "
    "into over under near behind while up down out off".split()
)
PER_LINE = 7  # panels
PANEL = 360  # pixels of the longer side of the picture in a panel
PANEL_INCHES = 2.2  # its width
TALLEST = 1.5  # height of a panel, of its width: taller pictures are drawn smaller
TITLE_INCHES = 0.35
TITLE_WIDTH = 34  # characters of a line above a panel
DARKEST = 0.12  # brightness of the picture where there is no attention


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
        whole = [open_image(image) for image in images]
        fits = [letterbox(image, image_size)[1] for image in whole]
        sizes = [Letterbox(PANEL / max(image.size), 0, 0, *image.size).fitted for image in whole]
        small = [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(whole, sizes, strict=True)]
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
    """A copy of the picture, as bright as values (height, width) say: as it is where they are 1, nearly black where they are 0
    (as in Xu et al. 2015, arXiv 1502.03044: a colour on top would hide what is there)."""
    light = DARKEST + (1 - DARKEST) * values[..., None]
    return Image.fromarray((np.asarray(image.convert("RGB")) * light).round().astype(np.uint8))


def draw_attention(answers: Sequence[Drawn], out: Path) -> None:
    """Write a PNG file, atomically: for each picture of each answer the picture, then a panel for each word of content. For each
    word, brightness goes from the least to the most attended cell of all pictures of the answer together.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may open windows

    lines = [line for answer in answers for number in range(len(answer.images)) for line in panels(answer, number)]
    columns = max(map(len, lines))
    heights = [TITLE_INCHES + PANEL_INCHES * min(TALLEST, max(i.height / i.width for _, i in line)) for line in lines]
    figure = Figure(figsize=(columns * PANEL_INCHES, sum(heights)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
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
        mean = np.asarray(word.mean)
        cells = (mean[number] - mean.min()) / max(mean.max() - mean.min(), 1e-9)
        found.append((word.text, with_heat(image, heat(cells, answer.fits[number], answer.image_size, image.size))))
    return [found[start : start + PER_LINE] for start in range(0, len(found), PER_LINE)]
