"""Batches of demonstrations as tensors: rows whose actions are learnt, and questions with their answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochat.acting import known_rows
from nanochat.action_heads import ActionBatch
from nanochat.conversation import Rendered, action_message, render
from nanochat.data.demonstrations import Demonstrations
from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.gpt import Inputs
from nanochat.metaworld.instructions import INSTRUCTIONS, tasks_elsewhere
from nanochat.metaworld.questions import draw_asked, paraphrase, question, question_messages, questions
from nanochat.robot_gpt import RobotGPT
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import Row, mask_images, padded, row_inputs

COMMITTED_SHARE = 0.25  # of training rows that begin with committed actions; most of them cost success without a delay
HIDDEN_SHARE = 0.2  # of training rows without the last actions, where a policy reads them


@dataclass
class QuestionBatch:
    """inputs: of (Q, T) tokens, without images. targets: (Q, T) int64, shifted, -1 where nothing is learnt. frames: (S,) those of
    the pictures, row by row; a row has one or two."""

    inputs: Inputs
    targets: torch.Tensor
    frames: list[int]


def action_batch(
    data: Demonstrations,
    frames: Sequence[int],
    model: RobotGPT,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None,
    wrong_words: float = 0.0,
) -> ActionBatch:
    """One row per frame, on the model's device, without images (see `batches.with_images`). rng chooses paraphrases of the
    instructions, and what is hidden and given of actions; without it, each is the first paraphrase, all actions before are shown
    and none are committed. wrong_words: the share of rows, chosen by rng, whose instruction makes no sense in the scene and whose
    actions are zero. Raises UserError for a row that does not fit the context."""
    actions, inside = data.chunks(frames, model.config.chunk)
    tasks = [data.task(frame) for frame in frames]
    if wrong_words:
        wrong = rng.random(len(frames)) < wrong_words
        tasks = [another_task(task, data, rng) if w else task for task, w in zip(tasks, wrong, strict=True)]
        actions = np.where(wrong[:, None, None], 0, actions)
    offsets, moved = model.starts(data.state[frames], previous_actions(data, frames, model, rng))
    actions = actions - offsets  # as they are predicted
    texts = [paraphrase(task, rng) for task in tasks]
    prompts = [action_prompt(tokenizer, text, model) for text in texts]
    rows = [Row(*row) for row in model.action_head.rows(prompts, actions, inside)]
    for text, prompt, row in zip(texts, prompts, rows, strict=True):
        check_action_row(text, len(prompt), len(row.ids), model)
    idx, targets = padded(rows)
    states = None if model.state_scale is None else torch.from_numpy(model.state_scale.normalize(data.state[frames]))
    chunks = torch.from_numpy(model.predicted_scale.normalize(actions))
    inputs, device = row_inputs(model, idx, states=states), model.device
    batch = ActionBatch(inputs, targets.to(device), chunks.to(device), torch.from_numpy(inside).to(device))
    return give_known(batch, model.config.committed, rng, moved) if model.config.known_rows else batch


def another_task(task: str, data: Demonstrations, rng: np.random.Generator) -> str:
    """A random task of the data whose scene differs."""
    others = tasks_elsewhere(task, data.by_task)
    return others[rng.integers(len(others))]


def give_known(
    batch: ActionBatch, most: int, rng: np.random.Generator | None, moved: np.ndarray | None = None
) -> ActionBatch:
    """The same batch in which the motions `moved` are given (see `acting.known_rows`), and of COMMITTED_SHARE of the chunks the
    first 1 to `most` actions, of none without rng. What is given is not learnt."""
    counts = np.zeros(len(batch.chunks), int)
    if rng is not None and most:
        shown = rng.random(len(counts)) < COMMITTED_SHARE
        counts[shown] = rng.integers(1, most + 1, shown.sum())
    known = torch.from_numpy(known_rows(batch.chunks.cpu().numpy(), counts, most, moved)).to(batch.chunks.device)
    learnt = torch.from_numpy(np.arange(batch.chunks.shape[1]) >= counts[:, None]).to(known.device)
    return replace(batch, inputs=replace(batch.inputs, committed=known), inside=batch.inside & learnt)


def noisy_states(batch: ActionBatch, noise: float, rng: np.random.Generator) -> ActionBatch:
    """The same batch with normal noise on the normalised states: what is learnt changes little between states that are near to
    each other. noise: its standard deviation."""
    states = batch.inputs.states
    if not noise or states is None:
        return batch
    drawn = torch.from_numpy(rng.normal(0, noise, tuple(states.shape)).astype(np.float32)).to(states.device)
    return replace(batch, inputs=replace(batch.inputs, states=states + drawn))


def previous_actions(
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, rng: np.random.Generator | None
) -> list[np.ndarray]:
    """The recorded actions (k, A) before each frame that the policy reads. rng: hides those of some rows."""
    n = model.config.previous
    hidden = rng.random(len(frames)) < HIDDEN_SHARE if n and rng is not None else np.zeros(len(frames), bool)
    return [data.before(frame, 0 if hide else n) for frame, hide in zip(frames, hidden, strict=True)]


def action_prompt(tokenizer: Tokenizer, instruction: str, model: RobotGPT) -> list[int]:
    messages = [action_message(instruction, model.config.n_cameras)]
    return render(tokenizer, messages, model.config.places_per_image, for_completion=True).ids


def question_batch(
    data: Demonstrations, frames: Sequence[int], model: RobotGPT, tokenizer: Tokenizer, rng: np.random.Generator
) -> QuestionBatch:
    """One question about each frame, with its answer, on the model's device. Raises UserError for a row that does not fit the
    context."""
    rows, shown = [], []
    for frame in frames:
        pictures, asked, answer = question(data, frame, rng)
        rows.append(question_row(tokenizer, asked, answer, len(pictures), model))
        check_question_row(asked, len(rows[-1].ids), model)
        shown += pictures
    idx, targets = padded(rows)
    return QuestionBatch(row_inputs(model, idx), targets.to(model.device), shown)


def question_row(tokenizer: Tokenizer, asked: str, answer: str, n_images: int, model: RobotGPT) -> Rendered:
    return render(tokenizer, question_messages(asked, answer, n_images), model.config.places_per_image)


# ---- do the rows fit the context?


def check_instructions(tasks: Iterable[str], model: RobotGPT, tokenizer: Tokenizer) -> None:
    """Raises UserError if the row of any paraphrase of the tasks does not fit the context."""
    texts = dict.fromkeys(text for task in tasks for text in INSTRUCTIONS.get(task, (task,)))
    prompt, text = max((len(action_prompt(tokenizer, text, model)), text) for text in texts)
    chunk = np.zeros((1, model.config.chunk, model.config.action_dim), np.float32)
    ((ids, _),) = model.action_head.rows([[0] * prompt], chunk, np.ones(chunk.shape[:2], bool))
    check_action_row(text, prompt, len(ids), model)


def check_wrong_words(data: Demonstrations, targets: str) -> None:
    """Raises UserError for data that cannot teach that a robot does not move."""
    if targets != "relative":
        raise UserError(
            f"--wrong-words needs relative actions, where zero is no motion; these are {targets}: leave it out"
        )
    alone = [task for task in data.by_task if not tasks_elsewhere(task, data.by_task)]
    if alone:
        raise UserError(
            f"--wrong-words needs instructions of other scenes, but the data have none for {short_repr(alone[0])} "
            f"({len(data.by_task)} tasks): leave it out"
        )


def check_questions(data: Demonstrations, n: int, model: RobotGPT, tokenizer: Tokenizer) -> None:
    """Raises UserError if the row of a question about one of n random frames does not fit the context."""
    rng = np.random.default_rng(0)
    found = {
        (asked.question, asked.answer, asked.images)
        for frame in draw_asked(data, n, rng)
        for _, asked in questions(data, frame, rng)
    }
    length, asked = max((len(question_row(tokenizer, *texts, model).ids), texts[0]) for texts in found)
    check_question_row(asked, length, model)


def check_action_row(instruction: str, prompt: int, row: int, model: RobotGPT) -> None:
    """prompt, row: the tokens of the prompt, and with those of the action head."""
    options = ["a smaller --chunk"] * (row - prompt > 1)  # a single token stands for a chunk of any size
    check_row(f"the instruction {short_repr(instruction)}", row, options, model)


def check_question_row(asked: str, row: int, model: RobotGPT) -> None:
    check_row(f"the question {short_repr(asked)} with its answer", row, [], model)


def check_row(what: str, n: int, options: list[str], model: RobotGPT) -> None:
    if n > model.config.sequence_len:
        options = ", ".join([f"--sequence-len {n}", *options])
        raise UserError(
            f"{what} takes {n} tokens, vision tokens included, but the context has {model.config.sequence_len}: train a new "
            f"model with {options}, fewer --vision-tokens, or a shorter text"
        )


# ---- pictures


def camera_pictures(
    data: Demonstrations, frames: Sequence[int], about: Sequence[int] = (), n_cameras: int | None = None
) -> tuple[np.ndarray, list[int]]:
    """The pictures (M, S, S, 3) uint8 of some frames, one camera after another, and how many there are of each camera. about:
    further frames, of which only the first camera is shown. n_cameras: only the first so many; None for all."""
    parts = [data.images([*frames, *about])]
    parts += [data.images(frames, camera) for camera in range(1, n_cameras or len(data.cameras))]
    return np.concatenate(parts), [len(part) for part in parts]


def join_cameras(vectors: torch.Tensor, counts: Sequence[int], n: int) -> torch.Tensor:
    """(M, N, D) vectors of `camera_pictures` -> (n, K * N, D): those of the first n frames of each camera, frame by frame."""
    return torch.stack([own[:n] for own in vectors.split(list(counts))], 1).flatten(1, 2)


def mask_cameras(vectors: torch.Tensor, n_cameras: int, rng: np.random.Generator, share: float) -> torch.Tensor:
    """(n, K * N, D) with a random share of the single cameras set to zero: the policy learns to do without them."""
    cameras = vectors.unflatten(1, (n_cameras, -1)).flatten(0, 1)  # (n * K, N, D)
    return mask_images(cameras, rng, share).view(vectors.shape)


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
