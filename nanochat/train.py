"""The training loop: a recipe in, a checkpoint folder out.

    data -> tokenizer -> model -> steps (accumulate, clip, Muon + AdamW) -> validate three ways -> checkpoint

A run validates aligned (the right picture), shuffled (another picture) and blind (none): where the three agree, nothing
has been learnt from the pictures, and the run says so.
"""

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.batches import Batch, FeatureEyes, Rows, TrainedEyes, collate, forget_words, hide
from nanochat.checkpoint import (
    load_checkpoint,
    load_encoder,
    load_resume,
    read_json,
    read_manifest,
    readable,
    save_checkpoint,
)
from nanochat.data import load_dataset, one_per_reference
from nanochat.data.sample import limit
from nanochat.features import cached_features
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig, create_multimodal_gpt
from nanochat.optimizers import learning_rate_factor, load_optimizers, make_optimizers, optimizer_tensors
from nanochat.recipes import RECIPES, Recipe
from nanochat.rewards import tries
from nanochat.tokenizer import Tokenizer
from nanochat.validation import describe, history_files, three_ways
from nanochat.vision import YOLOv9Plus
from nanochat.vision.weights import one_line
from nanochat.words import WordHead, answer_words

console = Console()
HELPER = "helper."  # of the resume file
# Fields of a recipe that may change when a run goes on: they say where and how, not what is learnt.
PLACES = ("out", "cache", "resume")
HOW = (
    "data", "encoder", "start_from", "device", "encoder_device", "device_batch_size", "gradient_checkpointing", "threads",
    "save_every", "eval_every",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPANDABLE = (
    "lower device_batch_size (the gradients stay the same), set gradient_checkpointing, put the encoder elsewhere with "
    "encoder_device=cpu, or use fewer vision_tokens"
)


@contextmanager
def full_gpu_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU is full: {EXPANDABLE} ({one_line(error)})") from None


@full_gpu_explained()
def train(recipe: Recipe) -> Path:
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
        model, tokenizer, _ = load_checkpoint(recipe.start_from, device)
        recipe = shaped_like(recipe, model)
    else:
        tokenizer = open_tokenizer(recipe, samples)
        model = build_model(recipe, tokenizer, device)
    if not recipe.resume:
        before = {"step": 0, "seconds": 0.0, "history": []}
    model.transformer.wte.to(DTYPES[recipe.dtype])

    data = Rows(samples, tokenizer, model.config)
    val = Rows(limit(one_per_reference(val_set.samples), 5 * recipe.val_images), tokenizer, model.config)
    steps = recipe.steps or math.ceil(recipe.epochs * len(data.groups) / recipe.images_per_step)
    if recipe.reward_steps:
        check_rewarded(recipe, train_set.task)
        steps += recipe.reward_steps
    if recipe.resume:
        check_same(recipe, started_recipe(recipe), before["step"], steps, before["steps"])
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
    return Run(recipe, out, model, tokenizer, data, val, eyes, val_eyes, steps, before).go()


def begin(recipe: Recipe) -> tuple[Path, torch.device]:
    """Check what can be checked before data is read; set seed and threads. Returns the checkpoint folder and the device."""
    recipe.check()
    out = out_folder(recipe)
    if (out.exists() or out.is_symlink()) and not recipe.resume:
        raise FileExistsError(f"{out} exists: go on with it by --resume, or choose another --out")
    if not recipe.data:
        raise ValueError(f"{recipe_name(recipe)} needs the place of your data: --data PATH")
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    return out, pick_device(recipe.device)


class Run:
    """The state of a training run between two steps. helper: a module that only training uses (see words.py)."""

    unit = "loss (nats per token)"

    def __init__(self, recipe, out, model, tokenizer, data, val, eyes, val_eyes, steps, before):
        self.recipe, self.out, self.model, self.tokenizer = recipe, out, model, tokenizer
        self.data, self.val, self.eyes, self.val_eyes = data, val, eyes, val_eyes
        self.steps, self.step, self.seconds, self.history = steps, before["step"], before["seconds"], before["history"]
        self.unknown_id = tokenizer.special("<|bos|>")  # which stands nowhere but at the start of a row
        self.stopping = False
        self.helper = self.make_helper()
        self.optimizers = make_optimizers(model, recipe, self.helper)
        self.started = time.monotonic()
        if recipe.resume:
            tensors = load_resume(out)
            load_optimizers(self.optimizers, {k: v for k, v in tensors.items() if not k.startswith(HELPER)})
            if self.helper is not None:
                self.helper.load_state_dict(
                    {k.removeprefix(HELPER): v for k, v in tensors.items() if k.startswith(HELPER)}
                )

    @property
    def multi_turn(self) -> bool:
        """Whether the model learns conversations of several turns, and so may be shown earlier ones."""
        return self.data.multi_turn

    def make_helper(self) -> torch.nn.Module | None:
        if not (self.recipe.train_encoder and self.recipe.word_loss):
            return None
        config = self.model.config
        words = answer_words(self.data)
        return WordHead(config.vision_embedding_dim, config.vocab_size, words).to(self.model.device)

    def go(self) -> Path:
        """Run to the end. A first Ctrl-C (or SIGTERM, as a scheduler sends it) ends the step, saves and raises
        KeyboardInterrupt with how to go on."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self.stop)
        try:
            self.loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.out

    def stop(self, number: int, frame) -> None:
        """A step that is broken off in the middle would leave half of it in the weights; a second Ctrl-C does not wait."""
        if self.stopping:
            raise KeyboardInterrupt("stopped at once: what was learnt since the last checkpoint is lost")
        self.stopping = True

    def loop(self) -> None:
        recipe = self.recipe
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("training", total=self.steps, completed=self.step, status="")
            since, tokens, images, values = time.monotonic(), 0, 0, []
            while self.step < self.steps:
                what = "reward" if self.rewarded else "loss"
                value, batch_tokens, batch_images = self.train_step()
                values.append(value)
                tokens, images = tokens + batch_tokens, images + batch_images
                if len(values) == 10 or self.step in (self.steps - recipe.reward_steps, self.steps):
                    took = max(time.monotonic() - since, 1e-9)
                    mean = sum(values) / len(values)
                    self.log(**{what: mean}, tokens_per_s=tokens / took, images_per_s=images / took)
                    status = f"{what} {mean:.3f}  {tokens / took:,.0f} tokens/s  {images / took:.0f} images/s"
                    progress.update(bar, completed=self.step, status=status)
                    since, tokens, images, values = time.monotonic(), 0, 0, []
                if self.step % recipe.eval_every == 0 or self.step == self.steps:
                    check = self.validate()
                    self.log(**check)
                    progress.console.print(describe(self.step, self.elapsed(), check))
                    since, tokens, images, values = time.monotonic(), 0, 0, []
                if self.step % recipe.save_every == 0 or self.step == self.steps or self.stopping:
                    self.save()
                if self.stopping and self.step < self.steps:
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {self.steps} and saved; go on with: "
                        f"nanochat train {recipe_name(self.recipe)} --out {self.out} --resume"
                    )
        self.report()

    @property
    def rewarded(self) -> bool:
        """Whether the next step follows the reward (see rewards.py) instead of the data's answers."""
        return self.step >= self.steps - self.recipe.reward_steps

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

    def update(self, loss: float) -> None:
        """Let the optimisers follow the gradients that have been gathered, and count the step."""
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} at step {self.step}: lower the learning rates (matrix_lr first)")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate_factor(self.step, self.steps, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

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

    def log(self, **values) -> None:
        line = {"step": self.step, "seconds": round(self.elapsed(), 2), **values}
        self.history.append(line)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def save(self) -> None:
        training = {
            "recipe_name": recipe_name(self.recipe),
            "recipe": {k: v for k, v in asdict(self.recipe).items() if k not in PLACES},
            "step": self.step,
            "steps": self.steps,
            "seconds": round(self.elapsed(), 1),
            "history": self.history,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "multi_turn": self.multi_turn,
        }
        resume, extra = optimizer_tensors(self.optimizers), history_files(self.history, self.unit)
        if self.helper is not None:
            resume |= {HELPER + name: tensor for name, tensor in self.helper.state_dict().items()}
        save_checkpoint(self.out, self.model, self.tokenizer, training, resume=resume, extra=extra)

    def report(self) -> None:
        last = next((line for line in reversed(self.history) if "aligned" in line), None)
        if last is None:
            return
        table = Table(title=f"validation after {self.step} steps, {self.elapsed() / 60:.1f} min")
        for column in ("", "aligned", "shuffled", "blind"):
            table.add_column(column, justify="right")
        rows = ((self.unit, "{:.3f}", ""), ("answers exactly right", "{:.1%}", "_accuracy"))
        for name, style, suffix in rows:
            if "aligned" + suffix in last:
                table.add_row(name, *(style.format(last[way + suffix]) for way in ("aligned", "shuffled", "blind")))
        console.print(table)
        if last["shuffled"] - last["aligned"] < 0.02:
            console.print("[yellow]The picture makes no difference: the model has learnt nothing from it yet.[/yellow]")
        console.print(f"checkpoint and loss curve in {self.out}")


def open_encoder(recipe: Recipe) -> YOLOv9Plus:
    """Cut behind the last layer that is looked at."""
    if recipe.encoder and Path(recipe.encoder).expanduser().is_dir():
        encoder = load_encoder(recipe.encoder)
        encoder.image_size = recipe.image_size
    else:
        encoder = YOLOv9Plus(recipe.encoder or None, image_size=recipe.image_size)
    return encoder.truncate(recipe.layer)


def shape_of(recipe: Recipe, tokenizer: Tokenizer) -> dict:
    """The fields of a model's config that the recipe and the vocabulary decide, whatever the eyes."""
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


def build_model(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> MultimodalGPT:
    encoder = open_encoder(recipe)
    config = MultimodalGPTConfig(
        vision_embedding_dim=encoder.embedding_dim(recipe.layer), **shape_of(recipe, tokenizer)
    )
    model = create_multimodal_gpt(config, device)
    model.init_weights()
    model.attach_encoder(encoder.to(device))
    return model


def shaped_like(recipe: Recipe, model) -> Recipe:
    """The recipe with the shape of a model that is there already. Raises ValueError for one without eyes."""
    config = model.config
    if getattr(model, "vision_encoder", None) is None:
        raise ValueError(f"the checkpoint {recipe.start_from} is a text model without an encoder: choose another one")
    return replace(
        recipe, layer=config.vision_layer, image_size=config.vision_image_size, vision_tokens=config.vision_tokens_per_image,
        vocab_size=config.vocab_size, sequence_len=config.sequence_len, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd,
    )  # fmt: skip


def open_eyes(recipe: Recipe, model: MultimodalGPT, data: Rows, val: Rows, out: Path):
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


def set_training(model: MultimodalGPT, recipe: Recipe) -> None:
    """Training mode, except what must not move: a frozen encoder, and the statistics of a pretrained one."""
    model.train()
    if not recipe.train_encoder:
        model.vision_encoder.eval()
    elif recipe.batchnorm == "frozen":
        for module in model.vision_encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    model.gradient_checkpointing = recipe.gradient_checkpointing


def started_recipe(recipe: Recipe) -> Recipe:
    """The recipe that the run in `recipe.out` was started with. Raises CheckpointError where there is none, ValueError where it
    is of another kind."""
    folder = readable(out_folder(recipe))
    read_manifest(folder)  # says so if there is no checkpoint
    training = read_json(folder / "training.json")
    if training["recipe_name"] != recipe_name(recipe):
        raise ValueError(
            f"the run in {out_folder(recipe)} is of the recipe {training['recipe_name']}: go on with it by "
            f"nanochat train {training['recipe_name']} --out {out_folder(recipe)} --resume"
        )
    known = {field.name for field in fields(recipe)}
    saved = {name: value for name, value in training["recipe"].items() if name in known}
    return type(recipe)(**saved, out=recipe.out, resume=True)


def check_same(recipe: Recipe, before: Recipe, step: int, steps: int, steps_before: int) -> None:
    """A resumed run must be the run it goes on with. Until the rates begin to fall it may still become longer or shorter: up
    to there both are the same. Raises ValueError naming what changed."""
    free = {*PLACES, *HOW, "reward_steps"}
    lengths = (steps - recipe.reward_steps, steps_before - before.reward_steps)
    if step <= (1 - recipe.cooldown) * min(lengths):
        free |= {"epochs", "steps"}
    old, new = asdict(before), asdict(recipe)
    changed = [f"{k}={old[k]!r} then, {new[k]!r} now" for k in new if k not in free and old[k] != new[k]]
    if changed:
        raise ValueError(f"this is another run than the one in {out_folder(recipe)}: {'; '.join(changed)}")


def check_rewarded(recipe: Recipe, task: str) -> None:
    if task != "caption":
        raise ValueError(f"reward_steps need captions, and {recipe.data} is of questions: leave them out")
    if recipe.questions_per_image < 2:
        raise ValueError("reward_steps compare tries at the same picture: questions_per_image must be 2 or more")


def out_folder(recipe: Recipe) -> Path:
    return Path(recipe.out or f"runs/{recipe_name(recipe)}").expanduser()


def open_tokenizer(recipe: Recipe, samples) -> Tokenizer:
    if recipe.tokenizer:
        return Tokenizer.load(Path(recipe.tokenizer).expanduser())
    return Tokenizer.train(texts_of(samples), recipe.vocab_size)


def texts_of(samples):
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            yield from (part["text"] for part in parts if part["type"] == "text")


def trained_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises ValueError for anything else, and for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {name} here ({torch.cuda.device_count()} CUDA devices): use --device cpu")
    return device


def recipe_name(recipe: Recipe) -> str:
    """As the command line calls it."""
    return next(name for name, kind in RECIPES.items() if kind is type(recipe))
