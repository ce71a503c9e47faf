"""Feature distillation: an encoder learns the map of another one, its teacher (FitNets, Romero et al. 2015, arXiv 1412.6550).

    view of a picture ──┬── student ──> (N, D) ── linear ──> (N, K) ───────────────┐
                        └── teacher ──> (N, C) ── principal components ──> (N, K) ─┴─> 1 - cosine in each of the N cells

No answers are needed, only pictures: the teacher's map of a picture says far more about it than a caption. In every epoch both
see another view of each picture. The linear layer is a helper of the training; what is kept is the student, which other recipes
read with --encoder.

With --start-from, the decoder of that checkpoint goes on reading the map, as that of a pruned model does. So there is no linear
layer: the map itself shall be the teacher's, up to what lies outside of the principal components, and the loss is the squared
error in units of the teacher's variance.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from nanochat.checkpoint import encoder_of
from nanochat.data import image_key, load_dataset
from nanochat.errors import UserError
from nanochat.evaluation.controls import another_group
from nanochat.fusion import pool_to_tokens
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.auxiliary import DirectionHead, EqualHead
from nanochat.training.fingerprint import samples_fingerprint
from nanochat.training.recipes import Distill
from nanochat.training.squares import Squares
from nanochat.training.statistics import picture_batches
from nanochat.training.task import StepResult, Task, model_shape, open_recipe_encoder, say
from nanochat.training.teacher import Teacher, mixed, random_views
from nanochat.vision.images import ImageSource
from nanochat.vision.letterbox import STRIDE

MARGIN = 2  # cells by which views are smaller than the map at first
SMALLEST_FIRST, SMALLEST_LAST = 0.5, 0.8  # sides of the smallest views, of their picture's


class DistillTask(Task):
    """The student's vision vectors, one a cell, predict the teacher's map of the same view."""

    unit = "1 - cosine"
    memory_advice = "lower --device-batch-size"

    def __init__(self, recipe: Distill):
        super().__init__(recipe)
        sources = (recipe.data, *recipe.also)
        self.images = pictures_in(sources, recipe.train_split, recipe.strict)
        self.val_images = pictures_in((recipe.data,), recipe.val_split, recipe.strict)[: recipe.val_images]
        self.steps = recipe.steps

    def new_model(self) -> tuple[MultimodalGPT, Tokenizer]:
        """The student in a model whose decoder is as small as can be: it learns nothing here."""
        recipe = self.recipe
        tokenizer = Tokenizer.train([], recipe.vocab_size)
        encoder = open_recipe_encoder(recipe)
        channels = encoder.channels(recipe.layer)
        model = MultimodalGPT(MultimodalGPTConfig(vision_embedding_dim=channels, **model_shape(recipe, tokenizer)))
        model.init_weights()
        model.attach_encoder(encoder)
        return model, tokenizer

    def prepare(self, model: MultimodalGPT, tokenizer: Tokenizer) -> None:
        super().prepare(model, tokenizer)
        recipe = self.recipe
        self.teacher = Teacher(encoder_of(recipe.teacher), recipe.image_size, model.compute_dtype, model.device)
        channels = model.config.vision_embedding_dim
        if recipe.start_from and channels != self.teacher.channels:
            raise UserError(
                f"the decoder of {recipe.start_from} reads maps of {channels} channels, those of {recipe.teacher} have "
                f"{self.teacher.channels}: use --encoder {recipe.start_from} to begin with the encoder in it"
            )
        if self.teacher.side**2 != recipe.vision_tokens:
            raise UserError(
                f"the map of {recipe.teacher} has {self.teacher.side} x {self.teacher.side} cells at {recipe.image_size} pixels, "
                f"but the student gives {recipe.vision_tokens} vectors: use --vision-tokens {self.teacher.side**2}"
            )
        if recipe.start_from:
            self.unit = "squared error / variance"

    def load_images(self) -> None:
        """The teacher's principal components, from some of the pictures."""
        recipe, model = self.recipe, self.model
        model.vision_encoder.to(memory_format=torch.channels_last)
        memory = recipe.picture_memory * 1e9
        self.val_pictures = Squares(model.vision_encoder, self.val_images, memory)
        self.pictures = Squares(model.vision_encoder, self.images, memory - self.val_pictures.n_bytes)
        components = self.teacher.components(self.images, recipe.components, recipe.seed)
        channels = model.config.vision_embedding_dim
        head = EqualHead(components) if recipe.start_from else DirectionHead(channels, components)
        self.auxiliary = head.to(model.device)
        parts = self.val_parts()
        self.val_cells = torch.cat([self.teacher.cells(self.val_pictures.pixels(part)) for part in parts])

    def fingerprint(self) -> dict[str, dict]:
        return {
            "training": samples_fingerprint([], self.images),
            "validation": samples_fingerprint([], self.val_images),
        }

    def describe_data(self) -> str:
        return f"{len(self.images)} pictures, {len(self.val_images)} to validate"

    def learnt(self) -> dict[str, bool]:
        return {"questions": False, "captions": False, "actions": False}

    def next_commands(self, out: Path) -> list[str]:
        data, layer = self.recipe.data, self.recipe.layer
        if self.recipe.start_from:
            return [shlex.join(["nanochat", "train", "photos", "--data", data, "--start-from", str(out)])]
        words = ["nanochat", "train", "photos", "--data", data, "--encoder", out, "--layer", layer]
        return [shlex.join(map(str, words))]

    # ---- steps

    def views(self, numbers: Sequence[int], rng: np.random.Generator, last: bool) -> torch.Tensor:
        """A random view of each picture, (B, 3, S', S'). last: as they are at the end of the run."""
        side = self.teacher.side if last else max(1, self.teacher.side - MARGIN)
        smallest = SMALLEST_LAST if last else SMALLEST_FIRST
        pixels = random_views(self.pictures.pixels(numbers), rng, smallest, side * STRIDE)
        if not last:
            pixels = mixed(pixels, rng, self.recipe.mixed)
        return pixels.contiguous(memory_format=torch.channels_last)

    def is_last_part(self, step: int) -> bool:
        """Until the learning rates begin to fall, views are small, for half of the price. Then they are nearly whole pictures, as
        the encoder will see them; Touvron et al. 2019, arXiv 1906.06423, measure why the larger size comes last."""
        return step >= (1 - self.recipe.cooldown) * self.steps

    def backward(self, step: int) -> StepResult:
        recipe = self.recipe
        numbers = pictures_of_step(len(self.images), step, recipe.images_per_step, recipe.seed)
        n, last = self.n_parts, self.is_last_part(step)
        own = self.own_parts(step, n, purpose=2)
        return sum((self.part_gradients(numbers[part::n], last, rng) for part, rng in own), StepResult())

    def part_gradients(self, numbers: list[int], last: bool, rng: np.random.Generator) -> StepResult:
        """Accumulate the gradients of some pictures; they weigh as much as they are of those of a step."""
        pixels = self.views(numbers, rng, last)
        loss = self.auxiliary.loss(self.see(pixels), self.teacher.cells(pixels)) / self.recipe.images_per_step
        loss.backward()
        return StepResult(loss.item(), 0, len(numbers))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S', S') -> (B, cells, D) float32 vectors of the student, one for every STRIDE x STRIDE pixels."""
        dtype, layer = self.model.compute_dtype, self.recipe.layer
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            maps = self.model.vision_encoder.maps(pixels, [layer])[layer]
        return pool_to_tokens(maps.float(), (pixels.size(-1) // STRIDE) ** 2)

    def pixel_batches(self) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 0, 3])
        for numbers in picture_batches(len(self.images), self.part_size, rng):
            yield self.views(numbers, rng, last=True)

    # ---- validation

    def val_parts(self) -> list[range]:
        """The numbers of the validation pictures, as many at a time as a step has."""
        numbers, size = range(len(self.val_images)), self.recipe.images_per_step
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def validate(self) -> dict[str, float]:
        """The distance, averaged over the cells of whole pictures: to the teacher's map of the same picture ("aligned"), and to
        that of another one ("shuffled")."""
        numbers = list(range(len(self.val_images)))
        partner = another_group(numbers)
        of = {"aligned": numbers} | ({"shuffled": partner} if partner else {})
        totals = dict.fromkeys(of, 0.0)
        for part in self.val_parts():
            vectors = self.see(self.val_pictures.pixels(part))
            for condition, items in of.items():
                cells = self.val_cells[[items[number] for number in part]]
                totals[condition] += self.auxiliary.loss(vectors, cells).item()
        return {condition: total / len(numbers) for condition, total in totals.items()}


def pictures_in(sources: Sequence[str], split: str, strict: bool) -> list[ImageSource]:
    """The distinct pictures of several data sources, in their order."""
    found: dict[object, ImageSource] = {}
    for source in sources:
        data = load_dataset(source, split, strict)
        for note in data.notes:
            say(note)
        found |= {image_key(image): image for sample in data.samples for image in sample.images}
    if not found:
        raise UserError(f"there are no pictures in {', '.join(sources)}: expected at least one")
    return list(found.values())


def pictures_of_step(n: int, step: int, size: int, seed: int) -> list[int]:
    """The numbers of the pictures of a step. Every epoch is another permutation of all n pictures."""
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch, 1]).permutation(n)
        for epoch in range(positions[0] // n, positions[-1] // n + 1)
    }
    return [int(orders[position // n][position % n]) for position in positions]
