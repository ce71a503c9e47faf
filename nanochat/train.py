"""The training loop: a recipe in, a checkpoint folder out.

    data -> tokenizer -> model -> steps (accumulate, clip, Muon + AdamW) -> validate three ways -> checkpoint

A run validates aligned (the right picture), shuffled (another picture) and blind (none): where the three agree, nothing
has been learnt from the pictures, and the run says so.
"""

import io
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.batches import Batch, FeatureEyes, Rows, TrainedEyes, collate, forget_words, hide
from nanochat.checkpoint import load_checkpoint, load_resume, save_checkpoint
from nanochat.data import load_dataset, one_per_reference
from nanochat.data.sample import limit
from nanochat.features import cached_features
from nanochat.gpt import IGNORE_INDEX
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig, create_multimodal_gpt
from nanochat.optimizers import learning_rate_factor, load_optimizers, make_optimizers, optimizer_tensors
from nanochat.recipes import RECIPES, Recipe
from nanochat.rewards import tries
from nanochat.tokenizer import Tokenizer
from nanochat.vision import YOLOv9Plus
from nanochat.words import WordHead, answer_words

console = Console()
WORD_HEAD = "word_head."  # of the resume file
PLACES = ("out", "cache", "resume")  # fields of a recipe that say where, not what
HOW = ("device", "encoder_device", "save_every", "eval_every", "gradient_checkpointing", "threads")  # nor what
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPANDABLE = (
    "lower device_batch_size (the gradients stay the same), set gradient_checkpointing, put the encoder elsewhere with "
    "encoder_device=cpu, or use fewer vision_tokens"
)


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end (or go on with it) and return the checkpoint folder.

    Raises ValueError or OSError for data, settings or folders that cannot be used, before anything is written; MemoryError
    with the options that help when the GPU is full. Ctrl-C saves and raises KeyboardInterrupt with how to go on.
    """
    out = Path(recipe.out or f"runs/{recipe_name(recipe)}")
    if (out.exists() or out.is_symlink()) and not recipe.resume:
        raise FileExistsError(f"{out} exists: go on with it by --resume, or choose another --out")
    if not recipe.data:
        raise ValueError(f"{recipe_name(recipe)} needs the place of your data: --data PATH")
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = pick_device(recipe.device)

    train_set = load_dataset(recipe.data, recipe.train_split, recipe.strict)
    val_set = load_dataset(recipe.data, recipe.val_split, recipe.strict)
    samples = one_per_reference(train_set.samples)
    if recipe.resume:
        model, tokenizer, training = load_checkpoint(out, device)
        model.transformer.wte.to(DTYPES[recipe.dtype])
        check_same(recipe, training["recipe"])
    else:
        tokenizer = Tokenizer.train(texts_of(samples), recipe.vocab_size)
        model, training = build_model(recipe, tokenizer, device), {"step": 0, "seconds": 0.0, "history": []}

    data = Rows(samples, tokenizer, model.config)
    val = Rows(limit(one_per_reference(val_set.samples), 5 * recipe.val_images), tokenizer, model.config)
    eyes, val_eyes = open_eyes(recipe, model, data, val, out)
    steps = recipe.steps or math.ceil(recipe.epochs * len(data.groups) / recipe.images_per_step)
    if recipe.reward_steps:
        check_rewarded(recipe, train_set.task)
        steps += recipe.reward_steps
    skipped = train_set.skipped + val_set.skipped
    console.print(
        f"{len(samples)} conversations about {len(data.images)} pictures, {len(val.images)} to validate"
        + (f" ({skipped} rows left out: their picture is missing)" if skipped else "")
        + f"; {trained_parameters(model):,} trained parameters, vocabulary {tokenizer.vocab_size}, {steps} steps on {device}"
    )
    run = Run(recipe, out, model, tokenizer, data, val, eyes, val_eyes, steps, training)
    return run.go()


class Run:
    """The state of a training run between two steps."""

    def __init__(self, recipe, out, model, tokenizer, data, val, eyes, val_eyes, steps, before):
        self.recipe, self.out, self.model, self.tokenizer = recipe, out, model, tokenizer
        self.data, self.val, self.eyes, self.val_eyes = data, val, eyes, val_eyes
        self.steps, self.step, self.seconds, self.history = steps, before["step"], before["seconds"], before["history"]
        self.word_head = None
        if recipe.train_encoder and recipe.word_loss:
            words = answer_words(data)
            self.word_head = WordHead(model.config.vision_embedding_dim, model.config.vocab_size, words).to(
                model.device
            )
        self.optimizers = make_optimizers(model, recipe, self.word_head)
        self.started = time.monotonic()
        if recipe.resume:
            tensors = load_resume(out)
            load_optimizers(self.optimizers, {k: v for k, v in tensors.items() if not k.startswith(WORD_HEAD)})
            if self.word_head is not None:
                self.word_head.load_state_dict(
                    {k.removeprefix(WORD_HEAD): v for k, v in tensors.items() if k.startswith(WORD_HEAD)}
                )

    def go(self) -> Path:
        try:
            self.loop()
        except KeyboardInterrupt:
            self.save()
            raise KeyboardInterrupt(
                f"stopped at step {self.step} of {self.steps} and saved; go on with: "
                f"nanochat train {recipe_name(self.recipe)} --out {self.out} --resume"
            ) from None
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"the GPU is full at step {self.step}: {EXPANDABLE} ({str(error).splitlines()[0]})"
            ) from None
        return self.out

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
                    check = three_ways(self.model, self.val, self.val_eyes, recipe.images_per_step)
                    self.log(**check)
                    progress.console.print(describe(self.step, self.elapsed(), check))
                    since, tokens, images, values = time.monotonic(), 0, 0, []
                if self.step % recipe.save_every == 0 or self.step == self.steps:
                    self.save()
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
        if not math.isfinite(result[0]):
            raise ValueError(
                f"the loss became {result[0]} at step {self.step}: lower the learning rates (matrix_lr first)"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate_factor(self.step, self.steps, recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return result

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
            if self.word_head is not None:
                words = self.word_head.loss(vectors, batch.numbers)
            share = self.recipe.decoder_gradient
            vectors = share * vectors + (1 - share) * vectors.detach()  # the same values, less gradient
        seen = hide(batch.spread(vectors), rng, self.recipe.blind_share)
        idx = forget_words(batch, rng, self.recipe.word_dropout, self.tokenizer.special("<|bos|>")).to(device)
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
            # without the places of this machine: the folder may be shared
            "recipe": {k: v for k, v in asdict(self.recipe).items() if k not in PLACES},
            "step": self.step,
            "steps": self.steps,
            "seconds": round(self.elapsed(), 1),
            "history": self.history,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        resume, extra = optimizer_tensors(self.optimizers), history_files(self.history)
        if self.word_head is not None:
            resume |= {WORD_HEAD + name: tensor for name, tensor in self.word_head.state_dict().items()}
        save_checkpoint(self.out, self.model, self.tokenizer, training, resume=resume, extra=extra)

    def report(self) -> None:
        last = next((line for line in reversed(self.history) if "aligned" in line), None)
        if last is None:
            return
        table = Table(title=f"validation after {self.step} steps, {self.elapsed() / 60:.1f} min")
        for column in ("", "aligned", "shuffled", "blind"):
            table.add_column(column, justify="right")
        rows = (("loss (nats/token)", "{:.3f}", ""), ("answers exactly right", "{:.1%}", "_accuracy"))
        for name, style, suffix in rows:
            table.add_row(name, *(style.format(last[way + suffix]) for way in ("aligned", "shuffled", "blind")))
        console.print(table)
        if last["shuffled"] - last["aligned"] < 0.02:
            console.print("[yellow]The picture makes no difference: the model has learnt nothing from it yet.[/yellow]")
        console.print(f"checkpoint and loss curve in {self.out}")


def describe(step: int, seconds: float, check: dict) -> str:
    """A validation in one line."""
    ways = "  ".join(
        f"{way} {check[way]:.3f} ({check[f'{way}_accuracy']:.1%})" for way in ("aligned", "shuffled", "blind")
    )
    return f"step {step:5d}  {seconds / 60:5.1f} min  loss (exactly right): {ways}"


@torch.inference_mode()
def three_ways(model: MultimodalGPT, rows: Rows, eyes, images_per_step: int) -> dict:
    """{"aligned", "shuffled", "blind"} mean losses in nats a token, and "..._accuracy": the share of rows in which every
    learnt token is the likeliest one, which is what greedy generation would say exactly."""
    model.eval()
    totals = {way: np.zeros(3) for way in ("aligned", "shuffled", "blind")}  # loss, exactly right rows, learnt tokens
    n_rows = 0
    for start in range(0, len(rows.groups), images_per_step):
        groups = rows.groups[start : start + images_per_step]
        batch = collate([row for group in groups for row in group])
        n_rows += len(batch.idx)
        idx, targets = batch.idx.to(model.device), batch.targets.to(model.device)
        mask = idx == rows.vision_token_id
        vectors = eyes(batch.numbers).to(model.device) if batch.numbers else None
        if vectors is None:
            ways = dict.fromkeys(totals)
        else:
            # another picture of the batch for each: neighbours swap places, and a lone picture gets none
            other = vectors.roll(1, 0) if len(vectors) > 1 else torch.zeros_like(vectors)
            ways = {"aligned": vectors, "shuffled": other, "blind": torch.zeros_like(vectors)}
        for way, seen in ways.items():
            spread = None if seen is None else batch.spread(seen)
            learnt = model.without_images(targets, mask) != IGNORE_INDEX
            logits = model.logits(model.trunk(model.embed(idx, spread, mask))[learnt])
            losses = torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="sum")
            wrong = torch.zeros_like(targets).masked_scatter(learnt, (logits.argmax(-1) != targets[learnt]).long())
            totals[way] += (losses.item(), (wrong.sum(1) == 0).sum().item(), learnt.sum().item())
    result = {way: t[0] / max(1, t[2]) for way, t in totals.items()}
    return result | {f"{way}_accuracy": t[1] / n_rows for way, t in totals.items()}


def open_encoder(recipe: Recipe) -> YOLOv9Plus:
    """Cut behind the last layer that is looked at. Raises ValueError for a checkpoint without an encoder."""
    if recipe.encoder and Path(recipe.encoder).expanduser().is_dir():
        encoder = getattr(load_checkpoint(recipe.encoder)[0], "vision_encoder", None)
        if encoder is None:
            raise ValueError(f"the checkpoint {recipe.encoder} is a text model without an encoder: choose another one")
        encoder.image_size = recipe.image_size
    else:
        encoder = YOLOv9Plus(recipe.encoder or None, image_size=recipe.image_size)
    return encoder.truncate(recipe.layer)


def build_model(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> MultimodalGPT:
    encoder = open_encoder(recipe)
    config = MultimodalGPTConfig(
        sequence_len=recipe.sequence_len,
        vocab_size=tokenizer.vocab_size,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        n_kv_head=recipe.n_head,
        n_embd=recipe.n_embd,
        vision_embedding_dim=encoder.embedding_dim(recipe.layer),
        vision_tokens_per_image=recipe.vision_tokens,
        vision_token_id=tokenizer.special("<|image|>"),
        vision_layer=recipe.layer,
        vision_image_size=recipe.image_size,
    )
    model = create_multimodal_gpt(config, device)
    model.init_weights()
    model.transformer.wte.to(DTYPES[recipe.dtype])
    model.attach_encoder(encoder.to(device))
    return model


def open_eyes(recipe: Recipe, model: MultimodalGPT, data: Rows, val: Rows, out: Path):
    """What turns picture numbers into vectors, for training and for validation."""
    encoder = model.vision_encoder
    encoder.to(pick_device(recipe.encoder_device) if recipe.encoder_device else model.device)
    encoder.requires_grad_(recipe.train_encoder)
    if recipe.train_encoder:
        encoder.to(memory_format=torch.channels_last)  # a fifth faster on CPUs, twice as fast in bfloat16
        how = (recipe.layer, recipe.vision_tokens, DTYPES[recipe.dtype])
        eyes = TrainedEyes(encoder, data.images, *how, recipe.flip, recipe.jitter)
        return eyes, TrainedEyes(encoder, val.images, *how)
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


def check_same(recipe: Recipe, before: dict) -> None:
    """A resumed run must be the run it goes on with. Raises ValueError naming what changed."""
    free = {*PLACES, *HOW, "reward_steps"}
    changed = [
        f"{k}={before.get(k)!r} then, {v!r} now"
        for k, v in asdict(recipe).items()
        if k not in free and before.get(k) != v
    ]
    if changed:
        raise ValueError(f"this is another run than the one in {recipe.out}: {'; '.join(changed)}")


def check_rewarded(recipe: Recipe, task: str) -> None:
    if task != "caption":
        raise ValueError(f"reward_steps need captions, and {recipe.data} is of questions: leave them out")
    if recipe.questions_per_image < 2:
        raise ValueError("reward_steps compare tries at the same picture: questions_per_image must be 2 or more")


def texts_of(samples):
    for sample in samples:
        for message in sample.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            yield from (part["text"] for part in parts if part["type"] == "text")


def trained_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: use --device cpu")
    return torch.device(name)


def recipe_name(recipe: Recipe) -> str:
    """As the command line calls it."""
    return next(name for name, kind in RECIPES.items() if kind is type(recipe))


def history_files(history: list[dict]) -> dict[str, bytes]:
    """What people look at beside a checkpoint: metrics.jsonl, a line each, and loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in history if "loss" in line]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training", color="0.7")
    checks = [line for line in history if "aligned" in line]
    for way in ("aligned", "shuffled", "blind"):
        axes.plot(
            [line["step"] for line in checks], [line[way] for line in checks], marker=".", label=f"validation, {way}"
        )
    axes.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    plt.close(figure)
    return {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in history).encode(), "loss.png": png.getvalue()}
