"""Demonstrations as training sees them: every frame of every episode, its action chunk, and questions about it."""

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from nanochat.conversation import Rendered, render
from nanochat.data.columns import png
from nanochat.data.lerobot import Episode, EpisodeInfo
from nanochat.data.sample import vqa_sample
from nanochat.gpt import IGNORE_INDEX
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.scene import Question, scene_questions
from nanochat.robot_gpt import RobotGPT, action_prompt
from nanochat.tokenizer import Tokenizer
from nanochat.vision.images import letterbox, open_image

WIDE = ("action", "observation.state")  # LeRobot gives a single number a frame as (T,)
END = 25  # frames at an episode's end, from which half of the questions are drawn: "done" is rare elsewhere


class Frames:
    """All frames of some episodes. Pictures are letterboxed to `size` and stay encoded until they are needed: at 128 pixels,
    20 kB a frame instead of 50.

    state (n, S), action (n, A) float32. first, last (n,): the episode's own range of frames. tasks: for each episode its
    name in `INSTRUCTIONS`, or the instruction itself for other robots. environment_state, success, held: None where the
    data does not have them; then no questions are asked about the scene.

    Raises ValueError where there are no episodes, or they have no camera or no actions.
    """

    def __init__(self, episodes: Iterable[Episode], size: int):
        parts: dict[str, list] = {}
        self.pictures: list[bytes] = []
        self.episode_tasks: list[str] = []
        lengths = []
        for episode in episodes:
            if "action" not in episode.columns or not episode.images:
                found = ", ".join([*episode.columns, *episode.images])
                raise ValueError(f'learning to act takes a camera and a column "action", and the data has {found}')
            self.pictures += [encoded(picture, size) for picture in next(iter(episode.images.values()))]
            self.episode_tasks.append(task_of(episode))
            lengths.append(len(episode.columns["action"]))
            for key, values in episode.columns.items():
                parts.setdefault(key, []).append(values[:, None] if values.ndim == 1 and key in WIDE else values)
        if not lengths:
            raise ValueError("there are no episodes to learn from")
        columns = {key: np.concatenate(values) for key, values in parts.items()}
        self.action = columns["action"].astype(np.float32)
        # a robot that does not tell its state has one number, which is always the same
        self.state = columns.get("observation.state", np.zeros((len(self.action), 1))).astype(np.float32)
        self.environment_state = columns.get("observation.environment_state")
        self.success, self.held = columns.get("observation.success"), columns.get("observation.held")
        ends = np.cumsum(lengths)
        self.episode = np.repeat(np.arange(len(lengths)), lengths)
        self.first, self.end = (ends - lengths)[self.episode], ends[self.episode]
        self.by_task: dict[str, list[tuple[int, int]]] = {}
        for task, end, length in zip(self.episode_tasks, ends.tolist(), lengths, strict=True):
            self.by_task.setdefault(task, []).append((end - length, end))

    def __len__(self) -> int:
        return len(self.state)

    @property
    def has_scene(self) -> bool:
        return self.environment_state is not None and self.success is not None and self.held is not None

    def task(self, frame: int) -> str:
        return self.episode_tasks[self.episode[frame]]

    def draw(self, n: int, rng: np.random.Generator, last: int | None = None) -> list[int]:
        """n frames: every task as likely as any other, and so is every episode of a task. last: of the episode's end only."""
        names, frames = list(self.by_task), []
        for task in rng.integers(len(names), size=n):
            episodes = self.by_task[names[task]]
            first, end = episodes[rng.integers(len(episodes))]
            frames.append(int(rng.integers(max(first, end - last) if last else first, end)))
        return frames

    def draw_asked(self, n: int, rng: np.random.Generator) -> list[int]:
        """n frames to ask about."""
        return self.draw(n // 2, rng) + self.draw(n - n // 2, rng, last=END)

    def images(self, frames: Sequence[int]) -> np.ndarray:
        """(n, S, S, 3) uint8."""
        return np.stack([np.asarray(Image.open(io.BytesIO(self.pictures[frame])).convert("RGB")) for frame in frames])

    def chunks(self, frames: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, length, A) actions from each frame on, and (n, length) bool: False behind the episode's end."""
        index = np.asarray(frames)[:, None] + np.arange(length)
        inside = index < self.end[frames][:, None]
        return self.action[np.where(inside, index, self.end[frames][:, None] - 1)], inside

    def questions(self, frame: int, rng: np.random.Generator) -> list[tuple[list[int], Question]]:
        """(frames, question) for each kind that can be asked about the frame, or about it and an earlier one."""
        first, rows = self.first[frame], slice(self.first[frame], self.end[frame])
        earlier = max(first, frame - int(rng.integers(5, 25)))
        found = scene_questions(
            self.task(frame), self.environment_state[rows], self.success[rows], self.held[rows],
            frame - first, earlier - first, rng,
        )  # fmt: skip
        return [([earlier, frame] if q.images == 2 else [frame], q) for q in found]

    def question(self, frame: int, rng: np.random.Generator) -> tuple[list[int], str, str]:
        """(frames, question, answer): one of them."""
        found = self.questions(frame, rng)
        frames, asked = found[rng.integers(len(found))]
        return frames, asked.question, asked.answer


@dataclass
class ActionBatch:
    """idx, targets (A, T); states (A, S) and chunks (A, chunk, D), normalised; inside (A, chunk): what is to be learnt."""

    idx: torch.Tensor
    targets: torch.Tensor
    states: torch.Tensor
    chunks: torch.Tensor
    inside: torch.Tensor


@dataclass
class QuestionBatch:
    """idx, targets (Q, T); frames: those of the pictures, row by row; counts: pictures in each row."""

    idx: torch.Tensor
    targets: torch.Tensor
    frames: list[int]
    counts: list[int]


def action_batch(
    data: Frames, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator | None
) -> ActionBatch:
    """Rows to act on, a frame each. rng chooses paraphrases; without it, every instruction is the first of its kind."""
    config, rows = model.config, []
    actions, inside = data.chunks(frames, config.chunk)
    bins = model.action_scale.to_bins(actions).reshape(len(frames), -1) + config.bin_token_id
    for frame, spoken in zip(frames, bins.tolist(), strict=True):
        ids = action_prompt(tokenizer, instruction(data.task(frame), rng), config.vision_tokens_per_image)
        if config.action_head == "continuous":
            rows.append(Rendered([*ids, config.act_token_id], [0] * (len(ids) + 1), 1))
        else:  # what is behind an episode's end is not learnt
            learnt = np.repeat(inside[len(rows)], config.action_dim).astype(int).tolist()
            rows.append(Rendered(ids + spoken, [0] * len(ids) + learnt, 1))
    states = torch.from_numpy(model.state_scale.normalize(data.state[frames]))
    chunks = torch.from_numpy(model.action_scale.normalize(actions))
    return ActionBatch(*collate(rows), states, chunks, torch.from_numpy(inside))


def question_batch(
    data: Frames, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator
) -> QuestionBatch:
    """Rows to answer, one question about each frame."""
    rows, pictures, counts = [], [], []
    for frame in frames:
        seen, question, answer = data.question(frame, rng)
        messages = question_messages(question, answer, len(seen))
        rows.append(render(tokenizer, messages, model.config.vision_tokens_per_image))
        pictures += seen
        counts.append(len(seen))
    return QuestionBatch(*collate(rows), pictures, counts)


def encoded(picture: bytes, size: int) -> bytes:
    """The picture in a square of `size` pixels, as a file."""
    with suppress(OSError), Image.open(io.BytesIO(picture)) as image:  # a broken one is named by open_image
        if image.size == (size, size):
            return picture
    return png(letterbox(open_image(picture), size)[0])


def task_of(episode: Episode | EpisodeInfo) -> str:
    """The name of a task that has paraphrases and questions, else its instruction."""
    name = episode.extra.get("name")
    return name if name in INSTRUCTIONS else episode.task


def instruction(task: str, rng: np.random.Generator | None) -> str:
    """A paraphrase of a known task, the first one without rng; for any other, the words that the data has."""
    known = INSTRUCTIONS.get(task, (task,))
    return known[0 if rng is None else rng.integers(len(known))]


def question_messages(question: str, answer: str, n_images: int) -> list[dict]:
    (message, said) = vqa_sample(b"", question, answer).messages
    return [{"role": "user", "content": [{"type": "image"}] * (n_images - 1) + message["content"]}, said]


def collate(rows: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole rows, padded on the right, (R, T), and targets: position t is to say what stands at t + 1."""
    length = max(len(row.ids) for row in rows)
    idx = torch.zeros((len(rows), length), dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORE_INDEX)
    for line, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        idx[line, : len(ids)] = ids
        targets[line, : len(ids) - 1] = ids[1:].masked_fill(~torch.tensor(row.mask[1:], dtype=torch.bool), IGNORE_INDEX)
    return idx, targets


def shift_pictures(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """(n, S, S, 3): each picture moved by up to `most` pixels along both axes, its border repeated (DrQ, arXiv 2004.13649)."""
    if most == 0:
        return images
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    moves = rng.integers(0, 2 * most + 1, size=(len(images), 2))
    return np.stack([picture[y : y + size, x : x + size] for picture, (y, x) in zip(padded, moves, strict=True)])
