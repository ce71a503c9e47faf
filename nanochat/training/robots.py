"""Learning a policy from demonstrations: behaviour cloning of action chunks, and questions about the same pictures.

    frames -> glances ─┬─> hidden -> action head: a chunk of actions for each frame
                       ├─> hidden -> cross-entropy: an answer for each question
                       └─> auxiliary head: positions of objects

Questions and positions need the state of a simulator. The positions teach the encoder to see and are not part of the
model: a policy reads pictures, its own state, and text.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nanochat.action_heads import ActionBatch
from nanochat.actions import ACT, BINS, STATE, TARGETS
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.targets import find_targets
from nanochat.errors import UserError
from nanochat.evaluation.controls import conditions
from nanochat.metaworld.questions import (
    ENVIRONMENT_STATE,
    draw_asked,
    has_scene,
    object_positions,
    positions_from_hand,
    tokenizer_texts,
)
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.auxiliary import PositionsHead
from nanochat.training.batches import exactly_right, mask_images, reduce_gradient, with_images
from nanochat.training.distributed import first_goes_first
from nanochat.training.fingerprint import demonstrations_fingerprint
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import (
    QuestionBatch,
    action_batch,
    camera_pictures,
    check_instructions,
    check_questions,
    check_wrong_words,
    join_cameras,
    mask_cameras,
    noisy_states,
    question_batch,
    shift_pictures,
)
from nanochat.training.robot_data import check_rate, chunk_length, read_data, suited
from nanochat.training.robot_models import (
    adopted,
    check_cameras,
    check_fits,
    fields_of_data,
    fields_of_deltas,
    new_cameras,
)
from nanochat.training.statistics import MAX_PICTURES
from nanochat.training.task import (
    StepResult,
    Task,
    check_decoder,
    console,
    model_shape,
    open_recipe_encoder,
    say,
    shaped_like,
)
from nanochat.vision.pixels import to_pixels

VAL_FRAMES = 256
TEXT_FRAMES = 2000  # frames whose questions and answers the tokenizer is trained on
CHECKED_FRAMES = 500  # frames whose questions must fit the context before a run begins


class RobotTask(Task):
    """Frames of demonstrations, and where they come from a simulator, questions about them."""

    memory_advice = "lower --device-batch-size or --questions-per-step, or add --gradient-checkpointing"

    def __init__(self, recipe: Robot):
        super().__init__(recipe)
        with first_goes_first():
            self.data, self.val = read_data(recipe)
        recipe = replace(suited(recipe, self.data), chunk=chunk_length(recipe, self.data), chunk_seconds=None)
        self.recipe = recipe
        self.targets, reason = find_targets(self.data)
        if recipe.targets != "auto":
            self.targets, reason = recipe.targets, "--targets"
        check_rate(self.data, self.targets)
        other = next(name for name in TARGETS if name != self.targets)
        console.print(f"actions are {self.targets} ({reason}); if that is wrong: --targets {other}", markup=False)
        if recipe.wrong_words:
            check_wrong_words(self.data, self.targets)
        if recipe.camera_dropout and len(self.data.cameras) < 2:
            raise UserError("--camera-dropout hides some of several cameras, but one is read: leave it out")
        if has_scene(self.data):
            for data in (self.data, self.val):
                data.check_finite(ENVIRONMENT_STATE)

    def new_model(self) -> tuple[RobotGPT, Tokenizer]:
        check_decoder(self.recipe)
        recipe, tokenizer = self.recipe, make_tokenizer(self.recipe, self.data)
        encoder = open_recipe_encoder(recipe)
        config = RobotGPTConfig(
            vision_embedding_dim=recipe.glance_dim,
            map_channels=encoder.channels(recipe.layer),
            action_head=recipe.action_head,
            chunk=recipe.chunk,
            state_token_id=tokenizer.special(STATE),
            act_token_id=tokenizer.special(ACT),
            bin_token_id=tokenizer.special(BINS[0]),
            **self.fields_of_config(),
            **model_shape(recipe, tokenizer),
        )
        model = RobotGPT(config)
        model.init_weights()
        model.attach_encoder(encoder)
        return model, tokenizer

    def adopt(self, model: RobotGPT) -> RobotGPT:
        """The same weights with the scales and cameras of this data, see `robot_models.adopted`."""
        recipe, config = self.recipe, model.config
        if not isinstance(model, RobotGPT):
            raise UserError(
                f"the checkpoint {recipe.start_from} is a {type(model).__name__}, not a robot policy: choose another one"
            )
        advice = "train a new model without --start-from"
        check_fits(model, recipe.start_from, self.data, recipe.data, advice)
        self.recipe = replace(shaped_like(recipe, model), chunk=config.chunk, glance_dim=config.vision_embedding_dim)
        new = replace(config, action_head=recipe.action_head, **self.fields_of_config())
        if line := new_cameras(config.cameras, new.cameras):
            say(line)
        return adopted(model, new)

    def fields_of_config(self) -> dict:
        """The fields of a policy's config that do not come from a shape or a tokenizer."""
        recipe, found = self.recipe, fields_of_data(self.data)
        committed = recipe.committed if recipe.action_head == "continuous" else 0
        found |= {"targets": self.targets, "committed": committed}
        deltas, line = fields_of_deltas(recipe, recipe.chunk, self.targets, self.data, self.val)
        say(line)
        return found | deltas | {"camera_dropout": recipe.camera_dropout, "units": recipe.units}

    def prepare(self, model: RobotGPT, tokenizer: Tokenizer) -> None:
        name, advice = self.recipe.out or "the run", "resume it with its own data, or choose another --out"
        check_fits(model, name, self.data, self.recipe.data, advice)
        check_cameras(model, name, self.data)
        super().prepare(model, tokenizer)
        check_instructions([*self.data.by_task, *self.val.by_task], model, tokenizer)
        for data in [self.data] * bool(self.recipe.questions_per_step) + [self.val]:  # a validation asks in any case
            if has_scene(data):
                check_questions(data, CHECKED_FRAMES, model, tokenizer)
        self.steps, self.unit, config = self.recipe.steps, model.action_head.unit, model.config
        if self.recipe.scene_loss and has_scene(self.data):
            n_in = config.vision_tokens_per_image * config.vision_embedding_dim
            others = [positions_from_hand(self.data)] * (config.n_cameras - 1)
            self.auxiliary = PositionsHead(n_in, [object_positions(self.data), *others]).to(model.device)

    def describe_data(self) -> str:
        return f"{len(self.data):,} frames of {len(self.data.by_task)} tasks, {len(self.val):,} to validate"

    def learnt(self) -> dict[str, bool]:
        asked = bool(has_scene(self.data) and self.recipe.questions_per_step and self.recipe.question_loss)
        return {"questions": asked, "captions": asked, "actions": True}  # one of the questions asks for a description

    def fingerprint(self) -> dict[str, dict]:
        return {
            "training": demonstrations_fingerprint(self.data),
            "validation": demonstrations_fingerprint(self.val),
        }

    def pixel_batches(self) -> Iterator[torch.Tensor]:
        rng, size = np.random.default_rng([self.recipe.seed, 0, 1]), self.part_size
        for _ in range(-(-min(MAX_PICTURES, len(self.data)) // size)):
            images, _ = camera_pictures(self.data, self.data.draw(size, rng))
            images = shift_pictures(images, self.recipe.shift, rng)
            yield to_pixels(images, self.model.device, torch.float32).contiguous(memory_format=torch.channels_last)

    def next_commands(self, out: Path) -> list[str]:
        commands = [["eval", str(out), self.recipe.data], ["policy-server", str(out)]]
        if has_scene(self.val):
            commands.insert(1, ["rollout", str(out)])
        return [shlex.join(["nanochat", *words]) for words in commands]

    # ---- steps

    def backward(self, step: int) -> StepResult:
        """The value is the mean loss of the actions."""
        recipe, data = self.recipe, self.data
        rng = np.random.default_rng([recipe.seed, step])
        frames, asked = data.draw(recipe.images_per_step, rng), []
        if has_scene(data) and recipe.questions_per_step:
            asked = draw_asked(data, recipe.questions_per_step, rng)
        n = self.n_parts
        own = self.own_parts(step, n, purpose=2)
        return sum((self.part_gradients(frames[part::n], asked[part::n], rng) for part, rng in own), StepResult())

    def part_gradients(self, frames: list[int], asked: list[int], rng: np.random.Generator) -> StepResult:
        """Accumulate the gradients of the actions of some frames, and of a question about each of `asked`. Both losses weigh as
        much as these are of all frames and questions of a step."""
        recipe, model, data = self.recipe, self.model, self.data
        share = len(frames) / recipe.images_per_step
        actions = action_batch(data, frames, model, self.tokenizer, rng, recipe.wrong_words)
        actions = noisy_states(actions, recipe.state_noise, rng)
        tokens, about, questions = actions.targets.numel(), [], None
        if asked:
            questions = question_batch(data, asked, model, self.tokenizer, rng)
            about, tokens = questions.frames, tokens + questions.targets.numel()
        images, counts = camera_pictures(data, frames, about)
        vectors = self.see(shift_pictures(images, recipe.shift, rng), counts)  # one encoder pass for all
        seen = reduce_gradient(vectors, recipe.decoder_gradient)
        acting_on = mask_images(join_cameras(seen, counts, len(frames)), rng, recipe.blind_share)
        asked_about = mask_images(seen[len(frames) : counts[0]], rng, recipe.blind_share)
        acting = self.action_loss(actions, mask_cameras(acting_on, len(counts), rng, recipe.camera_dropout))
        loss = share * acting
        if questions is not None:
            weight = recipe.question_loss * len(asked) / recipe.questions_per_step
            loss = loss + weight * self.model.loss(self.question_hidden(questions, asked_about), questions.targets)
        if self.auxiliary is not None:
            loss = loss + share * recipe.scene_loss * self.scene_loss(vectors.split(counts), [*frames, *about])
        loss.backward()
        return StepResult(share * acting.item(), tokens, len(images))

    def see(self, images: np.ndarray, counts: list[int] | None = None) -> torch.Tensor:
        """(n, S, S, 3) uint8 -> (n, N, D) vectors, differentiable. counts: see `RobotGPT.see`."""
        pixels = to_pixels(images, self.model.device, torch.float32)
        return self.model.see(pixels.contiguous(memory_format=torch.channels_last), counts)

    def see_frames(self, data: Demonstrations, frames: list[int], n_cameras: int) -> torch.Tensor:
        """(n, K * N, D): what the first K cameras saw in these frames, as training shows it but not shifted."""
        images, counts = camera_pictures(data, frames, n_cameras=n_cameras)
        return join_cameras(self.see(images, counts), counts, len(frames))

    def scene_loss(self, vectors: Sequence[torch.Tensor], shown: list[int]) -> torch.Tensor:
        """The loss of the auxiliary head, averaged over the pictures of each camera and added up over cameras. vectors: of each
        camera, (n, N, D) of the first n frames in `shown`."""
        losses = [self.auxiliary.loss(own, shown[: len(own)], camera) / len(own) for camera, own in enumerate(vectors)]
        return sum(losses)

    def action_loss(self, batch: ActionBatch, vectors: torch.Tensor) -> torch.Tensor:
        """The mean loss of the action head. vectors: (A, K * N, D)."""
        batch = replace(batch, inputs=with_images(batch.inputs, vectors))
        return self.model.action_head.loss(self.model, self.model.hidden(batch.inputs), batch)

    def question_hidden(self, batch: QuestionBatch, vectors: torch.Tensor) -> torch.Tensor:
        """(Q, T, C). vectors: (S, N, D) of the batch's frames."""
        return self.model.hidden(with_images(batch.inputs, vectors))

    # ---- validation

    @torch.no_grad()
    def check_training(self) -> dict[str, float]:
        self.model.eval()
        frames, size, losses = self.data.draw(VAL_FRAMES, np.random.default_rng(0)), self.recipe.images_per_step, []
        for part in (frames[i : i + size] for i in range(0, VAL_FRAMES, size)):
            batch = action_batch(self.data, part, self.model, self.tokenizer, None)
            vectors = self.see_frames(self.data, part, self.model.config.n_cameras)
            losses.append(self.action_loss(batch, vectors).item())
        return {"train": float(np.mean(losses))}

    def validate(self) -> dict[str, float]:
        """The loss of the actions and the share of questions that are answered exactly right, in each condition. Shuffled takes
        the pictures of another episode."""
        rng, size = np.random.default_rng(0), self.recipe.images_per_step
        acted, asked = self.val.draw(VAL_FRAMES, rng), draw_asked(self.val, VAL_FRAMES, rng)
        starts = range(0, VAL_FRAMES, size)
        losses: dict[str, list[float]] = {}
        actions = [action_batch(self.val, acted[i : i + size], self.model, self.tokenizer, None) for i in starts]
        frames, n_cameras = [acted[i : i + size] for i in starts], self.model.config.n_cameras
        for condition, parts in self.condition_vectors(frames, n_cameras).items():
            losses[condition] = [self.action_loss(batch, v).item() for batch, v in zip(actions, parts, strict=True)]
        if has_scene(self.val):
            questions = [question_batch(self.val, asked[i : i + size], self.model, self.tokenizer, rng) for i in starts]
            for condition, parts in self.condition_vectors([batch.frames for batch in questions]).items():
                right = [self.right_answers(batch, v) for batch, v in zip(questions, parts, strict=True)]
                losses[f"{condition}_accuracy"] = right
        return {name: float(np.mean(values)) for name, values in losses.items()}

    def right_answers(self, batch: QuestionBatch, vectors: torch.Tensor) -> float:
        hidden = self.question_hidden(batch, vectors)
        return exactly_right(self.model, hidden, batch.targets).float().mean().item()

    def condition_vectors(self, batches: list[list[int]], n_cameras: int = 1) -> dict[str, tuple[torch.Tensor, ...]]:
        """{condition: the vectors (n_i, K * N, D) of each batch of frames, of the first K cameras}."""
        vectors = torch.cat([self.see_frames(self.val, frames, n_cameras) for frames in batches])
        episodes = [int(self.val.episode[frame]) for frames in batches for frame in frames]
        sizes = [len(frames) for frames in batches]
        return {name: seen.split(sizes) for name, seen in conditions(vectors, episodes).items()}


def make_tokenizer(recipe: Robot, data: Demonstrations) -> Tokenizer:
    if recipe.tokenizer:
        tokenizer = Tokenizer.load(Path(recipe.tokenizer).expanduser())
    else:
        texts = list(data.by_task)
        if has_scene(data):
            texts = tokenizer_texts(data, TEXT_FRAMES, np.random.default_rng(0))
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
    tokenizer.add_special_tokens([STATE, ACT, *BINS])
    return tokenizer
