"""Detected objects, and drawing them into an image. Does not import torch."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from nanochat.vision.images import ImageSource, open_image


@dataclass(frozen=True)
class Detection:
    """One object. box: x1, y1, x2, y2 in pixels of the image; score: 0..1."""

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    class_name: str


def draw_detections(image: ImageSource, detections: Sequence[Detection]) -> Image.Image:
    """A copy of the image with boxes, class names and scores. Line width and font size follow the image's size.

    Raises ImageError for an image that cannot be opened.
    """
    drawn = open_image(image).copy()
    pen = ImageDraw.Draw(drawn)
    side = max(drawn.size)
    line, font = max(2, side // 250), ImageFont.load_default(size=max(10, side // 40))
    for detection in sorted(detections, key=lambda d: d.score):  # the highest score is drawn last, on top
        colour = class_colour(detection.class_id)
        pen.rectangle(detection.box, outline=colour, width=line)
        label = f"{detection.class_name} {detection.score:.2f}"
        _, _, width, height = pen.textbbox((0, 0), label, font=font)
        left, top = detection.box[:2]
        x = max(0, min(left, drawn.width - width - 2 * line))
        y = top - height - line if top > height + line else top  # above the box if there is space, else inside
        pen.rectangle((x, y, x + width + 2 * line, y + height + line), fill=colour)
        pen.text((x + line, y), label, fill="white", font=font)
    return drawn


def class_colour(class_id: int) -> tuple[int, int, int]:
    """RGB of a class. Hues are a golden angle apart, so they differ, and dark enough for white text."""
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb((class_id * 0.618034 + 0.02) % 1, 0.85, 0.75))
