"""What a training run learns. A task has the data, makes the model and computes the gradients of a step; `run` does the rest.

`pictures.PictureTask` learns conversations about pictures, `robots.RobotTask` demonstrations.
"""

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nanochat.checkpoint import encoder_of
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.training.distributed import parts_of
from nanochat.training.optimizers import learning_rate_factor
from nanochat.training.recipe import Recipe
from nanochat.vision.encoder import Encoder


class TrainingConsole(Console):
    def on_broken_pipe(self) -> None:
        """The reader of a pipe is gone, as in `| head`: training goes on without output."""
        self.quiet = True

    def print(self, *objects, **how) -> None:
        try:
            super().print(*objects, **how)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.quiet = True  # the terminal is gone; the SIGHUP that comes with it saves the run


console = TrainingConsole()


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is: not wrapped, since it may hold a command to copy, and without markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@dataclass
class StepResult:
    """value: the loss (or what `Task.measure` names), averaged over the step. tokens, images: how many were processed. Of a part
    of a step they are its share, so that they add up."""

    value: float = 0.0
    tokens: int = 0
    images: int = 0

    def __add__(self, other: "StepResult") -> "StepResult":
        return StepResult(self.value + other.value, self.tokens + other.tokens, self.images + other.images)


class Task:
    """A subclass reads its data in `__init__`. `Run` then calls `new_model` or `adopt`, unless it resumes a run, then `prepare`
    and `load_images`, then `backward` and `validate`.

    steps: of the whole run. reward_steps: how many of them, at the end, have learning rates of their own. unit: of the
    validation loss. auxiliary: a head for training only, or None. multi_turn: whether the model learns conversations of
    several turns. images_learnt: most pictures in one of them. memory_advice: what helps when a GPU is full.
    """

    steps: int
    reward_steps = 0
    unit = "loss (nats per token)"
    auxiliary: torch.nn.Module | None = None
    images_learnt = 1
    multi_turn = False
    memory_advice = ""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def new_model(self) -> tuple[GPT, Tokenizer]:
        """A model with random weights, and its tokenizer."""
        raise NotImplementedError

    def adopt(self, model: GPT) -> GPT:
        """The model of another checkpoint, changed to learn this data. Sets `recipe` to the shape of that model."""
        self.recipe = shaped_like(self.recipe, model)
        return model

    def fingerprint(self) -> dict[str, dict]:
        """What identifies the data, "training" and "validation", see `fingerprint.changes`. Reads the pictures' files."""
        raise NotImplementedError

    def prepare(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Everything that is cheap and needs the model: sets `model`, `tokenizer`, `steps` and `auxiliary`. Raises ValueError for
        a recipe that does not fit the data."""
        self.model, self.tokenizer = model, tokenizer

    def load_images(self) -> None:
        """What takes time before the first step."""

    def describe_data(self) -> str:
        """What is trained on, for the screen."""
        raise NotImplementedError

    def learnt(self) -> dict[str, bool]:
        """What the data teaches: "questions" about pictures, "captions" (answers to `CAPTION_PROMPT`), "actions" of a robot."""
        raise NotImplementedError

    def measure(self, step: int) -> str:
        """The name of what `backward` returns as its value at this step."""
        return "loss"

    def rate_factor(self, step: int) -> float:
        """The learning rates of a step, as a share of the peak rates."""
        return learning_rate_factor(step, self.steps, self.recipe)

    def backward(self, step: int) -> StepResult:
        """Accumulate the gradients of a step, of all of its parts that are this process's own (`own_parts`). It depends on (seed,
        step) only, so a resumed run equals an unbroken one."""
        raise NotImplementedError

    @property
    def part_size(self) -> int:
        """Pictures in memory at a time."""
        return self.recipe.device_batch_size or self.recipe.images_per_step

    @property
    def n_parts(self) -> int:
        """Parts of a step."""
        return -(-self.recipe.images_per_step // self.part_size)

    def own_parts(self, step: int, n: int, purpose: int) -> Iterator[tuple[int, np.random.Generator]]:
        """Which of the n parts of a step this process computes, each with its random numbers. torch's are set to the part's as
        well, so that dropout is the same in whichever process. purpose: tells streams of random numbers apart."""
        seed = self.recipe.seed
        for part in parts_of(n):
            torch.manual_seed(int(np.random.SeedSequence([seed, step, 4, part]).generate_state(1)[0]))
            yield part, np.random.default_rng([seed, step, purpose, part])

    def pixel_batches(self) -> Iterable[torch.Tensor]:
        """Pixels (B, 3, S, S) of training pictures as steps have them, the same at every call, for BatchNorm's statistics."""
        raise NotImplementedError

    def check_training(self) -> dict[str, float]:
        """How well the training data are learnt, after the last step: "train_right" of "train_asked" answers, or the loss
        "train". Empty where neither is measured."""
        return {}

    def next_commands(self, out: Path) -> list[str]:
        """What to run next with the checkpoint."""
        return []

    def validate(self) -> dict[str, float]:
        """Losses "aligned", "shuffled" and "blind", and the same with "_accuracy" appended where answers are counted. A
        condition that cannot be measured is missing."""
        raise NotImplementedError


def open_recipe_encoder(recipe: Recipe) -> Encoder:
    """The encoder that the recipe names, without the modules behind the layer that is read."""
    encoder = encoder_of(recipe.encoder or None)
    encoder.image_size = recipe.image_size
    return encoder.truncate(recipe.layer)


def check_decoder(recipe: Recipe) -> None:
    """Raises UserError where a new decoder would stay as it is: its output is zero, and lets no gradient pass."""
    if not recipe.train_decoder:
        raise UserError("--no-train-decoder needs a decoder that has learnt: add --start-from CHECKPOINT")


def model_shape(recipe: Recipe, tokenizer: Tokenizer) -> dict:
    """The fields of a model's config that follow from the recipe and the vocabulary."""
    return {
        "sequence_len": recipe.sequence_len,
        "vocab_size": tokenizer.vocab_size,
        "n_layer": recipe.n_layer,
        "n_head": recipe.n_head,
        "n_kv_head": recipe.n_head,
        "n_embd": recipe.n_embd,
        "vision_tokens_per_image": recipe.vision_tokens,
        "vision_token_id": tokenizer.special("<|image|>"),
        "vision_layer": recipe.layer,
        "vision_image_size": recipe.image_size,
    }


def shaped_like(recipe: Recipe, model) -> Recipe:
    """The recipe with the shape of an existing model. Raises ValueError for a text model."""
    config = model.config
    if getattr(model, "vision_encoder", None) is None:
        raise UserError(f"the checkpoint {recipe.start_from} is a text model without an encoder: choose another one")
    return replace(
        recipe, layer=config.vision_layer, image_size=config.vision_image_size, vision_tokens=config.vision_tokens_per_image,
        vocab_size=config.vocab_size, sequence_len=config.sequence_len, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd,
    )  # fmt: skip


def set_training(model: GPT, recipe: Recipe) -> None:
    """Training mode, except what must not change: a frozen encoder, and the statistics of a pretrained one."""
    model.train()
    model.gradient_checkpointing = recipe.gradient_checkpointing
    model.dropout = recipe.dropout
    if not recipe.train_encoder:
        model.vision_encoder.eval()
        return
    for module in model.vision_encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and (
            recipe.batchnorm == "frozen" or not module.weight.requires_grad
        ):
            module.eval()


def set_trainable(model: GPT, recipe: Recipe) -> None:
    """Only what the recipe names gets gradients: the projector and the cross-attention always, the decoder, the encoder from a
    layer on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.train_decoder or model.is_projector(name))
    encoder = model.vision_encoder
    encoder.requires_grad_(False)
    if recipe.train_encoder:
        for parameter in encoder.parameters_from(recipe.train_encoder_from):
            parameter.requires_grad_(True)
