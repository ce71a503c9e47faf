"""A training run, whatever it learns: checks before it begins, steps, validation, checkpoints, resuming.

run = Run(recipe)       # reads the data, makes or loads the model; nothing is written yet
run.train()             # -> the checkpoint folder

train ──> take_step ──> task.backward, optimizer.step
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.table import Table

from nanochat.checkpoint import load_checkpoint, load_resume, save_checkpoint
from nanochat.devices import pick_device
from nanochat.errors import UserError
from nanochat.evaluation.controls import CONDITIONS
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.training import distributed
from nanochat.training.distill import DistillTask
from nanochat.training.fingerprint import digest
from nanochat.training.history import advice, describe, history_files
from nanochat.training.optimizers import (
    gradients_are_finite,
    load_optimizers,
    make_optimizers,
    optimizer_tensors,
)
from nanochat.training.out_folder import check_new, hold_folder, release_folder, released_at_end
from nanochat.training.pictures import PictureTask
from nanochat.training.progress import Meter, progress_bar
from nanochat.training.recipe import Recipe
from nanochat.training.recipes import Distill, Robot, recipe_name
from nanochat.training.resuming import (
    PLACES,
    all_learnt,
    check_length,
    check_same_data,
    check_settings,
    first_state,
    out_folder,
    resume_command,
    start_from_command,
    started_recipe,
)
from nanochat.training.statistics import estimate_statistics, trained_norms
from nanochat.training.task import StepResult, Task, console, say, set_trainable, set_training

LOG_EVERY = 10  # steps that a line of the history averages, at most
MAX_SKIPPED = 10  # steps in a row without a finite gradient: the run is lost
AUXILIARY = "helper."  # prefix in resume.safetensors; the name is older than the class
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run:
    """The state of a training run between two steps: model, optimisers, history."""

    def __init__(self, recipe: Recipe):
        """Read the data, and make the model or load it.

        Raises ValueError or OSError for data, settings or folders that cannot be used; MemoryError with the options that help
        where the GPU is full. No checkpoint is written.
        """
        recipe.check()
        distributed.join()
        console.quiet = console.quiet or not distributed.is_first()
        self.out = out_folder(recipe)
        if distributed.is_first():
            hold_folder(self.out)
        try:
            self.open(recipe)
        except BaseException:
            release_folder(self.out)
            raise

    def open(self, recipe: Recipe) -> None:
        if not recipe.resume:
            check_new(self.out, resume_command(recipe))
        if not recipe.data:
            raise UserError(f"{recipe_name(recipe)} needs the path of your data: --data PATH")
        device = distributed.own_device(pick_device(recipe.device))
        recipe = replace(
            recipe, device_batch_size=distributed.part_size(recipe.images_per_step, recipe.device_batch_size)
        )
        started = started_recipe(recipe) if recipe.resume else None
        torch.manual_seed(recipe.seed)
        if recipe.threads is not None or distributed.count() > 1:
            torch.set_num_threads(recipe.threads or distributed.own_threads())
        task_class = task_class_of(recipe)
        with full_gpu_explained(task_class.memory_advice):
            self.task = task = task_class(recipe)
            self.model, self.tokenizer, state = self.open_model(recipe)
            self.recipe = task.recipe
            self.model.to(device).set_compute_dtype(DTYPES[recipe.dtype])
            set_trainable(self.model, self.recipe)
            if started is not None:
                check_settings(self.recipe, started)
            task.prepare(self.model, self.tokenizer)
            self.fingerprint = task.fingerprint()
            if started is not None:
                check_same_data(recipe, state.get("fingerprint"), self.fingerprint)
                check_length(task, started, state)
            task.load_images()
            self.optimizers = make_optimizers(self.model, self.recipe, task.auxiliary)
        self.set_state(state)
        if recipe.resume:
            self.load_resume_state()
        if distributed.count() > 1:
            self.check_alike()
        n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(
            f"{task.describe_data()}; {n_parameters:,} trained parameters, vocabulary {self.tokenizer.vocab_size}, "
            f"{self.steps} steps on {device}"
        )

    def check_alike(self) -> None:
        """Raises UserError unless all processes of the run have the same weights, vocabulary and data."""
        tensors = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in self.model.state_dict().values())
        texts = {"vocabulary": self.tokenizer.to_json(), "data": json.dumps(self.fingerprint)}
        distributed.check_alike(
            weights=digest(tensor.numpy() for tensor in tensors),
            **{name: digest([text.encode()]) for name, text in texts.items()},
        )

    def set_state(self, state: dict) -> None:
        """state: what training.json holds of a run, or `resuming.first_state`."""
        self.steps, self.step, self.seconds = self.task.steps, state["step"], state["seconds"]
        self.history, self.earlier = state["history"], state.get("earlier", [])
        self.learnt = all_learnt(state.get("learnt"), self.task.learnt())
        self.images = max(state.get("images", 1), self.task.images_learnt)  # in one conversation, at most
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), 0
        self.eval_every = self.recipe.eval_every or min(250, max(1, self.steps // 10))
        self.log_every = min(LOG_EVERY, max(1, self.steps // 10))
        self.statistics_of = None  # the step whose weights BatchNorm's statistics belong to
        self.stopping, self.started = False, time.monotonic()

    def open_model(self, recipe: Recipe) -> tuple[GPT, Tokenizer, dict]:
        """(model, tokenizer, state of the run). Checkpoints are loaded on the CPU, where they are float32: exact for resuming."""
        if recipe.resume:
            return load_checkpoint(self.out.absolute())
        if recipe.start_from:
            say(f"starting from the checkpoint {recipe.start_from}")
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
        """Run to the end; returns the checkpoint folder. A first Ctrl-C (or SIGTERM, as schedulers send it, or SIGHUP, as a lost
        connection does) finishes the step, saves, and raises KeyboardInterrupt with the command to resume. MemoryError where the
        GPU is full, UserError where the run diverges."""
        recipe, meter = self.recipe, Meter()
        advice, signals = full_gpu_explained(self.task.memory_advice), stop_signals(self.request_stop)
        if self.step >= self.steps:
            say(f"the run in {self.out} has finished its {self.steps} steps; to train on: {start_from_command(recipe)}")
        held, lost = released_at_end(self.out), self.lost_process_explained()
        with held, lost, advice, signals, progress_bar(self.steps, self.step) as show:
            if not self.history:
                self.check()  # where it started from; a curve needs two points
            while self.step < self.steps:
                measure = self.task.measure(self.step)
                meter.results.append(self.take_step())
                is_last = self.step == self.steps
                check_is_due = self.step % self.eval_every == 0 or is_last
                if len(meter.results) == self.log_every or check_is_due or self.task.measure(self.step) != measure:
                    line = meter.averages(measure)
                    self.log(**line)
                    show(self.step, line, measure)
                    meter.restart()
                if is_last:
                    self.save()  # before the last check, which takes memory and time
                if check_is_due:
                    self.check(is_last)
                    meter.restart()
                stopping = distributed.any_process(self.stopping)
                if self.step % recipe.save_every == 0 or is_last or stopping:
                    self.save()
                if stopping and not is_last:
                    distributed.meet()  # torchrun ends the others when one of them does
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {self.steps} and saved; resume with: "
                        + resume_command(replace(recipe, out=str(self.out)))
                    )
        self.report()
        return self.out

    def take_step(self) -> StepResult:
        """Gradients from the task, then one step of the optimisers. A step whose loss or gradient is not finite is skipped.
        Raises UserError after many of them in a row."""
        if self.step >= self.steps - self.task.reward_steps:
            self.update_statistics()  # reward steps read them
        result = self.accumulate()
        parameters = list(self.model.parameters())
        if math.isfinite(result.value) and gradients_are_finite([*parameters, *self.auxiliary_parameters()]):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            factor = self.task.rate_factor(self.step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skip_step(result.value)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return result

    def accumulate(self) -> StepResult:
        """The gradients of a step, of all processes."""
        set_training(self.model, self.recipe)
        own = self.task.backward(self.step)
        distributed.sum_gradients([*self.model.parameters(), *self.auxiliary_parameters()])
        return StepResult(*distributed.sum_numbers(own.value, own.tokens, own.images))

    @contextmanager
    def lost_process_explained(self) -> Iterator[None]:
        """Raises LostProcess with what is left of the run."""
        try:
            yield
        except distributed.LostProcess as error:
            left = "nothing was saved"
            if self.out.exists():
                left = f"what was saved last is intact, resume with: {resume_command(replace(self.recipe, out=str(self.out)))}"
            raise distributed.LostProcess(f"{error}; {left}") from None

    def skip_step(self, loss: float) -> None:
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
        if self.skipped_in_a_row == min(MAX_SKIPPED, self.steps):
            state = "the checkpoint of an earlier step is intact" if self.out.exists() else "nothing was saved"
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last is step {self.step}: its {what}; {state}. "
                "Lower the learning rates (--matrix-lr first)"
            )
        if self.skipped <= MAX_SKIPPED:
            say(f"step {self.step} is skipped: its {what}", "yellow")

    def auxiliary_parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.task.auxiliary is None else list(self.task.auxiliary.parameters())

    def update_statistics(self) -> None:
        """Make BatchNorm's statistics those of the current weights, where an encoder's BatchNorm trains."""
        step = min(self.step, self.steps - self.task.reward_steps)  # reward steps leave the encoder alone
        if self.statistics_of != step:
            set_training(self.model, self.recipe)
            norms = trained_norms(self.model)
            if norms:
                estimate_statistics(self.model, norms, self.task.pixel_batches())
            self.statistics_of = step

    def check(self, is_last: bool = False) -> None:
        """Validate, and put the result into the history and on the screen. The first process does this for all."""
        if not distributed.is_first():
            return
        check = self.validate()
        if is_last:
            check |= self.task.check_training()
        self.log(**check)
        say(describe(self.step, self.elapsed(), check))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        self.update_statistics()
        self.model.eval()
        return self.task.validate()

    def request_stop(self, number: int, frame) -> None:
        """Breaking off in the middle of a step would leave half of it in the weights. A second Ctrl-C does not wait; a second
        signal of another kind does, since a shutdown sends several."""
        if number == signal.SIGHUP:
            console.quiet = True  # the terminal is gone: writing to it would be an error
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once: the steps since the last checkpoint are lost")
        self.stopping = True

    # ---- records

    def log(self, **values) -> None:
        """A line of the history. Values that are not finite are no JSON and are left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.history.append({"step": self.step, "seconds": round(self.elapsed(), 2), **values})

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.monotonic() - self.started

    def save(self) -> None:
        """The first process does this for all. Raises UserError, and leaves the old checkpoint, where a weight is not finite."""
        if not distributed.is_first():
            return
        self.update_statistics()
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} is no longer finite at step {self.step}, so this step is not saved: lower the learning rates "
                    "(--matrix-lr first)"
                )
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
            "images": self.images,
            "skipped": self.skipped,
            "fingerprint": self.fingerprint,
        }
        resume, extra = optimizer_tensors(self.optimizers), history_files(self.history, self.task.unit)
        if self.task.auxiliary is not None:
            resume |= {AUXILIARY + name: tensor for name, tensor in self.task.auxiliary.state_dict().items()}
        save_checkpoint(self.out, self.model, self.tokenizer, training, resume=resume, extra=extra)

    def report(self) -> None:
        checks = [line for line in self.history if "aligned" in line]
        if not checks:
            return
        last = checks[-1]
        table = Table(title=f"validation after {self.step} steps, {self.elapsed() / 60:.1f} min")
        for column in ("", *CONDITIONS):
            table.add_column(column, justify="right")
        for name, style, suffix in ((self.task.unit, "{:.3f}", ""), ("answers exactly right", "{:.1%}", "_accuracy")):
            values = [last.get(condition + suffix) for condition in CONDITIONS]
            if values[0] is not None:
                table.add_row(name, *("-" if value is None else style.format(value) for value in values))
        console.print(table)
        if self.skipped:
            say(f"{self.skipped} steps were skipped because their loss or gradient was not finite", "yellow")
        for line in advice(checks[-1:] if self.task.reward_steps else checks, self.steps):  # a reward raises the loss
            say(line, "yellow")
        say(f"checkpoint and loss curve in {self.out}")
        for command in self.task.next_commands(self.out):
            say(f"next: {command}")


@contextmanager
def stop_signals(handler: Callable) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP call the handler inside the block; SIGHUP only if it is not ignored, as under nohup. Python
    allows this in the main thread only; elsewhere it does nothing."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handler) for number in numbers}
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
    if isinstance(recipe, Distill):
        return DistillTask
    return PictureTask
