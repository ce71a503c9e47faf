"""Batches of demonstrations as tensors: rows whose actions are learnt, and questions with their answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.action_heads import ActionBatch
from nanochat.conversation import action_message, render
from nanochat.data.demonstrations import Demonstrations
from nanochat.gpt import Inputs
from nanochat.metaworld.questions import paraphrase, question, question_messages
from nanochat.robot_gpt import RobotGPT
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import Row, padded, row_inputs


@dataclass
class QuestionBatch:
    """inputs: of (Q, T) tokens, without images. targets: (Q, T) int64, shifted, -1 where nothing is learnt. frames: (S,) those of
    the pictures, row by row; a row has one or two."""

    inputs: Inputs
    targets: torch.Tensor
    frames: list[int]


def action_batch(
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator | None
) -> ActionBatch:
    """One row per frame, on the model's device, without images (see `batches.with_images`). rng chooses paraphrases of the
    instructions; without it, each is the first paraphrase."""
    actions, inside = data.chunks(frames, model.config.chunk)
    prompts = [action_prompt(tokenizer, paraphrase(data.task(frame), rng), model) for frame in frames]
    idx, targets = padded([Row(*row) for row in model.action_head.rows(prompts, actions, inside)])
    states = None if model.state_scale is None else torch.from_numpy(model.state_scale.normalize(data.state[frames]))
    chunks = torch.from_numpy(model.action_scale.normalize(actions))
    inputs, device = row_inputs(model, idx, states=states), model.device
    return ActionBatch(inputs, targets.to(device), chunks.to(device), torch.from_numpy(inside).to(device))


def action_prompt(tokenizer: Tokenizer, instruction: str, model: RobotGPT) -> list[int]:
    messages = [action_message(instruction)]
    return render(tokenizer, messages, model.config.vision_tokens_per_image, for_completion=True).ids


def question_batch(
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator
) -> QuestionBatch:
    """One question about each frame, with its answer, on the model's device."""
    rows, shown = [], []
    for frame in frames:
        pictures, asked, answer = question(data, frame, rng)
        messages = question_messages(asked, answer, len(pictures))
        rows.append(render(tokenizer, messages, model.config.vision_tokens_per_image))
        shown += pictures
    idx, targets = padded(rows)
    return QuestionBatch(row_inputs(model, idx), targets.to(model.device), shown)


def shift_pictures(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """(n, S, S, 3): each picture shifted by up to `most` pixels along both axes, its border repeated (DrQ, arXiv 2004.13649)."""
    if most == 0:
        return images
    size = images.shape[1]
    padded_images = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    offsets = rng.integers(0, 2 * most + 1, size=(len(images), 2))
    return np.stack(
        [picture[y : y + size, x : x + size] for picture, (y, x) in zip(padded_images, offsets, strict=True)]
    )
