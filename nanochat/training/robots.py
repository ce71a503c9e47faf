"""Training a policy from demonstrations: behaviour cloning of action chunks, and questions about the same pictures.

    frames -> glances -> one trunk -> an action chunk for each frame (L1, or cross-entropy of bins)
                                   -> an answer for each question (cross-entropy)

Where the demonstrations come from a simulator, a linear layer also reads the places of hand, objects and goal off the
glances. It teaches the encoder to look, as words.py does for photographs, and is no part of the model: what a policy
gets is pictures, its own state, and words.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from rich.progress import track

from nanochat.actions import Scale
from nanochat.assistant import resolve_checkpoint
from nanochat.checkpoint import load_checkpoint
from nanochat.data.demonstrations import Demonstrations, open_demonstrations
from nanochat.gpt import IGNORE_INDEX
from nanochat.metaworld.questions import draw_asked, has_scene, object_positions, task_name, tokenizer_texts
from nanochat.policy import Policy
from nanochat.robot_gpt import ACT, BINS, STATE, RobotGPT, RobotGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import hide
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import ActionBatch, QuestionBatch, action_batch, question_batch, shift_pictures
from nanochat.training.run import (
    DTYPES,
    Run,
    begin,
    beginning,
    check_same,
    console,
    full_gpu_explained,
    open_encoder,
    set_training,
    shape_of,
    shaped_like,
    started_recipe,
    trained_parameters,
)

VAL_FRAMES = 256


@full_gpu_explained("lower images_per_step or questions_per_step, or set gradient_checkpointing")
def train_robot(recipe: Robot) -> Path:
    """Run the recipe to its end (or go on with it) and return the checkpoint folder. Raises as `train.train` does."""
    out, device = begin(recipe)
    data, val = read_data(recipe)
    if recipe.resume:
        model, tokenizer, before = load_checkpoint(out, device)
        check_same(recipe, started_recipe(recipe), before["step"], (recipe.steps, before["steps"]))
    else:
        if recipe.start_from:
            model, tokenizer, before = go_on_from(recipe, data, device)
            recipe = replace(
                shaped_like(recipe, model), chunk=model.config.chunk, glance_dim=model.config.vision_embedding_dim
            )
        else:
            tokenizer = make_tokenizer(recipe, data)
            model, before = build_robot(recipe, tokenizer, data).to(device), beginning()
    model.transformer.wte.to(DTYPES[recipe.dtype])
    model.vision_encoder.requires_grad_(recipe.train_encoder)
    console.print(
        f"{len(data):,} frames of {len(data.by_task)} tasks, {len(val):,} to validate; "
        f"{trained_parameters(model):,} trained parameters, vocabulary {tokenizer.vocab_size}, "
        f"{recipe.steps} steps on {device}"
    )
    return RobotRun(recipe, out, model, tokenizer, data, val, recipe.steps, before).go()


def read_data(recipe: Robot) -> tuple[Demonstrations, Demonstrations]:
    """(training, validation) demonstrations of the recipe."""
    folder = open_demonstrations(recipe.data, recipe.camera, task_name)
    if len(folder.cameras) > 1:
        console.print(f"camera {folder.camera}; the data has {', '.join(folder.cameras)}")
    reading = partial(track, description="reading episodes", console=console)
    return folder.read("fit", recipe.image_size, reading), folder.read("val", recipe.image_size, reading)


def make_tokenizer(recipe: Robot, data: Demonstrations) -> Tokenizer:
    if recipe.tokenizer:
        tokenizer = Tokenizer.load(Path(recipe.tokenizer).expanduser())
    else:
        texts = list(data.by_task)
        if has_scene(data):
            texts = tokenizer_texts(data, 2000, np.random.default_rng(0))
        tokenizer = Tokenizer.train(texts, recipe.vocab_size)
    tokenizer.add_special_tokens([STATE, ACT, *BINS])
    return tokenizer


def build_robot(recipe: Robot, tokenizer: Tokenizer, data: Demonstrations) -> RobotGPT:
    encoder = open_encoder(recipe)
    config = RobotGPTConfig(
        vision_embedding_dim=recipe.glance_dim,
        map_channels=encoder.channels(recipe.layer),
        action_head=recipe.action_head,
        chunk=recipe.chunk,
        state_scale=asdict(Scale.fit(data.state)),
        action_scale=asdict(Scale.fit(data.action)),
        state_token_id=tokenizer.special(STATE),
        act_token_id=tokenizer.special(ACT),
        bin_token_id=tokenizer.special(BINS[0]),
        **shape_of(recipe, tokenizer),
    )
    model = RobotGPT(config)
    model.init_weights()
    model.attach_encoder(encoder)
    return model


def go_on_from(recipe: Robot, data: Demonstrations, device: torch.device) -> tuple[RobotGPT, Tokenizer, dict]:
    """The weights and words of `start_from`, with the scales of other demonstrations, and another head if the recipe says so; and
    the state of the run that begins."""
    old, tokenizer, training = load_checkpoint(resolve_checkpoint(recipe.start_from), device)
    config = Policy(old, tokenizer, training).model.config
    scales = {"state_scale": Scale.fit(data.state), "action_scale": Scale.fit(data.action)}
    for name, scale in scales.items():
        if len(scale.low) != len(getattr(config, name)["low"]):
            raise ValueError(
                f"{recipe.start_from} has a {name} of {len(getattr(config, name)['low'])} numbers, and the data has "
                f"{len(scale.low)}: start anew"
            )
    model = RobotGPT(replace(config, action_head=recipe.action_head, **{k: asdict(v) for k, v in scales.items()}))
    model.init_weights()
    model.attach_encoder(old.vision_encoder)
    weights = old.state_dict()
    if recipe.action_head != config.action_head:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("action_head.")}
    model.load_state_dict(weights, strict=recipe.action_head == config.action_head)
    return model.to(device), tokenizer, beginning(training)


class SceneHead(nn.Module):
    """A linear layer from all glances at a picture to places in metres, scaled."""

    def __init__(self, data: Demonstrations, width: int):
        super().__init__()
        positions = object_positions(data)
        self.scale = Scale.fit(positions)
        self.linear = nn.Linear(width, positions.shape[1])

    def loss(self, vectors: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """Mean L1 distance. vectors: (n, N, D) of the pictures, positions: (n, 12) as `object_positions` has them."""
        targets = torch.from_numpy(self.scale.normalize(positions)).to(vectors.device)
        return F.l1_loss(self.linear(vectors.flatten(1)), targets)


class RobotRun(Run):
    """Run with frames instead of conversations."""

    @property
    def unit(self) -> str:
        bins = self.recipe.action_head == "bins"
        return "actions: nats per number" if bins else "actions: L1, in half ranges"

    def make_helper(self) -> nn.Module | None:
        if not (self.recipe.scene_loss and has_scene(self.data)):
            return None
        config = self.model.config
        head = SceneHead(self.data, config.vision_tokens_per_image * config.vision_embedding_dim)
        return head.to(self.model.device)

    def train_step(self) -> tuple[float, int, int]:
        """One optimiser step. Returns the mean loss of the actions, the tokens and the pictures."""
        recipe, model, data = self.recipe, self.model, self.data
        set_training(model, recipe)
        rng = np.random.default_rng([recipe.seed, self.step])
        frames = data.draw(recipe.images_per_step, rng)
        actions = action_batch(data, frames, model, self.tokenizer, rng)
        tokens, shown = actions.idx.numel(), list(frames)
        if has_scene(data) and recipe.questions_per_step:
            asked = draw_asked(data, recipe.questions_per_step, rng)
            questions = question_batch(data, asked, model, self.tokenizer, rng)
            shown += questions.frames
        images = shift_pictures(data.images(shown), recipe.shift, rng)
        vectors = self.look(images)  # one pass for all
        loss = torch.zeros((), device=model.device)
        if self.helper is not None:
            loss = recipe.scene_loss * self.helper.loss(vectors, object_positions(data, shown))
        share = recipe.decoder_gradient
        seen = hide(share * vectors + (1 - share) * vectors.detach(), rng, recipe.blind_share)
        acting = self.acting_loss(actions, seen[: len(frames)])
        if len(shown) > len(frames):
            answering, _ = self.answering_loss(questions, seen[len(frames) :])
            loss, tokens = loss + recipe.question_loss * answering, tokens + questions.idx.numel()
        (loss + acting).backward()
        self.update(acting.item())
        return acting.item(), tokens, len(images)

    def look(self, images: np.ndarray) -> torch.Tensor:
        """(n, S, S, 3) uint8 -> (n, N, D) glances."""
        model, dtype = self.model, DTYPES[self.recipe.dtype]
        x = torch.from_numpy(images).to(model.device).permute(0, 3, 1, 2).float() / 255
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            maps = model.vision_encoder(x.contiguous(memory_format=torch.channels_last), model.config.vision_layer)
        return model.pool(maps)

    def acting_loss(self, batch: ActionBatch, vectors: torch.Tensor) -> torch.Tensor:
        """Mean L1 distance of the normalised actions, or the mean cross-entropy of their bins. vectors: (A, N, D)."""
        model = self.model
        idx = batch.idx.to(model.device)
        hidden = model.trunk(model.embed(idx, vectors, states=batch.states.to(model.device)))
        if model.config.action_head == "bins":
            return model.head(hidden, batch.targets.to(model.device))
        distance = (model.read_actions(hidden, idx) - batch.chunks.to(model.device)).abs().mean(-1)
        return distance[batch.inside.to(model.device)].mean()

    def answering_loss(self, batch: QuestionBatch, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy in nats a token, (Q,) bool: every token is the likeliest). vectors: (pictures, N, D)."""
        model = self.model
        idx, targets = batch.idx.to(model.device), batch.targets.to(model.device)
        rows = [part.flatten(0, 1) for part in vectors.split(batch.counts)]
        hidden = model.trunk(model.embed(idx, rows))
        learnt = targets != IGNORE_INDEX
        logits = model.logits(hidden[learnt])
        wrong = torch.zeros_like(targets).masked_scatter(learnt, (logits.argmax(-1) != targets[learnt]).long())
        return F.cross_entropy(logits, targets[learnt]), wrong.sum(1) == 0

    @torch.inference_mode()
    def validate(self) -> dict:
        """The loss of the actions with the right picture, another frame's and none, and the share of questions that are answered
        rightly in the same ways."""
        model, size = self.model, self.recipe.images_per_step
        model.eval()
        rng = np.random.default_rng(0)
        acted, asked = self.val.draw(VAL_FRAMES, rng), draw_asked(self.val, VAL_FRAMES, rng)
        sums: dict[str, list[float]] = {}
        for start in range(0, VAL_FRAMES, size):
            actions = action_batch(self.val, acted[start : start + size], model, self.tokenizer, None)
            for way, vectors in self.three_looks(acted[start : start + size]).items():
                sums.setdefault(way, []).append(self.acting_loss(actions, vectors).item())
            if has_scene(self.val):
                questions = question_batch(self.val, asked[start : start + size], model, self.tokenizer, rng)
                for way, vectors in self.three_looks(questions.frames).items():
                    right = self.answering_loss(questions, vectors)[1]
                    sums.setdefault(f"{way}_accuracy", []).append(right.float().mean().item())
        return {name: float(np.mean(values)) for name, values in sums.items()}

    def three_looks(self, frames: list[int]) -> dict[str, torch.Tensor]:
        """Glances at the frames, at other frames, and none."""
        vectors = self.look(self.val.images(frames))
        return {"aligned": vectors, "shuffled": vectors.roll(len(vectors) // 2, 0), "blind": torch.zeros_like(vectors)}
