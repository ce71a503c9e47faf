"""Batches of demonstrations as tensors: rows to act on, and rows to answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.conversation import Rendered, render
from nanochat.data.demonstrations import Demonstrations
from nanochat.gpt import IGNORE_INDEX
from nanochat.metaworld.questions import paraphrase, question, question_messages
from nanochat.robot_gpt import RobotGPT, action_prompt
from nanochat.tokenizer import Tokenizer


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
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator | None
) -> ActionBatch:
    """Rows to act on, a frame each. rng chooses paraphrases; without it, every instruction is the first of its kind."""
    config, rows = model.config, []
    actions, inside = data.chunks(frames, config.chunk)
    bins = model.action_scale.to_bins(actions).reshape(len(frames), -1) + config.bin_token_id
    for frame, spoken in zip(frames, bins.tolist(), strict=True):
        ids = action_prompt(tokenizer, paraphrase(data.task(frame), rng), config.vision_tokens_per_image)
        if config.action_head == "continuous":
            rows.append(Rendered([*ids, config.act_token_id], [0] * (len(ids) + 1), 1))
        else:  # what is behind an episode's end is not learnt
            learnt = np.repeat(inside[len(rows)], config.action_dim).astype(int).tolist()
            rows.append(Rendered(ids + spoken, [0] * len(ids) + learnt, 1))
    states = torch.from_numpy(model.state_scale.normalize(data.state[frames]))
    chunks = torch.from_numpy(model.action_scale.normalize(actions))
    return ActionBatch(*collate(rows), states, chunks, torch.from_numpy(inside))


def question_batch(
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator
) -> QuestionBatch:
    """Rows to answer, one question about each frame."""
    rows, pictures, counts = [], [], []
    for frame in frames:
        seen, asked, answer = question(data, frame, rng)
        messages = question_messages(asked, answer, len(seen))
        rows.append(render(tokenizer, messages, model.config.vision_tokens_per_image))
        pictures += seen
        counts.append(len(seen))
    return QuestionBatch(*collate(rows), pictures, counts)


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
