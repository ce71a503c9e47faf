"""Questions and paraphrases for demonstrations that were recorded in Meta-World.

Everything that training needs to know about Meta-World's tasks and its 39 numbers is here and in `scene`.
"""

from collections.abc import Sequence

import numpy as np

from nanochat.conversation import user_message
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode, EpisodeInfo
from nanochat.metaworld.instructions import INSTRUCTIONS, OBJECTS
from nanochat.metaworld.scene import OBJECT_POSITIONS, PHRASES, Question, scene_questions

# Columns that only the simulator can fill.
ENVIRONMENT_STATE = "observation.environment_state"
SUCCESS = "observation.success"
HELD = "observation.held"
SCENE_COLUMNS = (ENVIRONMENT_STATE, SUCCESS, HELD)
LAST_FRAMES = 25  # half of the questions are about the end of an episode: elsewhere the task is rarely done
FRAMES_BACK = (5, 25)  # how far "what changed?" looks back: at least, below


def task_name(episode: Episode | EpisodeInfo) -> str:
    """The task's name in `INSTRUCTIONS` if the episode has one, else its instruction."""
    name = episode.extra.get("name")
    return name if name in INSTRUCTIONS else episode.task


def paraphrase(task: str, rng: np.random.Generator | None) -> str:
    """An instruction for a task as `task_name` names it. A random paraphrase for a task in `INSTRUCTIONS` (the first one
    without rng); any other task is its own instruction."""
    known = INSTRUCTIONS.get(task, (task,))
    return known[0 if rng is None else rng.integers(len(known))]


def has_scene(demos: Demonstrations) -> bool:
    """Whether the demonstrations hold the simulator's state, from which questions are answered."""
    return all(column in demos.columns for column in SCENE_COLUMNS)


def object_positions(demos: Demonstrations, frames: Sequence[int] | slice = slice(None)) -> np.ndarray:
    """(n, 12) float32: hand, object, second object and goal of each of the frames (all by default), x, y, z in metres."""
    return demos.columns[ENVIRONMENT_STATE][frames][:, OBJECT_POSITIONS]


def positions_from_hand(demos: Demonstrations) -> np.ndarray:
    """(n, 9) float32: object, second object and goal of each frame as seen from the hand, along the axes of the world. A camera
    that moves with the hand can tell no others."""
    positions = object_positions(demos).reshape(-1, 4, 3)
    return (positions[:, 1:] - positions[:, :1]).reshape(-1, 9)


def draw_asked(demos: Demonstrations, n: int, rng: np.random.Generator) -> list[int]:
    """n random frames to ask about, half of them from the ends of episodes."""
    return demos.draw(n // 2, rng) + demos.draw(n - n // 2, rng, last=LAST_FRAMES)


def questions(demos: Demonstrations, frame: int, rng: np.random.Generator) -> list[tuple[list[int], Question]]:
    """All questions about a frame, one of each kind, as (frames to show, question). There are two frames, the earlier one
    first, where the question compares them. Raises ValueError for a task that is not in `INSTRUCTIONS`."""
    first, rows = demos.first[frame], slice(demos.first[frame], demos.end[frame])
    earlier = max(first, frame - int(rng.integers(*FRAMES_BACK)))
    state, success, held = (demos.columns[column][rows] for column in SCENE_COLUMNS)
    found = scene_questions(demos.task(frame), state, success, held, frame - first, earlier - first, rng)
    return [([earlier, frame] if q.images == 2 else [frame], q) for q in found]


def question(demos: Demonstrations, frame: int, rng: np.random.Generator) -> tuple[list[int], str, str]:
    """One random question about a frame: (frames to show, question, answer)."""
    found = questions(demos, frame, rng)
    frames, asked = found[rng.integers(len(found))]
    return frames, asked.question, asked.answer


def question_messages(question: str, answer: str, n_images: int) -> list[dict]:
    """A user message with `n_images` images and the question, and the assistant's answer."""
    return [user_message(question, n_images), {"role": "assistant", "content": answer}]


def tokenizer_texts(demos: Demonstrations, n: int, rng: np.random.Generator) -> list[str]:
    """Texts to train a tokenizer on: all instructions, objects and phrases of Meta-World, so that a model can learn further
    tasks later, and questions and answers about n frames."""
    texts = [*OBJECTS.values(), *(text for known in INSTRUCTIONS.values() for text in known)]
    texts += [phrase for phrases in PHRASES.values() for phrase in phrases]
    for frame in draw_asked(demos, n, rng):
        texts += question(demos, frame, rng)[1:]
    return texts
