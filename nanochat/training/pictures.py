"""Learning conversations about pictures: questions and answers, captions.

    samples -> rows of tokens ─┐
    pictures -> vision vectors ┴─> hidden -> cross-entropy of the answers

Validation has three conditions: the right picture (aligned), another one (shuffled), none (blind). Where they agree, the
model does not use the pictures.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress

from nanochat.cache import cache_folder
from nanochat.data import CAPTION_PROMPT, Sample, load_dataset, one_per_reference
from nanochat.data.image_files import check_decodable
from nanochat.data.sample import limit
from nanochat.devices import pick_device
from nanochat.errors import UserError
from nanochat.evaluation.controls import conditions
from nanochat.gpt import IGNORE_INDEX
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.auxiliary import AnswerTokensHead, answer_tokens
from nanochat.training.batches import (
    Batch,
    CachedVectors,
    EncodedVectors,
    Row,
    Rows,
    exactly_right,
    group_numbers,
    is_caption,
    make_batch,
    mask_rows,
    mask_tokens,
    reduce_gradient,
    row_inputs,
    texts_of,
)
from nanochat.training.caption_reward import CaptionReward
from nanochat.training.distributed import first_goes_first
from nanochat.training.features import cached_features
from nanochat.training.fingerprint import samples_fingerprint
from nanochat.training.optimizers import learning_rate_factor
from nanochat.training.recipe import PictureRecipe
from nanochat.training.rewards import check_context, sample_captions
from nanochat.training.statistics import picture_batches
from nanochat.training.task import StepResult, Task, check_decoder, console, model_shape, open_recipe_encoder, say
from nanochat.vision.images import ImageError

ROWS_AT_ONCE = 128  # of a validation: a picture may have any number of them


class PictureTask(Task):
    """Conversations about pictures. Last, where the recipe has reward steps, captions of the model's own and their reward."""

    memory_advice = (
        "lower --device-batch-size (the gradients stay the same), add --gradient-checkpointing, move the encoder with "
        "--encoder-device cpu, or use fewer --vision-tokens"
    )

    def __init__(self, recipe: PictureRecipe):
        super().__init__(recipe)
        sources = (recipe.data, *recipe.also)
        train_sets = [load_dataset(source, recipe.train_split, recipe.strict) for source in sources]
        val_sets = [load_dataset(source, recipe.val_split, recipe.strict) for source in dict.fromkeys(sources)]
        for note in dict.fromkeys(
            note for data in train_sets + val_sets for note in data.notes
        ):  # the same if one is cut
            say(note)
        self.samples, self.sources = [], []
        for number, data in enumerate(train_sets):
            samples = one_per_reference(data.samples)
            self.samples += samples
            self.sources += [number] * len(samples)
        self.val_samples = [sample for data in val_sets for sample in data.samples]
        self.limited = [  # of each dataset its share of the validation
            sample for data in val_sets for sample in limit(one_per_reference(data.samples), 5 * recipe.val_images)
        ]
        self.images_learnt = max(len(sample.images) for sample in self.samples)
        self.reward_steps = recipe.reward_steps
        if recipe.reward_steps:
            check_reward(recipe, self.samples)
            captioned = (sample for data in train_sets for sample in data.samples if is_caption(sample))
            self.caption_reward = CaptionReward([sample.references for sample in captioned])

    def new_model(self) -> tuple[MultimodalGPT, Tokenizer]:
        recipe = self.recipe
        check_decoder(recipe)
        if recipe.tokenizer:
            tokenizer = Tokenizer.load(Path(recipe.tokenizer).expanduser())
        else:
            tokenizer = Tokenizer.train(chain.from_iterable(map(texts_of, self.samples)), recipe.vocab_size)
        encoder = open_recipe_encoder(recipe)
        channels = encoder.channels(recipe.layer)
        model = MultimodalGPT(
            MultimodalGPTConfig(vision_embedding_dim=channels, fusion=recipe.fusion, **model_shape(recipe, tokenizer))
        )
        model.init_weights()
        model.attach_encoder(encoder)
        return model, tokenizer

    def adopt(self, model: MultimodalGPT) -> MultimodalGPT:
        model = super().adopt(model)
        self.recipe = replace(self.recipe, fusion=model.config.fusion)
        return model

    def prepare(self, model: MultimodalGPT, tokenizer: Tokenizer) -> None:
        super().prepare(model, tokenizer)
        recipe = self.recipe
        self.rows = Rows(self.samples, tokenizer, model.config, self.sources)
        self.val_rows = Rows(self.limited, tokenizer, model.config)
        if self.reward_steps:
            check_context([rows for rows in self.rows.groups if rows[0].caption], model.config.sequence_len)
        self.multi_turn = self.rows.multi_turn
        of_epochs = math.ceil(recipe.epochs * len(self.rows.groups) / recipe.images_per_step)
        self.imitation_steps = recipe.steps or max(of_epochs, recipe.min_steps)
        self.steps = self.imitation_steps + self.reward_steps
        self.unknown_id = tokenizer.special("<|bos|>")  # replaces dropped tokens; elsewhere it only begins a row
        if recipe.encoder_device:
            model.vision_encoder.to(pick_device(recipe.encoder_device))
        if recipe.train_encoder and recipe.word_loss:
            config, tokens = model.config, answer_tokens(self.rows)
            head = AnswerTokensHead(config.vision_embedding_dim, config.vocab_size, tokens)
            self.auxiliary = head.to(model.device)

    def load_images(self) -> None:
        """Decode all pictures now, so that a damaged one is found before the first step; or the features of a frozen encoder."""
        try:
            self.make_vectors()
        except ImageError:
            for rows in (self.rows, self.val_rows):  # names the row
                check_decodable(zip(rows.images, rows.image_rows, strict=True))
            raise

    def make_vectors(self) -> None:
        recipe, encoder = self.recipe, self.model.vision_encoder
        if recipe.train_encoder:
            encoder.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, twice as fast in bfloat16
            memory = recipe.picture_memory * 1e9
            self.val_vectors = EncodedVectors(self.model, self.val_rows, memory)
            memory -= self.val_vectors.n_bytes
            self.vectors = EncodedVectors(self.model, self.rows, memory, recipe.flip, recipe.jitter)
            decode_all([self.vectors, self.val_vectors])
            self.say_what_is_kept()
            return
        if recipe.encoder.lower().endswith((".yaml", ".yml")) and not recipe.start_from:
            console.print(
                "[yellow]The encoder has random weights and is not trained, so its vision vectors hold little information. "
                "Use --train-encoder --batchnorm train, or --encoder with weights.[/yellow]"
            )
        folder = cache_folder("features", recipe.cache)
        dtype = self.model.compute_dtype
        self.model.set_compute_dtype(torch.float32)  # the encoder runs once, so its vectors may cost a little more
        with first_goes_first():
            self.vectors = compute_features(self.model, self.rows, folder, recipe.flip != "none")
            self.val_vectors = compute_features(self.model, self.val_rows, folder)
        self.model.set_compute_dtype(dtype)

    def say_what_is_kept(self) -> None:
        n, kept = len(self.vectors.images), self.vectors.n_kept
        if kept < n:
            needed = 3 * self.recipe.image_size**2 * n / 1e9
            say(
                f"{kept} of {n} training pictures fit into --picture-memory {self.recipe.picture_memory:g} GB and stay decoded; "
                f"the others are decoded again in every epoch (all of them need {needed:.2g} GB)"
            )

    def fingerprint(self) -> dict[str, dict]:
        return {
            "training": samples_fingerprint(self.samples, self.rows.images),
            "validation": samples_fingerprint(self.val_samples, self.val_rows.images),
        }

    def pixel_batches(self) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 0, 3])
        for numbers in picture_batches(len(self.rows.images), self.part_size, rng):
            yield self.vectors.pixels(numbers, rng)

    def next_commands(self, out: Path) -> list[str]:
        sample = self.val_samples[0]
        picture = sample.images[0] if sample.images and isinstance(sample.images[0], (str, Path)) else "PICTURE"
        words = ["ask", picture, sample.question]
        if sample.question == CAPTION_PROMPT:
            words = ["caption", picture]
        commands = [[*words, "--checkpoint", out], ["eval", out, self.recipe.data, "--split", self.recipe.val_split]]
        if self.recipe.start_from:  # the mean often forgets less: docs/MULTIMODAL.md
            commands.append(["average", self.recipe.start_from, out, "-o", f"{out}-mean"])
        return [shlex.join(["nanochat", *map(str, command)]) for command in commands]

    def describe_data(self) -> str:
        shown = len(self.rows.images)
        return f"{len(self.samples)} conversations about {shown} pictures, {len(self.val_rows.images)} to validate"

    def learnt(self) -> dict[str, bool]:
        asked = {sample.question == CAPTION_PROMPT for sample in self.samples}
        return {"questions": False in asked, "captions": True in asked, "actions": False}

    # ---- steps

    def is_reward_step(self, step: int) -> bool:
        """Whether the step follows the reward (see rewards.py) instead of the data's answers."""
        return step >= self.imitation_steps

    def measure(self, step: int) -> str:
        return "reward" if self.is_reward_step(step) else "loss"

    def rate_factor(self, step: int) -> float:
        """The rates of a whole run for imitation, then far lower ones, which only fall, for the reward."""
        if self.is_reward_step(step):
            return self.recipe.reward_lr * (self.steps - step) / self.reward_steps
        return learning_rate_factor(step, self.imitation_steps, self.recipe)

    def backward(self, step: int) -> StepResult:
        """The value is the loss in nats per token, or the mean reward."""
        recipe, rewarded = self.recipe, self.is_reward_step(step)
        n_rows = None if rewarded else recipe.questions_per_image
        groups = self.rows.step(step, recipe.images_per_step, n_rows, recipe.seed)
        if not rewarded:
            return self.imitation_gradients(self.parts(groups), step)
        # captions follow the reward; questions are learnt as before, so that they are not forgotten, but not by the encoder
        questions = [rows[: recipe.questions_per_image] for rows in groups if not rows[0].caption]
        if questions:
            self.model.vision_encoder.eval()  # with BatchNorm's statistics as they are
            self.imitation_gradients(self.parts(questions), step, encoder_learns=False)
        return self.reward_gradients(self.parts([rows for rows in groups if rows[0].caption]), step)

    def parts(self, groups: list[list[Row]]) -> list[list[list[Row]]]:
        """The parts of a step: groups of rows that are in memory together."""
        return [groups[i : i + self.part_size] for i in range(0, len(groups), self.part_size)]

    def imitation_gradients(self, parts: list[list[list[Row]]], step: int, encoder_learns: bool = True) -> StepResult:
        """parts: all parts of the step; gradients come from this process's own ones."""
        batches = [make_batch([row for rows in part for row in rows]) for part in parts]
        # of the whole step, so that every token and every picture has the same weight
        n_learnt = max(1, sum(batch.n_learnt for batch in batches))
        n_images = max(1, sum(len(batch.numbers) for batch in batches))
        total = StepResult()
        for part, rng in self.own_parts(step, len(batches), purpose=2):
            batch = batches[part]
            answers, auxiliary = self.losses(batch, rng, encoder_learns)
            (answers / n_learnt + self.recipe.word_loss * auxiliary / n_images).backward()
            total += StepResult(answers.item() / n_learnt, sum(batch.lengths), len(batch.numbers))
        return total

    def losses(
        self, batch: Batch, rng: np.random.Generator, encoder_learns: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Sums over a batch: cross-entropy of the answers' tokens, and the auxiliary loss of the pictures."""
        recipe, model, answers, auxiliary, vectors = self.recipe, self.model, 0.0, 0.0, None
        if batch.numbers:
            with torch.set_grad_enabled(encoder_learns):
                vectors = self.vectors(batch.numbers, rng).to(model.device)
            groups = [self.rows.image_groups[number] for number in batch.numbers]
            vectors = drop_features(vectors, groups, recipe.feature_dropout)
            if self.auxiliary is not None:
                auxiliary = self.auxiliary.loss(vectors, batch.numbers)
            vectors = reduce_gradient(vectors, recipe.decoder_gradient)
            vectors, batch = mask_rows(vectors, batch, rng, recipe.blind_share)
        idx = mask_tokens(batch.idx, rng, recipe.word_dropout, self.tokenizer.special_ids, self.unknown_id)
        for part in replace(batch, idx=idx).by_length():
            shown = vectors if len(part.slots) else None
            hidden = model.hidden(row_inputs(model, part.idx, shown, shown=part.slots))
            answers += model.loss(hidden, part.targets.to(model.device), "sum", recipe.label_smoothing)
        return answers, auxiliary

    def reward_gradients(self, parts: list[list[list[Row]]], step: int) -> StepResult:
        """Sampled captions, each weighted by its advantage. The encoder is not trained. parts: as for imitation."""
        model, n_samples = self.model, self.recipe.questions_per_image
        n_images, total = max(1, sum(map(len, parts))), StepResult()
        for number, rng in self.own_parts(step, len(parts), purpose=5):
            part = parts[number]
            model.eval()  # with BatchNorm's statistics as they are
            with torch.no_grad():
                vectors = self.vectors([rows[0].images[0] for rows in part], rng).to(model.device)
            seed = int(rng.integers(2**31))
            rows, advantages, reward = sample_captions(
                model, self.tokenizer, part, vectors, n_samples, seed, self.caption_reward
            )
            batch = make_batch(rows)
            shown = torch.arange(len(part)).repeat_interleave(n_samples)
            hidden = model.hidden(row_inputs(model, batch.idx, vectors, shown=shown))
            nats = model.loss(hidden, batch.targets.to(model.device), "none").view(batch.idx.shape).sum(1)
            ((nats * advantages.to(model.device)).sum() / (n_images * n_samples)).backward()
            total += StepResult(reward * len(part) / n_images, batch.idx.numel(), len(part))
        return total

    # ---- validation

    def validate(self) -> dict[str, float]:
        """Mean losses in nats per token, and the share of rows that greedy generation would answer exactly right."""
        return validate_rows(self.model, self.val_rows, self.val_vectors, self.recipe.images_per_step)

    @torch.no_grad()
    def check_training(self) -> dict[str, int]:
        """Of questions, in the order of the data; one with several right answers is answered right if one of them is given.
        Captions do not count: a good one is hardly ever a reference, word for word."""
        recipe = self.recipe
        asked = [rows for rows in self.rows.groups if not rows[0].caption][: recipe.val_images]
        rows = [row for group in asked for row in group]
        rows, size = rows[: 5 * recipe.val_images], recipe.images_per_step * recipe.questions_per_image
        self.model.eval()
        right: dict[tuple, bool] = {}
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            batch = make_batch(part)
            shown = batch.in_rows(self.vectors(batch.numbers)) if batch.numbers else None
            hidden = self.model.hidden(row_inputs(self.model, batch.idx, shown))
            found = exactly_right(self.model, hidden, batch.targets.to(self.model.device)).tolist()
            for row, is_right in zip(part, found, strict=True):
                question = (*row.images, *row.ids[: row.mask.index(1)])
                right[question] = right.get(question, False) or is_right
        return {"train_right": sum(right.values()), "train_asked": len(right)}


def drop_features(vectors: torch.Tensor, groups: Sequence, share: float) -> torch.Tensor:
    """Dropout of the vectors (U, N, D) of distinct pictures. Pictures of one group, those that a row shows together, lose the
    same numbers: what differs between them is to come from the pictures."""
    if not share:
        return vectors
    numbers = group_numbers(groups)
    masks = F.dropout(vectors.new_ones(max(numbers) + 1, *vectors.shape[1:]), share)
    return vectors * masks[numbers]


def validate_rows(
    model: MultimodalGPT, rows: Rows, vectors: CachedVectors | EncodedVectors, batch_size: int
) -> dict[str, float]:
    """{condition: loss in nats per token, condition + "_accuracy": share of rows that are exactly right}.

    batch_size: pictures at a time. Rows without pictures are the same in every condition.
    """
    seen = {"aligned": None, "blind": None}  # condition -> (n_images, N, D)
    if rows.images:
        numbers = list(range(len(rows.images)))
        parts = [vectors(numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]
        seen = conditions(torch.cat(parts), rows.image_groups)
    totals = {condition: np.zeros(3) for condition in seen}  # loss, exactly right rows, learnt tokens
    flat = [row for group in rows.groups for row in group]
    for start in range(0, len(flat), ROWS_AT_ONCE):
        batch = make_batch(flat[start : start + ROWS_AT_ONCE])
        targets = batch.targets.to(model.device)
        for condition, of_all in seen.items():
            shown = batch.in_rows(of_all[batch.numbers]) if batch.numbers else None
            hidden = model.hidden(row_inputs(model, batch.idx, shown))
            loss, right = model.loss(hidden, targets, "sum"), exactly_right(model, hidden, targets)
            totals[condition] += (loss.item(), right.sum().item(), (targets != IGNORE_INDEX).sum().item())
    result = {condition: total[0] / max(1, total[2]) for condition, total in totals.items()}
    return result | {f"{condition}_accuracy": total[1] / len(flat) for condition, total in totals.items()}


def decode_all(parts: Sequence[EncodedVectors]) -> None:
    """In threads: Pillow decodes without Python's lock."""
    with Progress(console=console) as progress, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        bar = progress.add_task("decoding pictures", total=sum(len(vectors.images) for vectors in parts))
        for vectors in parts:
            for _ in pool.map(vectors.square, range(len(vectors.images))):
                progress.advance(bar)


def compute_features(model: MultimodalGPT, rows: Rows, folder: Path, mirror: bool = False) -> CachedVectors:
    """mirror: also of the mirror images of the pictures that may be mirrored."""
    with Progress(console=console) as progress:
        bar = progress.add_task("encoding pictures", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        features = cached_features(model, rows.images, folder, progress=show)
        numbers, mirrored = np.flatnonzero(rows.mirrorable[:, 0]), None
        if mirror and len(numbers):
            images = [rows.images[number] for number in numbers]
            mirrored = cached_features(model, images, folder, progress=show, mirrored=True)
        progress.update(bar, completed=1, total=1)  # also where everything was cached
    mirror_of = np.full(len(rows.images), -1)
    mirror_of[numbers] = np.arange(len(numbers))
    return CachedVectors(features, rows.image_groups, mirrored, mirror_of)


def check_reward(recipe: PictureRecipe, samples: Sequence[Sample]) -> None:
    if not any(map(is_caption, samples)):
        raise UserError(
            f"--reward-steps need captions of single pictures, but {recipe.data} holds questions: use --reward-steps 0"
        )
    if recipe.questions_per_image < 2:
        raise UserError("--reward-steps compare samples for the same picture: --questions-per-image must be 2 or more")
