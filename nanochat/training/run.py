"""A training run, whatever it learns: checks before it begins, steps, validation, checkpoints, resuming.

run = Run(recipe)       # reads the data, makes or loads the model; nothing is written yet
run.train()             # -> the checkpoint folder

train ──> take_step ──> task.backward, optimizer.step
"""

import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.checkpoint import load_checkpoint, load_resume, read_json, read_manifest, readable, save_checkpoint
from nanochat.devices import pick_device
from nanochat.errors import UserError, user_errors
from nanochat.evaluation.controls import CONDITIONS
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.training.history import describe, history_files
from nanochat.training.optimizers import load_optimizers, make_optimizers, optimizer_tensors
from nanochat.training.pictures import PictureTask
from nanochat.training.recipes import Recipe, Robot, recipe_name
from nanochat.training.task import StepResult, Task, console, set_training

LOG_EVERY = 10  # steps that a line of the history averages
AUXILIARY = "helper."  # prefix in resume.safetensors; the name is older than the class
# Fields of a recipe that may change when a run is resumed: they say where and how, not what is learnt. More reward steps
# may be added at any time.
PLACES = ("out", "cache", "resume")
HOW = (
    "data", "encoder", "start_from", "device", "encoder_device", "device_batch_size", "gradient_checkpointing", "threads",
    "save_every", "eval_every", "reward_steps",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run:
    """The state of a training run between two steps: model, optimisers, history."""

    def __init__(self, recipe: Recipe):
        """Read the data, and make the model or load it.

        Raises ValueError or OSError for data, settings or folders that cannot be used; MemoryError with the options that help
        where the GPU is full. No checkpoint is written.
        """
        recipe.check()
        self.out = out_folder(recipe)
        if (self.out.exists() or self.out.is_symlink()) and not recipe.resume:
            raise FileExistsError(f"{self.out} exists: resume the run in it with --resume, or choose another --out")
        if not recipe.data:
            raise UserError(f"{recipe_name(recipe)} needs the path of your data: --data PATH")
        device = pick_device(recipe.device)
        started = started_recipe(recipe) if recipe.resume else None
        torch.manual_seed(recipe.seed)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        task_class = task_class_of(recipe)
        with full_gpu_explained(task_class.memory_advice):
            self.task = task = task_class(recipe)
            self.model, self.tokenizer, state = self.open_model(recipe)
            self.recipe = task.recipe
            self.model.to(device).set_compute_dtype(DTYPES[recipe.dtype])
            self.model.vision_encoder.requires_grad_(recipe.train_encoder)
            task.prepare(self.model, self.tokenizer)
            if started is not None:
                check_same(task, started, state)
            task.load_images(self.out)
            self.optimizers = make_optimizers(self.model, self.recipe, task.auxiliary)
        self.steps, self.step, self.seconds = task.steps, state["step"], state["seconds"]
        self.history, self.earlier = state["history"], state.get("earlier", [])
        self.learnt = all_learnt(state.get("learnt"), task.learnt())
        self.stopping, self.started = False, time.monotonic()
        if recipe.resume:
            self.load_resume_state()
        n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        console.print(
            f"{task.describe_data()}; {n_parameters:,} trained parameters, vocabulary {self.tokenizer.vocab_size}, "
            f"{self.steps} steps on {device}"
        )

    def open_model(self, recipe: Recipe) -> tuple[GPT, Tokenizer, dict]:
        """(model, tokenizer, state of the run). Checkpoints are loaded on the CPU, where they are float32: exact for resuming."""
        if recipe.resume:
            return load_checkpoint(self.out.absolute())
        with user_errors():  # of a config that follows from flags
            if recipe.start_from:
                model, tokenizer, training = load_checkpoint(recipe.start_from)
                return self.task.adopt(model), tokenizer, first_state(training)
            return *self.task.new_model(), first_state()

    def load_resume_state(self) -> None:
        tensors = load_resume(self.out)
        load_optimizers(self.optimizers, {k: v for k, v in tensors.items() if not k.startswith(AUXILIARY)})
        if self.task.auxiliary is not None:
            own = {k.removeprefix(AUXILIARY): v for k, v in tensors.items() if k.startswith(AUXILIARY)}
            self.task.auxiliary.load_state_dict(own)

    # ---- the loop

    def train(self) -> Path:
        """Run to the end; returns the checkpoint folder. A first Ctrl-C (or SIGTERM, as schedulers send it) finishes the step,
        saves, and raises KeyboardInterrupt with the command to resume. MemoryError where the GPU is full."""
        advice, recipe = full_gpu_explained(self.task.memory_advice), self.recipe
        with advice, stop_signals(self.request_stop), progress_bar(self.steps, self.step) as show:
            meter = Meter()
            while self.step < self.steps:
                measure = self.task.measure(self.step)
                meter.results.append(self.take_step())
                is_last = self.step == self.steps
                if len(meter.results) == LOG_EVERY or is_last or self.task.measure(self.step) != measure:
                    line = meter.averages(measure)
                    self.log(**line)
                    show(self.step, line, measure)
                    meter.restart()
                if self.step % recipe.eval_every == 0 or is_last:
                    check = self.validate()
                    self.log(**check)
                    console.print(describe(self.step, self.elapsed(), check))
                    meter.restart()
                if self.step % recipe.save_every == 0 or is_last or self.stopping:
                    self.save()
                if self.stopping and not is_last:
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {self.steps} and saved; resume with: {resume_command(self)}"
                    )
        self.report()
        return self.out

    def take_step(self) -> StepResult:
        """Gradients from the task, then one step of the optimisers. Raises ValueError for a loss that is not finite."""
        set_training(self.model, self.recipe)
        result = self.task.backward(self.step)
        if not math.isfinite(result.value):
            raise UserError(
                f"the loss became {result.value} at step {self.step}: lower the learning rates (matrix_lr first)"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = self.task.rate_factor(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return result

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        self.model.eval()
        return self.task.validate()

    def request_stop(self, number: int, frame) -> None:
        """Breaking off in the middle of a step would leave half of it in the weights. A second signal does not wait."""
        if self.stopping:
            raise KeyboardInterrupt("stopped at once: the steps since the last checkpoint are lost")
        self.stopping = True

    # ---- records

    def log(self, **values) -> None:
        self.history.append({"step": self.step, "seconds": round(self.elapsed(), 2), **values})

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
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
            "multi_turn": self.task.multi_turn,
            "learnt": self.learnt,
        }
        resume, extra = optimizer_tensors(self.optimizers), history_files(self.history, self.task.unit)
        if self.task.auxiliary is not None:
            resume |= {AUXILIARY + name: tensor for name, tensor in self.task.auxiliary.state_dict().items()}
        save_checkpoint(self.out, self.model, self.tokenizer, training, resume=resume, extra=extra)

    def report(self) -> None:
        last = next((line for line in reversed(self.history) if "aligned" in line), None)
        if last is None:
            return
        table = Table(title=f"validation after {self.step} steps, {self.elapsed() / 60:.1f} min")
        for column in ("", *CONDITIONS):
            table.add_column(column, justify="right")
        for name, style, suffix in ((self.task.unit, "{:.3f}", ""), ("answers exactly right", "{:.1%}", "_accuracy")):
            values = [last.get(condition + suffix) for condition in CONDITIONS]
            if values[0] is not None:
                table.add_row(name, *("-" if value is None else style.format(value) for value in values))
        console.print(table)
        if "shuffled" in last and last["shuffled"] - last["aligned"] < 0.02:
            console.print("[yellow]The picture makes no difference: the model has not learnt to use it yet.[/yellow]")
        console.print(f"checkpoint and loss curve in {self.out}")


class Meter:
    """Averages over the steps since the last line of the history."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.results: list[StepResult] = []
        self.since = time.monotonic()

    def averages(self, measure: str) -> dict[str, float]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        return {
            measure: sum(result.value for result in self.results) / len(self.results),
            "tokens_per_s": sum(result.tokens for result in self.results) / seconds,
            "images_per_s": sum(result.images for result in self.results) / seconds,
        }


@contextmanager
def progress_bar(steps: int, done: int) -> Iterator[Callable[[int, dict, str], None]]:
    """Yields a function that shows a step and its averages."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=done, status="")

        def show(step: int, line: dict[str, float], measure: str) -> None:
            speed = f"{line['tokens_per_s']:,.0f} tokens/s  {line['images_per_s']:.0f} images/s"
            progress.update(bar, completed=step, status=f"{measure} {line[measure]:.3f}  {speed}")

        yield show


@contextmanager
def stop_signals(handler: Callable) -> Iterator[None]:
    """SIGINT and SIGTERM call the handler inside the block. Python allows this in the main thread only; elsewhere it does
    nothing."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def full_gpu_explained(advice: str) -> Iterator[None]:
    """Raises MemoryError with the options that help, where torch reports that the GPU is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU is full: {advice} ({' '.join(str(error).split())})") from None


def task_class_of(recipe: Recipe) -> type[Task]:
    if isinstance(recipe, Robot):
        from nanochat.training.robots import RobotTask  # needs pyarrow, which training on pictures does not

        return RobotTask
    return PictureTask


# ---- starting and resuming


def out_folder(recipe: Recipe) -> Path:
    return Path(recipe.out or f"runs/{recipe_name(recipe)}").expanduser()


def resume_command(run: Run) -> str:
    return f"nanochat train {recipe_name(run.recipe)} --out {shlex.quote(str(run.out))} --resume"


def first_state(training: dict | None = None) -> dict:
    """The state of a run before its first step. training: of the checkpoint that it starts from; its runs are kept in "earlier",
    so that a model records all of its training."""
    if training is None:
        return {"step": 0, "seconds": 0.0, "history": [], "earlier": []}
    recipe = training.get("recipe", {})
    run = {key: training.get(key) for key in ("recipe_name", "step", "seconds")}
    run |= {key: recipe.get(key) for key in ("data", "seed")}
    # a checkpoint older than the record may have learnt anything
    learnt = training.get("learnt", dict.fromkeys(("questions", "captions", "actions"), True))
    return first_state() | {"earlier": [*training.get("earlier", []), run], "learnt": learnt}


def all_learnt(before: dict[str, bool] | None, now: dict[str, bool]) -> dict[str, bool]:
    """What the model was trained for, the checkpoint that it started from included: "questions", "captions", "actions"."""
    return {name: taught or bool((before or {}).get(name)) for name, taught in now.items()}


def started_recipe(recipe: Recipe) -> Recipe:
    """The recipe that the run in `recipe.out` was started with. Raises CheckpointError where there is none, ValueError where it
    is another kind of recipe."""
    out = out_folder(recipe)
    folder = readable(out.absolute())
    read_manifest(folder)  # raises where there is no checkpoint
    training = read_json(folder / "training.json")
    if training["recipe_name"] != recipe_name(recipe):
        raise UserError(
            f"the run in {out} was started with the recipe {training['recipe_name']}, not {recipe_name(recipe)}; resume with: "
            f"nanochat train {training['recipe_name']} --out {shlex.quote(str(out))} --resume"
        )
    known = {field.name for field in fields(recipe)}
    saved = {name: value for name, value in training["recipe"].items() if name in known}
    return type(recipe)(**saved, out=recipe.out, resume=True)


def check_same(task: Task, started: Recipe, state: dict) -> None:
    """A resumed run must continue what it was started with. It may become longer or shorter until its learning rates begin to
    fall: up to there both are the same run. state: training.json. Raises ValueError naming what changed."""
    recipe, free = task.recipe, {*PLACES, *HOW}
    now = task.steps - task.reward_steps
    before = state["steps"] - getattr(started, "reward_steps", 0)
    if state["step"] <= (1 - recipe.cooldown) * min(now, before):
        free |= {"epochs", "steps"}
    old, new = asdict(started), asdict(recipe)
    changed = [f"{k} was {old[k]!r}, now {new[k]!r}" for k in new if k not in free and old[k] != new[k]]
    if changed:
        raise UserError(
            f"these settings differ from those of the run in {out_folder(recipe)}: {'; '.join(changed)}. Omit them to resume "
            "it, or choose another --out"
        )
