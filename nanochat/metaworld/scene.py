"""Questions about a camera image of Meta-World, answered from the simulator's state, so that nobody has to label images.

The camera is Meta-World's "corner2", nearer to the table, and its image is upright. Only what an image of 128 x 128 pixels
can show is asked; a question with two acceptable answers is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import radians, tan

import numpy as np

from nanochat.data.sample import CAPTION_PROMPT
from nanochat.errors import UserError
from nanochat.metaworld.instructions import INSTRUCTIONS, OBJECTS

# In metres, world axes. Nearer than Meta-World's own position, as in published evaluations.
CAMERA_POSITION = np.array([0.75, 0.075, 0.7])
# Rows: the directions right, down and depth of the upright image. From cam_quat of "corner2" (Meta-World 3.1.1),
# (-0.395038, 0.262667, -0.434937, 0.765363), with right and down rotated by 180 degrees.
CAMERA_AXES = np.array(
    [
        [0.549901330, 0.833182757, -0.058438184],
        [0.376207741, -0.309549142, -0.873296665],
        [-0.745705212, 0.458242100, -0.483671287],
    ]
)
FOCAL_LENGTH = 0.5 / tan(radians(60) / 2)  # in image sides; 60 degrees is cam_fovy

HAND, OPENING, OBJECT = slice(0, 3), 3, slice(4, 7)  # indices in the observation of 39 numbers
OBJECT_POSITIONS = [0, 1, 2, 4, 5, 6, 11, 12, 13, 36, 37, 38]  # hand, object, second object and goal, x, y, z each
GRID = 8  # cells per side: the arm's workspace fills a quarter of the image
# Openings in episodes of all 50 experts: 0.26..0.30 with nothing between the fingers, up to 0.75 around objects, 0.9..1 when
# the fingers open, and the fewest frames at 0.75..0.85. Only the plug of peg-unplug-side is held at 0.9.
SHUT, OPEN = 0.75, 0.85
OPENING_KEPT, OPENING_CHANGED = 0.1, 0.2
LEVEL = 0.03  # of the image side, 4 pixels of 128: a smaller offset is neither left nor right
STILL, MOVED = 0.015, 0.04  # of the image side: up to 2 pixels of 128 count as no motion, 5 as motion
DIAGONAL = 1.25  # a motion has a direction if one axis moves this many times as far as the other

# Tasks whose expert closes its fingers around the object. In the others, closed fingers also touch the object they press.
GRIPPED = frozenset(
    "assembly basketball bin-picking box-close coffee-pull coffee-push disassemble hammer hand-insert handle-pull-side "
    "peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall push push-back push-wall shelf-place "
    "stick-pull stick-push sweep sweep-into".split()
)

PHRASES: dict[str, tuple[str, ...]] = {
    "describe": (CAPTION_PROMPT,),
    "task": ("what should the robot do?", "which task is set up here?", "what is the robot's job in this scene?"),
    "object": (
        "which object is before the robot?",
        "what is there for the robot to handle?",
        "name the object in front of the robot",
    ),
    "gripper": ("is the gripper open?", "are the fingers of the gripper apart?", "does the gripper stand open?"),
    "held": ("is {object} held?", "does the gripper hold {object}?", "is {object} between the fingers?"),
    "side": (
        "is {object} left or right of the gripper?",
        "on which side of the gripper is {object}?",
        "seen from the camera, which side of the gripper is {object} on?",
    ),
    "cell": (
        "in which cell of the {grid} by {grid} grid is {object}?",
        "where is {object}, by row and column of {grid}?",
        "name the row and the column of {object} in the {grid} by {grid} grid",
    ),
    "done": (
        'is the task "{instruction}" done?',
        'the robot was told "{instruction}", has it done so?',
        'has the robot finished "{instruction}"?',
    ),
    "change": (
        "what changed since the last picture?",
        "what happened between the two pictures?",
        "compare the pictures: what is different now?",
    ),
}


@dataclass(frozen=True)
class Question:
    """images: 1, or 2 if it compares the image with an earlier one, which comes first."""

    kind: str
    question: str
    answer: str
    images: int = 1


def scene_questions(
    task: str,
    environment_state: np.ndarray,
    success: np.ndarray,
    held: np.ndarray,
    t: int,
    previous_t: int,
    rng: np.random.Generator,
) -> list[Question]:
    """The questions that can be asked about frame t of an episode, one of each kind; "describe", "task", "object" and "done"
    always can.

    environment_state: (T, 39), Meta-World's whole observation. success, held: (T,) bool, whether the task is solved and the
    object is between the fingers in that frame. previous_t: the frame that "change" compares with. rng: chooses the wording.

    Raises:
        ValueError: a task without instructions, arrays of other shapes, or frames outside the episode.
    """
    check_episode(task, environment_state, success, held, (t, previous_t))
    now, before = environment_state[t], environment_state[previous_t]
    answers = {
        "describe": description(task, now),
        "task": INSTRUCTIONS[task][0],
        "object": OBJECTS[task],
        "gripper": gripper_answer(now[OPENING]),
        "held": yes_no(held[t]) if task in GRIPPED else None,
        "side": side_answer(now),
        "cell": cell_answer(now),
        "done": yes_no(success[t]),
        "change": change_answer(before, now),
    }
    instruction = INSTRUCTIONS[task][rng.integers(len(INSTRUCTIONS[task]))]
    return [
        Question(kind, ask(kind, OBJECTS[task], instruction, rng), answer, 2 if kind == "change" else 1)
        for kind, answer in answers.items()
        if answer is not None
    ]


def check_episode(task: str, state: np.ndarray, success: np.ndarray, held: np.ndarray, frames: Sequence[int]) -> None:
    if task not in INSTRUCTIONS:
        raise UserError(f"there are no questions about {task!r}: it is not a task of Meta-World")
    if state.ndim != 2 or state.shape[1] != 39 or not state.shape[:1] == success.shape == held.shape:
        raise UserError(
            f"expected (T, 39) states with (T,) success and held, found {state.shape}, {success.shape} and {held.shape}"
        )
    if not all(0 <= frame < len(state) for frame in frames):
        raise UserError(f"expected frames in 0..{len(state) - 1}, found {', '.join(map(str, frames))}")


def ask(kind: str, thing: str, instruction: str, rng: np.random.Generator) -> str:
    phrases = PHRASES[kind]
    return phrases[rng.integers(len(phrases))].format(object=thing, instruction=instruction, grid=GRID)


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def description(task: str, state: np.ndarray) -> str:
    """The answers to the other questions in one line."""
    fingers = {"yes": "open", "no": "shut", None: "half open"}[gripper_answer(state[OPENING])]
    cell = cell_answer(state)
    place = f"in {cell}" if cell else "out of the picture"
    return f"{OBJECTS[task]} {place}, the gripper {fingers}; the robot should {INSTRUCTIONS[task][0]}"


def gripper_answer(opening: float) -> str | None:
    """Whether the gripper is open; None if the fingers are half open."""
    return "no" if opening < SHUT else "yes" if opening > OPEN else None


def side_answer(state: np.ndarray) -> str | None:
    """Whether the object is left or right of the hand in the image; None if they are nearly in one column."""
    hand, thing = project(np.stack([state[HAND], state[OBJECT]]))[:, 0]
    return None if not abs(thing - hand) > LEVEL else "left" if thing < hand else "right"


def cell_answer(state: np.ndarray) -> str | None:
    """The object's cell, rows from the top and columns from the left, both from 1; None outside the image."""
    (place,) = project(state[None, OBJECT])
    if not np.all((place >= 0) & (place < 1)):
        return None
    column, row = (place * GRID).astype(int) + 1
    return f"row {row} column {column}"


def change_answer(before: np.ndarray, now: np.ndarray) -> str | None:
    """What changed between two observations (39,); None if several things did, or too little to be certain.

    Directions are those of the image: a puck that is pushed away from the robot moves right.
    """
    opened = float(now[OPENING] - before[OPENING])
    hand, thing = project(np.stack([now[HAND], now[OBJECT]])) - project(np.stack([before[HAND], before[OBJECT]]))
    hand_distance, distance = float(np.hypot(*hand)), float(np.hypot(*thing))
    if abs(opened) > OPENING_CHANGED and distance < STILL:
        return "the gripper opened" if opened > 0 else "the gripper closed"
    if abs(opened) > OPENING_KEPT:
        return None
    if distance > MOVED:
        return motion_answer(*thing)
    if distance < STILL and hand_distance > MOVED:
        return "only the arm moved"
    return "nothing" if distance < STILL and hand_distance < STILL else None


def motion_answer(right: float, down: float) -> str | None:
    """The direction of a motion, given in image sides; None if it is nearly diagonal."""
    if abs(right) > DIAGONAL * abs(down):
        return f"the object moved {'right' if right > 0 else 'left'}"
    if abs(down) > DIAGONAL * abs(right):
        return f"the object moved {'down' if down > 0 else 'up'}"
    return None


def project(points: np.ndarray) -> np.ndarray:
    """The image positions of points (N, 3) in metres: (N, 2), x to the right and y down, 0..1 inside the image; NaN for points
    behind the camera."""
    right, down, depth = CAMERA_AXES @ (np.asarray(points, np.float64) - CAMERA_POSITION).T
    depth = np.where(depth > 0, depth, np.nan)
    return 0.5 + FOCAL_LENGTH * np.stack([right, down], 1) / depth[:, None]
