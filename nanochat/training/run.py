"""What every training run has, whatever it learns: checks before it begins, steps, validations, checkpoints, and going on.

`train.py` makes one of pictures and words, `robot/train.py` one of demonstrations: each says what a step and a validation are.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.checkpoint import load_encoder, load_resume, read_json, read_manifest, readable, save_checkpoint
from nanochat.devices import pick_device  # noqa: F401
from nanochat.evaluation.validation import describe, history_files
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.tokenizer import Tokenizer
from nanochat.training.optimizers import learning_rate_factor, load_optimizers, make_optimizers, optimizer_tensors
from nanochat.training.recipes import Recipe, recipe_name
from nanochat.vision import YOLOv9Plus
from nanochat.vision.weights import one_line

console = Console()
HELPER = "helper."  # of the resume file
# Fields of a recipe that may change when a run goes on: they say where and how, not what is learnt.
PLACES = ("out", "cache", "resume")
HOW = (
    "data", "encoder", "start_from", "device", "encoder_device", "device_batch_size", "gradient_checkpointing", "threads",
    "save_every", "eval_every",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def full_gpu_explained(advice: str) -> Iterator[None]:
    """Raises MemoryError with the options that help, where torch says that the GPU is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU is full: {advice} ({one_line(error)})") from None


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
    """The state of a training run between two steps. helper: a module that only training uses, such as words.WordHead.

    A subclass says what `train_step` and `validate` do; `unit` is of the validation loss, `measure` names what a step returns.
    """

    unit = "loss (nats per token)"
    measure = "loss"
    multi_turn = False  # whether the model learns conversations of several turns, and so may be shown earlier ones

    def __init__(self, recipe, out, model, tokenizer, data, val, steps, before):
        self.recipe, self.out, self.model, self.tokenizer = recipe, out, model, tokenizer
        self.data, self.val = data, val
        self.steps, self.step, self.seconds, self.history = steps, before["step"], before["seconds"], before["history"]
        self.earlier = before.get("earlier", [])
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

    def make_helper(self) -> torch.nn.Module | None:
        return None

    def train_step(self) -> tuple[float, int, int]:
        """Gather gradients, `update`, and return the loss, the tokens and the pictures that it took."""
        raise NotImplementedError

    def validate(self) -> dict:
        """Losses "aligned", "shuffled" and "blind", and the same with "_accuracy" behind, where answers are counted."""
        raise NotImplementedError

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
                what = self.measure
                value, batch_tokens, batch_images = self.train_step()
                values.append(value)
                tokens, images = tokens + batch_tokens, images + batch_images
                if len(values) == 10 or self.step == self.steps or what != self.measure:
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

    def rate_factor(self) -> float:
        """The learning rates of the next step, as a share of the peak rates."""
        return learning_rate_factor(self.step, self.steps, self.recipe)

    def update(self, loss: float) -> None:
        """Let the optimisers follow the gradients that have been gathered, and count the step."""
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} at step {self.step}: lower the learning rates (matrix_lr first)")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = self.rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

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
            "earlier": self.earlier,
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


def check_same(recipe: Recipe, before: Recipe, step: int, lengths: tuple[int, int]) -> None:
    """A resumed run must be the run it goes on with. Until the rates begin to fall it may still become longer or shorter: up
    to there both are the same. lengths: in steps, now and before. Raises ValueError naming what changed."""
    free = {*PLACES, *HOW}
    if step <= (1 - recipe.cooldown) * min(lengths):
        free |= {"epochs", "steps"}
    old, new = asdict(before), asdict(recipe)
    changed = [f"{k}={old[k]!r} then, {new[k]!r} now" for k in new if k not in free and old[k] != new[k]]
    if changed:
        raise ValueError(f"this is another run than the one in {out_folder(recipe)}: {'; '.join(changed)}")


def out_folder(recipe: Recipe) -> Path:
    return Path(recipe.out or f"runs/{recipe_name(recipe)}").expanduser()


def open_encoder(recipe: Recipe) -> YOLOv9Plus:
    """Cut behind the last layer that is looked at."""
    if recipe.encoder and Path(recipe.encoder).expanduser().is_dir():
        encoder = load_encoder(recipe.encoder)
        encoder.image_size = recipe.image_size
    else:
        encoder = YOLOv9Plus(recipe.encoder or None, image_size=recipe.image_size)
    return encoder.truncate(recipe.layer)


def beginning(training: dict | None = None) -> dict:
    """The state of a run at its first step. training: of the checkpoint that it goes on from, whose own runs are kept in mind,
    so that a model says what all of its training took."""
    if training is None:
        return {"step": 0, "seconds": 0.0, "history": [], "earlier": []}
    recipe = training.get("recipe", {})
    run = {key: training.get(key) for key in ("recipe_name", "step", "seconds")}
    run |= {key: recipe.get(key) for key in ("data", "seed")}
    return beginning() | {"earlier": [*training.get("earlier", []), run]}


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


def trained_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
