"""Questions about two pictures, drawn: coloured shapes before and after a change. For learning to compare; no files are needed.

    moved      what moved?                              red circle
    direction  where did the blue star move?            left, right, up, down, nowhere
    new        what is new in the second picture?       green square
    missing    what is missing in the second picture?   green square
    recolored  which shape has another color?           circle
    common     what is in both pictures?                red circle
    more       which picture has more shapes?           first, second, same
    same       are both pictures the same?              yes, no
    order      the red star falls: which picture came first?        first, second

An answer needs both pictures: whichever one is shown alone, all answers that it leaves open are equally likely (for `order` not
near the upper and lower border). Each pair is drawn so that the first and the second picture are exchangeable, and a change is
drawn without looking at what it gives. What the best guess from one picture scores is in `CHANCE`. Each pair is asked about in
both orders.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, PngImagePlugin

from nanochat.data.sample import Dataset, Sample, question_sample
from nanochat.data.splits import choose_split

OWN_SPLITS = {"train": 9000, "val": 540}  # how many pairs
SIDE = 224  # pixels
CELLS = 3  # a shape stands in one of CELLS x CELLS cells
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (31, 90, 200),
    "yellow": (250, 210, 40),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
FALL, BORDER = 28, 28  # pixels: how far a shape falls between two pictures, and how near to the border its centre comes
# the share of right answers of the best guess from one picture
CHANCE = {
    "moved": 1 / 4,
    "direction": 1 / 3,
    "new": 1 / 4,
    "missing": 1 / 4,
    "recolored": 1 / 4,
    "common": 1 / 3,
    "more": 5 / 11,
    "same": 1 / 2,
    "order": 1 / 2 + FALL / (SIDE - 2 * BORDER - FALL + 1) / 2,  # all is told by a shape within FALL of a border
}


@dataclass(frozen=True)
class Shape:
    """cell: (column, row); shift: (right, down) of its centre from that of the cell, and radius: in pixels."""

    color: str
    form: str
    cell: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    radius: int = 26

    @property
    def name(self) -> str:
        return f"{self.color} {self.form}"


Scene = tuple[Shape, ...]


def load(name: str = "pairs", split: str | None = "train", strict: bool = False) -> Dataset:
    """Two samples of each drawn pair, with its two PNG pictures in both orders. name, strict: not used, nothing is read.

    Splits: "train" (also "fit") and "val", of different drawings. Raises DataError for another one.
    """
    chosen, _ = choose_split("pairs", tuple(OWN_SPLITS), split)
    samples = [sample for number in range(OWN_SPLITS[chosen]) for sample in drawn_samples(chosen, number)]
    return Dataset(f"pairs/{chosen}", "vqa", samples)


def drawn_samples(split: str, number: int) -> list[Sample]:
    rng = random.Random(f"pairs {split} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    change = first, second, *_ = KINDS[kind](rng)
    background = rng.randrange(2**32)  # the same for both: only shapes differ
    where = f"pairs/{split}:{number}"
    images = [draw(scene, background, f"{where} {place}") for scene, place in ((first, "first"), (second, "second"))]
    return [
        pair_sample(images, where, kind, change),
        pair_sample(images[::-1], f"{where} reversed", *other_way(kind, change)),
    ]


def pair_sample(images: Sequence[bytes], where: str, kind: str, change: "Change") -> Sample:
    *_, question, answer = change
    return question_sample(images, question, answer, where, kind)


# ---- the changes: each gives (first scene, second scene, question, answer)

Change = tuple[Scene, Scene, str, str]
NEW, MISSING = "what is new in the second picture?", "what is missing in the second picture?"
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "first": "second", "second": "first"}


def other_way(kind: str, change: Change) -> tuple[str, Change]:
    """The kind and the change with the second picture first."""
    first, second, question, answer = change
    kind = {"new": "missing", "missing": "new"}.get(kind, kind)
    question = {NEW: MISSING, MISSING: NEW}.get(question, question)
    return kind, (second, first, question, OPPOSITE.get(answer, answer))


def shapes(rng: random.Random, n: int, cells: Sequence[tuple[int, int]] = ()) -> list[Shape]:
    """n shapes in different cells; no two have the same colour and form. cells: to choose from, by default all."""
    cells = rng.sample(cells or [(x, y) for x in range(CELLS) for y in range(CELLS)], n)
    names = rng.sample([(color, form) for color in COLORS for form in SHAPES], n)
    return [Shape(*name, cell, shift(rng)) for name, cell in zip(names, cells, strict=True)]


def between_corners(rng: random.Random) -> list[Shape]:
    """One that will be put into a corner, and two that stay in the middle column."""
    return shapes(rng, 3, [(CELLS // 2, row) for row in range(CELLS)])


def middle(index: int) -> float:
    """Where the middle of a column or row of cells is, in pixels."""
    return (index + 0.5) * SIDE / CELLS


def shift(rng: random.Random) -> tuple[int, int]:
    return rng.randint(-8, 8), rng.randint(-8, 8)


def exchanged(scene: Sequence[Shape], place: int, shape: Shape) -> Scene:
    """The scene with another shape at a place of the list."""
    return tuple(shape if i == place else other for i, other in enumerate(scene))


def elsewhere(rng: random.Random, scene: Sequence[Shape], shape: Shape) -> Shape:
    """The shape in a free cell."""
    taken = {other.cell for other in scene}
    free = [(x, y) for x in range(CELLS) for y in range(CELLS) if (x, y) not in taken]
    return replace(shape, cell=rng.choice(free), shift=shift(rng))


def moved(rng: random.Random) -> Change:
    scene = shapes(rng, 4)
    i = rng.randrange(4)
    return tuple(scene), exchanged(scene, i, elsewhere(rng, scene, scene[i])), "what moved?", scene[i].name


def direction(rng: random.Random) -> Change:
    """The shape stands in a corner cell and stays, or moves along one of the two sides: a third each, from wherever."""
    (x, y), last = (rng.choice((0, CELLS - 1)), rng.choice((0, CELLS - 1))), CELLS - 1
    step = rng.choice(("nowhere", "sideways", "up or down"))
    cell = {"nowhere": (x, y), "sideways": (last - x, y), "up or down": (x, last - y)}[step]
    answer = {"nowhere": "nowhere", "sideways": "left" if x else "right", "up or down": "up" if y else "down"}[step]
    subject, *others = between_corners(rng)
    before = replace(subject, cell=(x, y))
    after = replace(before, cell=cell, shift=before.shift if step == "nowhere" else shift(rng))
    question = f"where did the {subject.name} move?"
    return (before, *others), (after, *others), question, answer


def new(rng: random.Random) -> Change:
    scene = shapes(rng, 4)
    i = rng.randrange(4)
    return tuple(scene[:i] + scene[i + 1 :]), tuple(scene), NEW, scene[i].name


def missing(rng: random.Random) -> Change:
    return other_way("new", new(rng))[1]


def recolored(rng: random.Random) -> Change:
    """Every form once, so that the form names the shape."""
    forms = rng.sample(SHAPES, len(SHAPES))
    scene = [replace(shape, form=form) for shape, form in zip(shapes(rng, len(SHAPES)), forms, strict=True)]
    i = rng.randrange(len(scene))
    color = rng.choice([color for color in COLORS if color != scene[i].color])
    after = exchanged(scene, i, replace(scene[i], color=color))
    return tuple(scene), after, "which shape has another color?", scene[i].form


def common(rng: random.Random) -> Change:
    """Two scenes with one shape in common, at any place."""
    names = shapes(rng, 5)
    first, second = (
        [replace(shape, cell=place.cell, shift=place.shift) for shape, place in zip(own, shapes(rng, 3), strict=True)]
        for own in (names[:3], [names[0], *names[3:]])
    )
    rng.shuffle(first)
    return tuple(first), tuple(second), "what is in both pictures?", names[0].name


# (shapes in the first, shapes in the second picture) -> weight: symmetric, and in each row the answers that are possible, first,
# second or same, are equally likely
COUNTS = {(2, 2): 2, (2, 3): 1, (2, 4): 1, (3, 2): 1, (3, 3): 1, (3, 4): 1, (4, 2): 1, (4, 3): 1, (4, 4): 2}


def more(rng: random.Random) -> Change:
    before, after = rng.choices(list(COUNTS), list(COUNTS.values()))[0]
    answer = "first" if before > after else "second" if after > before else "same"
    return tuple(shapes(rng, before)), tuple(shapes(rng, after)), "which picture has more shapes?", answer


def same(rng: random.Random) -> Change:
    """If they differ, one shape has another place, or another colour."""
    scene = shapes(rng, 3)
    i, after = rng.randrange(3), tuple(scene)
    is_same = rng.random() < 0.5
    if not is_same and rng.random() < 0.5:
        after = exchanged(scene, i, elsewhere(rng, scene, scene[i]))
    elif not is_same:
        names = {shape.name for shape in scene}
        color = rng.choice([color for color in COLORS if f"{color} {scene[i].form}" not in names])
        after = exchanged(scene, i, replace(scene[i], color=color))
    return tuple(scene), after, "are both pictures the same?", "yes" if is_same else "no"


def order(rng: random.Random) -> Change:
    """A shape falls by FALL pixels, from anywhere. (Where the question names one of two ways, the answer is a parity of what is
    seen and a word, which models of this size did not learn in hours.)"""
    columns = rng.sample(range(CELLS), CELLS)
    subject, *others = shapes(rng, CELLS, list(zip(columns, range(CELLS), strict=True)))  # no two in one column
    top = rng.randint(BORDER, SIDE - BORDER - FALL)
    earlier, later = ((at_height(subject, height), *others) for height in (top, top + FALL))
    question = f"the {subject.name} falls: which picture came first?"
    return rng.choice([(earlier, later, question, "first"), (later, earlier, question, "second")])


def at_height(shape: Shape, height: int) -> Shape:
    """The shape with its centre at a row of pixels, from above."""
    right, _ = shape.shift
    return replace(shape, shift=(right, height - round(middle(shape.cell[1]))))


KINDS: dict[str, Callable[[random.Random], Change]] = {
    "moved": moved,
    "direction": direction,
    "new": new,
    "missing": missing,
    "recolored": recolored,
    "common": common,
    "more": more,
    "same": same,
    "order": order,
}

# ---- drawing


def draw(scene: Scene, background: int, name: str) -> bytes:
    """A PNG, SIDE x SIDE pixels. background: the seed of its colour and stripes. name: a comment in the file, so that two
    pictures that look the same are not one file, and controls exchange each of them."""
    rng = random.Random(background)
    base = tuple(rng.randint(150, 235) for _ in range(3))
    stripe = tuple(min(255, max(120, value + rng.choice((-20, 20)))) for value in base)
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([*base, *stripe, *(value for color in COLORS.values() for value in color)])
    pen, wide = ImageDraw.Draw(image), rng.randint(12, 50)
    upright = rng.random() < 0.5
    for start in range(0, SIDE, 2 * wide):
        pen.rectangle((start, 0, start + wide, SIDE) if upright else (0, start, SIDE, start + wide), fill=1)
    for shape in scene:
        draw_shape(pen, shape)
    file, comments = io.BytesIO(), PngImagePlugin.PngInfo()
    comments.add_text("Comment", name)
    image.save(file, "PNG", compress_level=1, pnginfo=comments)
    return file.getvalue()


# corners relative to the centre, in radii
OUTLINES = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "star": (
        *((0, -1.1), (0.26, -0.34), (1.05, -0.34), (0.42, 0.13), (0.65, 0.89)),
        *((0, 0.44), (-0.65, 0.89), (-0.42, 0.13), (-1.05, -0.34), (-0.26, -0.34)),
    ),
}


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    x, y = (middle(index) + moved for index, moved in zip(shape.cell, shape.shift, strict=True))
    fill, r = 2 + list(COLORS).index(shape.color), shape.radius
    if shape.form == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in OUTLINES[shape.form]], fill=fill)
