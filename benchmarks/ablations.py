"""What each part of the recipe `photos` is worth: a short run of the same size for each row, scored on the data's dev part.

    python benchmarks/ablations.py --data FLICKR8K [--taught runs/distill] [--epochs 3] [--rows cross grid49]

Before the first run, each row that is left takes two steps on a few pictures: that finds out what is missing, and how many
minutes the rest will take. A row that is done is not repeated, and a run that was stopped goes on where it was. After each
row the table and the plot in --docs are written again, from one .json for each row in --docs/ablations: rows may be of several
days and machines. To repeat a row, delete its .json and its folder in --out.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import ablations_report as report
import latency
import numpy as np
import torch
from ablations_rows import COMPARISONS, Row, rows_of
from rich.progress import Progress
from rich.table import Table

from nanochat.agent import Agent
from nanochat.checkpoint import encoder_of, readable
from nanochat.data import CAPTION_PROMPT, Dataset, limit, load_dataset, one_per_reference
from nanochat.errors import UserError
from nanochat.evaluation.pictures import answer_dataset, score
from nanochat.files import atomic_path, json_object
from nanochat.meta import on_meta
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import texts_of
from nanochat.training.out_folder import release_folder
from nanochat.training.recipes import Photos
from nanochat.training.resuming import PLACES
from nanochat.training.run import Run
from nanochat.training.task import console, model_shape, say
from nanochat.vision.images import open_image

TRIED = 32, 8  # pictures to train on and to answer about, before the first run
TIMED = {  # answers of fixed length, so that a row that says less is not faster
    "caption": latency.Prompt(CAPTION_PROMPT, 12),
    "question": latency.Prompt("what is the man wearing?", 2),
}


@dataclass
class Args:
    data: str = ""
    "Captions to train on and to score: a folder with train.jsonl, dev.jsonl and images, or any other source of captions."
    taught: str = ""
    "Checkpoint of a YOLOv9-t that `nanochat train distill` made; without it, its rows are left out."
    detector: str = "yolov9t.yaml"
    "Encoder of the row `head`: a .pt file or yolov9t.pt has weights, a .yaml has random ones."
    rows: tuple[str, ...] = ()
    "Names of the rows to run, with those that they need; default all."
    epochs: float = 3.0
    "Passes over the training pictures, the same for all rows. One is too few: pictures are hardly used yet."
    reward_steps: int = 100
    "Steps of the row with reward steps."
    samples: int | None = None
    "Pictures of the dev part that are scored, at most; default all."
    rounds: int = 20
    "How often each time of an answer is measured."
    threads: int = 1
    "CPU threads of the training. Answers are timed on one."
    out: Path = Path("runs/ablations")
    "Folder of the checkpoints."
    cache: str = ""
    "Cache folder, for the vision vectors of frozen encoders; default OUT."
    docs: Path = Path("docs")
    "Where ABLATIONS.md, ablations.png, and ablations/ with one .json for each row that is done, are written."


def chosen_rows(args: Args, rows: dict[str, Row]) -> dict[str, Row]:
    """The rows to run and what they need. Raises UserError for an unknown name."""
    for name in args.rows:
        if name not in rows:
            hint = " without --taught" if name.startswith("yolo-taught") else ""
            raise UserError(f"there is no row {name!r}{hint}; there are {', '.join(rows)}")
    wanted = set(args.rows or rows)
    wanted |= {needed for name in list(wanted) for needed in rows[name].needs}
    return {name: row for name, row in rows.items() if name in wanted}


def small_recipe(args: Args) -> Photos:
    """The recipe `photos` for captions only, with less than half of its decoder's parameters. Mirror images are left out: few
    pictures are seen often enough to need them, and they double the time of a frozen encoder."""
    return replace(
        Photos(), data=args.data, epochs=args.epochs, min_steps=1, reward_steps=0, flip="none",
        n_embd=192, n_head=3, threads=args.threads,
        val_images=20, eval_every=10**6, save_every=50, cache=args.cache or str(args.out),
        tokenizer=str(args.out / "tokenizer.json"), device="cpu",
    )  # fmt: skip


# ---- the study


class Study(NamedTuple):
    """base: the recipe that the rows change; rows: all there are; fit, val: the captions to train on and to score."""

    args: Args
    base: Photos
    rows: dict[str, Row]
    fit: Dataset
    val: Dataset


def open_study(args: Args, base: Photos | None = None) -> Study:
    """Reads the data, and trains the tokenizer that all rows share. Raises UserError for data without captions."""
    if not args.data:
        raise UserError("the ablations need the path of your captions: --data PATH")
    base = base or small_recipe(args)
    base.check()
    rows = rows_of(args.taught, args.detector, args.reward_steps)
    chosen_rows(args, rows)  # a wrong name is found before the data are read
    fit, val = (load_dataset(args.data, split) for split in (base.train_split, base.val_split))
    if any(sample.question != CAPTION_PROMPT for sample in (*fit.samples, *val.samples)):
        raise UserError(f"{args.data} holds questions, expected pictures with captions only")
    if args.samples is not None:
        val.samples = limit(val.samples, args.samples)
    if len(val.samples) < 2:
        raise UserError(
            f"found {len(val.samples)} picture to score, expected 2 or more: each is exchanged with another one"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    records_folder(args).mkdir(parents=True, exist_ok=True)
    texts = (text for sample in one_per_reference(fit.samples) for text in texts_of(sample))
    Tokenizer.train(texts, base.vocab_size).save(base.tokenizer)
    return Study(args, base, rows, fit, val)


def recipe_of(study: Study, row: Row) -> Photos:
    """The recipe of a row; the steps of a row with `minutes_of` are left open."""
    recipe = replace(study.base, **row.changes, out=str(study.args.out / row.name))
    if not row.width_of:
        return recipe
    other = replace(study.base, **study.rows[row.width_of].changes)
    return replace(recipe, n_embd=matched_width(recipe, other))


def matched_width(recipe: Photos, other: Photos) -> int:
    """The width that brings the parameters of a decoder with its projector closest to those of another recipe, which has the
    same encoder."""
    tokenizer, channels = Tokenizer.load(recipe.tokenizer), encoder_of(recipe.encoder).channels(recipe.layer)

    def count(recipe: Photos) -> int:
        shape = model_shape(recipe, tokenizer)
        with on_meta():
            config = MultimodalGPTConfig(vision_embedding_dim=channels, fusion=recipe.fusion, **shape)
            return MultimodalGPT(config).num_parameters()

    wanted, step = count(other), 2 * recipe.n_head  # widths are multiples of it
    widths = range(step, 2 * other.n_embd, step)
    return min(widths, key=lambda width: abs(count(replace(recipe, n_embd=width)) - wanted))


def settings_of(study: Study, row: Row) -> dict:
    """What a record must have been made with to count for this row; JSON-able."""
    moved = {*PLACES, "tokenizer", "steps"}  # places, and what follows from other rows
    settings = {key: value for key, value in asdict(recipe_of(study, row)).items() if key not in moved}
    settings |= {"data": Path(study.args.data).name, "scored": len(study.val.samples), "rounds": study.args.rounds}
    return json.loads(json.dumps(settings))


def records_folder(args: Args) -> Path:
    return args.docs / "ablations"


def record_of(study: Study, name: str) -> dict | None:
    """The record of a row that is done. Raises UserError for one that was made with other settings."""
    file = records_folder(study.args) / f"{name}.json"
    if not file.exists():
        return None
    record, wanted = json_object(file.read_bytes(), file), settings_of(study, study.rows[name])
    changed = [
        f"{key} was {record.get('settings', {}).get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if record.get("settings", {}).get(key) != value
    ]
    if changed:
        raise UserError(
            f"{file} was made with other settings ({'; '.join(changed)}): use the same ones, choose another --out, or delete it"
        )
    return record


def records_of(study: Study) -> dict[str, dict]:
    """The records of all rows that are done."""
    return {name: record for name in study.rows if (record := record_of(study, name)) is not None}


# ---- one row


def run_row(study: Study, row: Row) -> None:
    """Train, score, time, and write the record. What a stopped run of the row has done is kept."""
    args, recipe = study.args, recipe_of(study, row)
    folder, file = Path(recipe.out), records_folder(args) / f"{row.name}.json"
    if row.minutes_of:
        like, other = (record_of(study, name) for name in row.minutes_of)
        recipe = replace(recipe, steps=max(1, round(like["steps"] * other["minutes"] / like["minutes"])))
    if row.after and not has_checkpoint(folder):
        copy_folder(args.out / row.after, folder)
    run = Run(replace(recipe, resume=has_checkpoint(folder)))
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    minutes = processor_minutes(run)
    earlier = record_of(study, row.after) if row.after else {"steps": 0, "minutes": 0.0}
    agent = Agent.load(str(folder))
    with Progress(console=console) as progress:
        bar = progress.add_task("answering", total=None)
        answers = answer_dataset(
            agent, study.val, progress=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    torch.set_num_threads(1)
    times = latency.measure(agent, [sample.images[0] for sample in study.val.samples], TIMED, args.rounds)
    config = agent.model.config
    record = {
        "settings": settings_of(study, row),
        "steps": agent.training["step"],
        "minutes": earlier["minutes"] + minutes * (agent.training["step"] - earlier["steps"]),
        "trained": trained,
        "parameters": agent.model.num_parameters(),
        "vectors": [config.vision_tokens_per_image, config.vision_embedding_dim],
        "ms": {name: float(np.median(values)) for name, values in times.items()},
        "scores": score(answers),
        "torch": torch.__version__,
    }
    with atomic_path(file) as new:
        new.write_text(json.dumps(record, indent=1))


def processor_minutes(run: Run) -> float:
    """Train to the end; the processor's minutes of a step, all threads together, which other programs disturb less than the
    clock. Raises UserError for a run that is already at its end."""
    first, since = run.step, time.process_time()
    if first == run.steps:
        raise UserError(f"{run.out} was stopped after its training, and its minutes are lost: delete it, it runs again")
    run.train()
    return (time.process_time() - since) / 60 / (run.steps - first)


def has_checkpoint(folder: Path) -> bool:
    return (readable(folder.absolute()) / "manifest.json").is_file()


def copy_folder(source: Path, folder: Path) -> None:
    """The copy is either complete or not there."""
    temporary = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(folder)


# ---- the minutes, before the first run


class Cost(NamedTuple):
    """Seconds. encoding: the pictures of a frozen encoder, which rows may share."""

    encoding: float
    training: float
    answering: float


def estimate(study: Study, rows: Iterable[Row]) -> dict[str, float]:
    """{row: minutes that it will take, about}. Raises UserError naming the row for one that cannot run."""
    rows, minutes, costs, encoded = list(rows), {}, {}, set()
    say(f"trying {len(rows)} rows on {TRIED[0]} pictures")
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        write_captions(study, Path(folder))
        for row in progress.track(rows, description="trying"):
            recipe = recipe_of(study, row)
            try:
                check_start(study, row)
                cost = costs[row.name] = try_row(study, row, recipe, Path(folder))
            except (UserError, OSError, ImportError) as error:
                raise UserError(f"the row {row.name} cannot run: {error}") from error
            if row.minutes_of and row.minutes_of[1] in costs:
                cost = cost._replace(training=costs[row.minutes_of[1]].training)
            key = recipe.encoder, recipe.layer, recipe.vision_tokens
            if recipe.train_encoder or key in encoded:
                cost = cost._replace(encoding=0.0)
            else:
                encoded.add(key)
            minutes[row.name] = sum(cost) / 60
    return minutes


def check_start(study: Study, row: Row) -> None:
    """Raises UserError where the row that this one goes on from was made on another machine."""
    if row.after and record_of(study, row.after) and not has_checkpoint(study.args.out / row.after):
        raise UserError(
            f"it goes on from {study.args.out / row.after}, which is not there: delete "
            f"{records_folder(study.args) / row.after}.json, and that row runs again"
        )


def write_captions(study: Study, folder: Path) -> None:
    """A few pictures of the data as a data set of its own."""
    for name, data, n in zip(("train", "dev"), (study.fit, study.val), TRIED, strict=True):
        lines = []
        for number, sample in enumerate(data.samples[:n]):
            picture = folder / f"{name}-{number}.png"
            open_image(sample.images[0]).save(picture)
            lines.append(json.dumps({"image": picture.name, "captions": sample.references}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def try_row(study: Study, row: Row, recipe: Photos, folder: Path) -> Cost:
    """Two steps of each kind, of which the second is timed, and a few answers. An untrained model never ends its answers, so
    their time is an upper bound."""
    out = folder / row.name
    few = replace(
        recipe,
        data=str(folder),
        out=str(out),
        cache=str(out),
        steps=2,
        reward_steps=2 * bool(recipe.reward_steps),
    )
    quiet, console.quiet = console.quiet, True
    try:
        run = Run(few)
        release_folder(run.out)
        steps = [seconds_of(run.take_step) for _ in range(run.steps)]
        some = load_dataset(str(folder), recipe.val_split)
        answering = seconds_of(lambda: answer_dataset(Agent(run.model, run.tokenizer), some))
        encoding = seconds_of(lambda: run.model.look([sample.images[0] for sample in some.samples]))
    finally:
        console.quiet = quiet
        shutil.rmtree(out, ignore_errors=True)
    n = len(study.fit.samples)
    training = math.ceil(recipe.epochs * n / recipe.images_per_step) * steps[1]
    if row.after:
        training = recipe.reward_steps * steps[-1]
    return Cost(encoding * n / len(some.samples), training, answering * len(study.val.samples) / len(some.samples))


def seconds_of(call) -> float:
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


def show_minutes(chosen: Iterable[str], minutes: dict[str, float]) -> None:
    table = Table(title="minutes, about, on this machine as it is now")
    table.add_column("row")
    table.add_column("minutes", justify="right")
    for name in chosen:
        table.add_row(name, f"{minutes[name]:.0f}" if name in minutes else "done")
    table.add_row("together", f"{sum(minutes.values()):.0f}")
    console.print(table)


def main(args: Args, base: Photos | None = None) -> None:
    """base: another recipe than `small_recipe`, for tests."""
    study = open_study(args, base)
    done, chosen = records_of(study), chosen_rows(args, study.rows)
    left = [row for name, row in chosen.items() if name not in done]
    if left:
        show_minutes(chosen, estimate(study, left))
    for row in left:
        say(f"row {row.name}: {row.text}")
        run_row(study, row)
        write_report(study)
    if not left:
        write_report(study)


def write_report(study: Study) -> None:
    """Of all rows that are done, also those that were not asked for this time."""
    records, texts = records_of(study), {name: row.text for name, row in study.rows.items()}
    report.write(study.args.docs, Path(study.args.data).name, COMPARISONS, texts, records)
    say(f"{len(records)} of {len(texts)} rows are in {study.args.docs / report.PAGE}")


if __name__ == "__main__":
    latency.command(main, Args)
