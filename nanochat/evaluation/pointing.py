"""Pointing accuracy: how often the cell that an answer attends to most is on the object which the question is about (the
pointing game of Zhang et al. 2016, arXiv 1608.00507).

    chosen_on, held_out = point(agent, training_items), point(agent, other_items)
    pointing_score(chosen_on, held_out)              # {"cell": {"view": "layer 1, head 2", "inside": {...}, ...}, ...}

Which layer and head is read is chosen on pictures that are not in the report.

What points is the strongest cell ("cell"), or the cell that has most attention on itself and its eight neighbours together
("around"): cells around an object see it as well as those on it, so the attention is often a ring. It is on the object if its
centre is inside the object's box ("inside"); so is the cell that holds the centre of the box, since an object can be smaller than
a cell. A weaker measure is that cell and box have any pixel in common ("touching"). Controls: cells that are chosen without the
attention, and the boxes of another picture.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.agent import Agent
from nanochat.attention import attention_to_images
from nanochat.config import grid_side
from nanochat.conversation import user_message
from nanochat.errors import UserError
from nanochat.evaluation.controls import another_group
from nanochat.evaluation.metrics import accuracy, exact_match
from nanochat.metaworld.scene import project
from nanochat.vision.images import ImageSource, open_image
from nanochat.vision.letterbox import Letterbox, square

CRITERIA = ("inside", "touching")
NEW_TOKENS = 24
BATCH = 64
OBJECT_SIDE = 0.1  # metres: the box of a simulated object is what a cube of this side around its position covers


@dataclass(frozen=True)
class Pointed:
    """A question about one object of a picture. box: the object's, x1, y1, x2, y2 in pixels of the picture; group: items of one
    group show pictures that are alike, and are not used as controls of each other."""

    image: ImageSource
    question: str
    answer: str
    box: tuple[float, float, float, float]
    group: str
    kind: str = ""


@dataclass(frozen=True)
class Pointing:
    """What the answers to n questions attended to. weights: (n, n_layer, n_head, N), the mean over the answer's tokens; answers:
    as the model gave them; fits: how each picture was fitted into the encoder's square of `image_size` pixels."""

    items: Sequence[Pointed]
    answers: list[str]
    weights: np.ndarray
    fits: list[Letterbox]
    image_size: int

    def on_object(self, criterion: str) -> np.ndarray:
        """(n, N) bool, see `cells_on_box`."""
        return self.cells_on([item.box for item in self.items], criterion)

    def on_another(self, criterion: str) -> np.ndarray | None:
        """(n, N) bool, for the box of a picture of another group at the same share of the sides; None where there is none."""
        partner = another_group([item.group for item in self.items])
        if partner is None:
            return None
        return self.cells_on(
            [
                scaled_box(self.items[other].box, self.fits[other], fit)
                for other, fit in zip(partner, self.fits, strict=True)
            ],
            criterion,
        )

    def cells_on(self, boxes: Sequence[Sequence[float]], criterion: str) -> np.ndarray:
        n_cells = self.weights.shape[-1]
        pairs = zip(boxes, self.fits, strict=True)
        return np.array([cells_on_box(box, fit, self.image_size, n_cells, criterion) for box, fit in pairs])


def foreground_box(image: ImageSource) -> tuple[int, int, int, int]:
    """The box of what is not background in a drawing with one background colour, which most of the corners have. Raises
    UserError for an empty drawing."""
    pixels = np.asarray(open_image(image))
    corners = [tuple(pixels[y, x]) for y in (0, -1) for x in (0, -1)]
    rows, columns = (pixels != max(corners, key=corners.count)).any(-1).nonzero()
    if not len(rows):
        raise UserError("the picture has one colour: there is no object to point at")
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def simulated_box(position: np.ndarray, image_size: int) -> tuple[float, float, float, float]:
    """The box, in a frame of image_size pixels, of a cube of OBJECT_SIDE around an object's position (x, y, z in metres)."""
    corners = np.array(np.meshgrid(*[[-OBJECT_SIDE / 2, OBJECT_SIDE / 2]] * 3)).reshape(3, -1).T
    places = project(position + corners) * image_size
    return (*places.min(0).tolist(), *places.max(0).tolist())


def scaled_box(box: Sequence[float], of: Letterbox, to: Letterbox) -> np.ndarray:
    """A box of one picture in another of another size, at the same share of its sides."""
    return np.asarray(box) * np.array([to.width / of.width, to.height / of.height] * 2)


def cells_on_box(
    box: Sequence[float], fit: Letterbox, image_size: int, n_cells: int, criterion: str = "inside"
) -> np.ndarray:
    """(n_cells,) bool, row by row: cells of the square that are on the box by a criterion of CRITERIA, see above.

    box: x1, y1, x2, y2 in pixels of the picture, which `fit` fitted into a square of image_size pixels.
    """
    side = grid_side(n_cells)
    scale = np.array([n / m for n, m in zip(fit.fitted, (fit.width, fit.height), strict=True)] * 2)
    cell = image_size / side
    x1, y1, x2, y2 = (np.asarray(box) * scale + [fit.pad_x, fit.pad_y] * 2) / cell  # in cells of the square
    starts = np.arange(side)
    if criterion == "touching":
        return np.outer((starts + 1 > y1) & (starts < y2), (starts + 1 > x1) & (starts < x2)).ravel()
    centres = starts + 0.5
    inside = np.outer((centres >= y1) & (centres < y2), (centres >= x1) & (centres < x2))
    holding = np.outer(starts == np.floor((y1 + y2) / 2), starts == np.floor((x1 + x2) / 2))
    return (inside | holding).ravel()


def point(
    agent: Agent,
    items: Sequence[Pointed],
    progress: Callable[[Iterable], Iterable] = lambda starts: starts,
) -> Pointing:
    """Answer each question greedily and record what its words attended to. Raises UserError for a model without cells (see
    `attention.check_has_cells`). progress: wraps the starts of the batches."""
    answers, weights, fits = [], [], []
    size, antialias = agent.model.config.vision_image_size, agent.model.vision_encoder.antialias
    for start in progress(range(0, len(items), BATCH)):
        part = items[start : start + BATCH]
        seen = agent.look([item.image for item in part])
        fits += [square(item.image, size, antialias)[1] for item in part]
        conversations = [[user_message(item.question, 1)] for item in part]
        said = agent.answer_all(conversations, list(seen[:, None]), NEW_TOKENS)
        for messages, vectors, answer in zip(conversations, seen, said, strict=True):
            weights.append(answer_weights(agent, agent.prompt(messages), answer, vectors))
        answers += said
    return Pointing(items, answers, np.array(weights), fits, size)


def answer_weights(agent: Agent, prompt: list[int], answer: str, vectors: torch.Tensor) -> np.ndarray:
    """(n_layer, n_head, N): the mean over the positions that say the answer; of an empty one, that it ends. vectors: (N, D)."""
    tokens = agent.tokenizer.encode(answer)
    found = attention_to_images(agent.model, [*prompt, *tokens[:-1]], vectors[None])
    return np.asarray(found[:, :, len(prompt) - 1 :, 0].mean(2))


def views(weights: np.ndarray) -> dict[str, np.ndarray]:
    """The ways to read one map (n, N) from the weights (n, n_layer, n_head, N): each head, each layer's mean, and all."""
    n_layers, n_heads = weights.shape[1:3]
    found = {"all layers and heads": weights.mean((1, 2))}
    for layer in range(n_layers):
        found[f"layer {layer + 1}, all heads"] = weights[:, layer].mean(1)
        found |= {f"layer {layer + 1}, head {head + 1}": weights[:, layer, head] for head in range(n_heads)}
    return found


def hits(maps: np.ndarray, on: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the strongest cell of each map (n, N) is one of those in `on` (n, N) bool."""
    return on[np.arange(len(maps)), maps.argmax(1)]


def around(maps: np.ndarray) -> np.ndarray:
    """(n, N): for each cell of each map (n, N), the sum over itself and its neighbours, up to eight."""
    side = grid_side(maps.shape[1])
    padded = np.pad(maps.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    shifts = [(row, column) for row in range(3) for column in range(3)]
    return sum(padded[:, row : row + side, column : column + side] for row, column in shifts).reshape(maps.shape)


READINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"cell": lambda maps: maps, "around": around}


def best_view(pointing: Pointing, reading: str = "cell") -> str:
    """The view of `views` with the highest pointing accuracy ("inside"). To be found on pictures that are not in the report."""
    on, read = pointing.on_object("inside"), READINGS[reading]
    found = {name: hits(read(maps), on).mean() for name, maps in views(pointing.weights).items()}
    return max(found, key=found.get)


def pointing_score(chosen_on: Pointing, held_out: Pointing) -> dict:
    """For each of READINGS, the layer and head that point best on `chosen_on`, scored on `held_out`:

    {"n", "answers" (the share that is right), for each reading {"view", and for each criterion `attention_row`}, and "controls":
    {criterion: {"fixed_cell" (the best one on `chosen_on`), "centre_cell", "random_cell"}}}. All are shares.

    The centre cell is each of the one or four cells around the centre in turn, the random cell each of all.
    """
    if not len(chosen_on.items) or not len(held_out.items):
        raise UserError("pointing needs questions to choose the layer on, and others to report")
    right = [exact_match(a, [item.answer]) for a, item in zip(held_out.answers, held_out.items, strict=True)]
    result: dict = {"n": len(right), "answers": float(np.mean(right)), "controls": {}}
    for reading in READINGS:
        view = best_view(chosen_on, reading)
        rows = {criterion: attention_row(held_out, reading, view, criterion) for criterion in CRITERIA}
        result[reading] = {"view": view, **rows}
    for criterion in CRITERIA:
        on, fixed = held_out.on_object(criterion), chosen_on.on_object(criterion).mean(0).argmax()
        result["controls"][criterion] = {
            "fixed_cell": float(on[:, fixed].mean()),
            "centre_cell": float(on[:, centre_cells(on.shape[1])].mean()),
            "random_cell": float(on.mean()),
        }
    return result


def attention_row(pointing: Pointing, reading: str, view: str, criterion: str) -> dict:
    """{"attention", "ci95": [low, high] of it, "shuffled" (boxes of other pictures; None if there is only one group), "mean_view"
    (all layers and heads), "kinds": {kind: share}}."""
    maps = {name: READINGS[reading](found) for name, found in views(pointing.weights).items()}
    on, other = pointing.on_object(criterion), pointing.on_another(criterion)
    groups, kinds = ([getattr(item, name) for item in pointing.items] for name in ("group", "kind"))
    pointed = hits(maps[view], on)
    estimate = accuracy(pointed, groups)
    return {
        "attention": float(pointed.mean()),
        "ci95": [estimate.low, estimate.high],
        "shuffled": None if other is None else float(hits(maps[view], other).mean()),
        "mean_view": float(hits(maps["all layers and heads"], on).mean()),
        "kinds": {kind: float(pointed[[each == kind for each in kinds]].mean()) for kind in dict.fromkeys(kinds)},
    }


def centre_cells(n_cells: int) -> list[int]:
    """The cell in the middle of the grid, or the four around it."""
    side = grid_side(n_cells)
    middle = sorted({(side - 1) // 2, side // 2})
    return [side * row + column for row in middle for column in middle]
