"""Training on pictures and words: a recipe in, a checkpoint folder out.

    data -> tokenizer -> model -> steps (accumulate, clip, Muon + AdamW) -> validate three ways -> checkpoint

A run validates aligned (the right picture), shuffled (another picture) and blind (none): where the three agree, nothing
has been learnt from the pictures, and the run says so.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from nanochat.assistant import resolve_checkpoint
from nanochat.checkpoint import load_checkpoint
from nanochat.data import load_dataset, one_per_reference
from nanochat.data.sample import limit
from nanochat.evaluation.validation import three_ways
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig, create_multimodal_gpt
from nanochat.tokenizer import Tokenizer
from nanochat.training.auxiliary import WordHead, answer_words
from nanochat.training.batches import Batch, FeatureEyes, Rows, TrainedEyes, collate, forget_words, hide
from nanochat.training.features import cached_features
from nanochat.training.optimizers import learning_rate_factor
from nanochat.training.recipes import PictureRecipe
from nanochat.training.rewards import tries
from nanochat.training.run import (
    DTYPES,
    Run,
    begin,
    beginning,
    check_same,
    console,
    full_gpu_explained,
    open_encoder,
    pick_device,
    set_training,
    shape_of,
    shaped_like,
    started_recipe,
    trained_parameters,
)

LESS_MEMORY = (
    "lower device_batch_size (the gradients stay the same), set gradient_checkpointing, put the encoder elsewhere with "
    "encoder_device=cpu, or use fewer vision_tokens"
)


@full_gpu_explained(LESS_MEMORY)
def train(recipe: PictureRecipe) -> Path:
    """Run a recipe to its end (or go on with it) and return the checkpoint folder.

    Raises ValueError or OSError for data, settings or folders that cannot be used, before anything is written; MemoryError
    with the options that help when the GPU is full. Ctrl-C saves and raises KeyboardInterrupt with how to go on.
    """
    out, device = begin(recipe)
    train_set = load_dataset(recipe.data, recipe.train_split, recipe.strict)
    val_set = load_dataset(recipe.data, recipe.val_split, recipe.strict)
    samples = one_per_reference(train_set.samples)
    if recipe.resume:
        model, tokenizer, before = load_checkpoint(out, device)
    elif recipe.start_from:
        model, tokenizer, training = load_checkpoint(resolve_checkpoint(recipe.start_from), device)
        recipe, before = shaped_like(recipe, model), beginning(training)
    else:
        tokenizer = open_tokenizer(recipe, samples)
        model, before = build_model(recipe, tokenizer, device), beginning()
    model.transformer.wte.to(DTYPES[recipe.dtype])

    data = Rows(samples, tokenizer, model.config)
    val = Rows(limit(one_per_reference(val_set.samples), 5 * recipe.val_images), tokenizer, model.config)
    steps = recipe.steps or math.ceil(recipe.epochs * len(data.groups) / recipe.images_per_step)
    if recipe.reward_steps:
        check_rewarded(recipe, train_set.task)
        steps += recipe.reward_steps
    if recipe.resume:
        started = started_recipe(recipe)
        # more reward may follow at any time
        lengths = (steps - recipe.reward_steps, before["steps"] - started.reward_steps)
        check_same(replace(recipe, reward_steps=started.reward_steps), started, before["step"], lengths)
    eyes, val_eyes = open_eyes(recipe, model, data, val, out)
    # splits that are cut from one file leave out the same rows
    skipped = (
        max(train_set.skipped, val_set.skipped) if recipe.train_split == "fit" else train_set.skipped + val_set.skipped
    )
    console.print(
        f"{len(samples)} conversations about {len(data.images)} pictures, {len(val.images)} to validate"
        + (f" ({skipped} rows left out: their picture is missing)" if skipped else "")
        + f"; {trained_parameters(model):,} trained parameters, vocabulary {tokenizer.vocab_size}, {steps} steps on {device}"
    )
    return PictureRun(recipe, out, model, tokenizer, data, val, steps, before, eyes, val_eyes).go()


class PictureRun(Run):
    """Conversations about pictures, and last, where the recipe says so, the model's own captions and their reward."""

    def __init__(self, recipe, out, model, tokenizer, data, val, steps, before, eyes, val_eyes):
        super().__init__(recipe, out, model, tokenizer, data, val, steps, before)
        self.eyes, self.val_eyes, self.multi_turn = eyes, val_eyes, data.multi_turn
        self.unknown_id = tokenizer.special("<|bos|>")  # which stands nowhere but at the start of a row

    def make_helper(self) -> torch.nn.Module | None:
        if not (self.recipe.train_encoder and self.recipe.word_loss):
            return None
        config = self.model.config
        words = answer_words(self.data)
        return WordHead(config.vision_embedding_dim, config.vocab_size, words).to(self.model.device)

    @property
    def rewarded(self) -> bool:
        """Whether the next step follows the reward (see rewards.py) instead of the data's answers."""
        return self.step >= self.steps - self.recipe.reward_steps

    @property
    def measure(self) -> str:
        return "reward" if self.rewarded else "loss"

    def rate_factor(self) -> float:
        """A run of its own, and behind it, for the reward, far lower rates that only fall."""
        steps = self.steps - self.recipe.reward_steps
        if self.rewarded:
            return self.recipe.reward_lr * (self.steps - self.step) / self.recipe.reward_steps
        return learning_rate_factor(self.step, steps, self.recipe)

    def train_step(self) -> tuple[float, int, int]:
        """One optimiser step. Returns the loss in nats a token (or the mean reward), the tokens and the pictures it took."""
        recipe = self.recipe
        set_training(self.model, recipe)
        n_rows = None if self.rewarded else recipe.questions_per_image
        groups = self.data.step(self.step, recipe.images_per_step, n_rows, recipe.seed)
        size = recipe.device_batch_size or len(groups)
        chunks = [groups[i : i + size] for i in range(0, len(groups), size)]
        rng = np.random.default_rng([recipe.seed, self.step, 2])
        result = self.follow_reward(chunks, rng) if self.rewarded else self.imitate(chunks, rng)
        self.update(result[0])
        return result

    def validate(self) -> dict:
        return three_ways(self.model, self.val, self.val_eyes, self.recipe.images_per_step)

    def imitate(self, chunks, rng: np.random.Generator) -> tuple[float, int, int]:
        """Accumulate the gradients of the data's answers."""
        parts = [collate([row for rows in chunk for row in rows]) for chunk in chunks]
        # of the whole step, so that micro-batches weigh by what is in them
        n_learnt = max(1, sum(part.n_learnt for part in parts))
        n_images = max(1, sum(len(part.numbers) for part in parts))
        total = 0.0
        for part in parts:
            answers, words = self.losses(part, rng)
            (answers / n_learnt + self.recipe.word_loss * words / n_images).backward()
            total += answers.item() / n_learnt
        return total, sum(part.idx.numel() for part in parts), n_images

    def follow_reward(self, chunks, rng: np.random.Generator) -> tuple[float, int, int]:
        """Accumulate the gradients of the model's own tries, weighed by how good they are. The encoder stands still."""
        device, n_tries = self.model.device, self.recipe.questions_per_image
        n_images, total, tokens = sum(map(len, chunks)), 0.0, 0
        for chunk in chunks:
            self.model.vision_encoder.eval()  # BatchNorm would learn even without gradients
            with torch.no_grad():
                vectors = self.eyes([rows[0].images[0] for rows in chunk], rng).to(device)
            seed = int(rng.integers(2**31))
            rows, advantages, reward = tries(self.model, self.tokenizer, chunk, vectors, n_tries, seed)
            batch = collate(rows)
            idx, seen = batch.idx.to(device), vectors.repeat_interleave(n_tries, 0)
            nats = self.model(
                idx, seen, idx == self.data.vision_token_id, batch.targets.to(device), loss_reduction="none"
            )
            surprise = nats.view(idx.shape).sum(1)  # minus the log-probability of each try
            ((surprise * advantages.to(device)).sum() / (n_images * n_tries)).backward()
            total, tokens = total + reward * len(chunk) / n_images, tokens + idx.numel()
        return total, tokens, n_images

    def losses(self, batch: Batch, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Sums over a batch: of the answers' tokens, and of the pictures' words."""
        device, words, vectors = self.model.device, 0.0, None
        if batch.numbers:
            vectors = self.eyes(batch.numbers, rng).to(device)
            if self.helper is not None:
                words = self.helper.loss(vectors, batch.numbers)
            share = self.recipe.decoder_gradient
            vectors = share * vectors + (1 - share) * vectors.detach()  # the same values, less gradient
        seen = hide(batch.spread(vectors), rng, self.recipe.blind_share)
        special = self.tokenizer.special_ids
        idx = forget_words(batch.idx, rng, self.recipe.word_dropout, special, self.unknown_id).to(device)
        mask = idx == self.data.vision_token_id
        answers = self.model(idx, seen, mask, batch.targets.to(device), loss_reduction="sum")
        return answers, words


def build_model(recipe: PictureRecipe, tokenizer: Tokenizer, device: torch.device) -> MultimodalGPT:
    encoder = open_encoder(recipe)
    config = MultimodalGPTConfig(
        vision_embedding_dim=encoder.channels(recipe.layer), **shape_of(recipe, tokenizer)
    )
    model = create_multimodal_gpt(config, device)
    model.init_weights()
    model.attach_encoder(encoder.to(device))
    return model


def open_eyes(recipe: PictureRecipe, model: MultimodalGPT, data: Rows, val: Rows, out: Path):
    """What turns picture numbers into vectors, for training and for validation."""
    encoder = model.vision_encoder
    encoder.to(pick_device(recipe.encoder_device) if recipe.encoder_device else model.device)
    encoder.requires_grad_(recipe.train_encoder)
    if recipe.train_encoder:
        encoder.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, twice as fast in bfloat16
        how = (recipe.layer, recipe.vision_tokens, DTYPES[recipe.dtype])
        eyes = TrainedEyes(encoder, data.images, *how, recipe.flip, recipe.jitter)
        val_eyes = TrainedEyes(encoder, val.images, *how)
        with Progress(
            console=console
        ) as progress:  # all at once: a damaged picture is to be found now and not in an hour
            bar = progress.add_task("opening every picture", total=len(data.images) + len(val.images))
            for both in (eyes, val_eyes):
                for number in range(len(both.images)):
                    both.pixels(number)
                    progress.advance(bar)
        return eyes, val_eyes
    if recipe.encoder.endswith((".yaml", ".yml")):
        console.print(
            "[yellow]This encoder has random weights and is not trained: it shows the words next to nothing. "
            "Use --train-encoder --batchnorm train, or --encoder with weights.[/yellow]"
        )
    encoder.eval()
    folder = recipe.cache or out.parent / "features"
    with Progress(console=console) as progress:
        bar = progress.add_task("looking at every picture once", total=None)
        features = [
            cached_features(
                encoder, rows.images, recipe.layer, recipe.vision_tokens, folder,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
            for rows in (data, val)
        ]  # fmt: skip
        progress.update(bar, completed=1, total=1)  # where all was on the disk already, nothing was counted
    return FeatureEyes(features[0]), FeatureEyes(features[1])


def check_rewarded(recipe: PictureRecipe, task: str) -> None:
    if task != "caption":
        raise ValueError(f"reward_steps need captions, and {recipe.data} is of questions: leave them out")
    if recipe.questions_per_image < 2:
        raise ValueError("reward_steps compare tries at the same picture: questions_per_image must be 2 or more")


def open_tokenizer(recipe: PictureRecipe, samples) -> Tokenizer:
    if recipe.tokenizer:
        return Tokenizer.load(Path(recipe.tokenizer).expanduser())
    return Tokenizer.train(texts_of(samples), recipe.vocab_size)


def texts_of(samples):
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            yield from (part["text"] for part in parts if part["type"] == "text")
