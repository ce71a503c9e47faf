"""What it is worth to start from the model `photos` when there are few pictures of one's own.

    python benchmarks/start_from.py --data DATA [--split dev] [--pictures 100] [--test 200] [--out runs/start_from]

Takes --pictures pictures of the data at random to train on, and --test others to score; writes both as a folder of pictures into
--out, so that the rows below are what `nanochat train folder --data OUT/pictures` gives with its defaults:

    photos                 not trained on these pictures
    from photos            nanochat train folder
    mean of both           nanochat average photos OUT/from-photos
    from random weights    nanochat train folder --start-from none

Use data that `photos` was not trained on, such as Flickr8k's dev split. Each row stands beside another picture (shuffled) and
none (blind). Re-run the command to resume: rows that are done are not repeated, a run that was stopped goes on.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from nanochat.checkpoint import load_checkpoint
from nanochat.data import CAPTION_PROMPT, Dataset, image_key, load_dataset
from nanochat.devices import pick_device
from nanochat.errors import UserError
from nanochat.evaluation.pictures import evaluate_dataset
from nanochat.files import atomic_path
from nanochat.training.averaging import average_checkpoints
from nanochat.training.folder import folder_from_photos
from nanochat.training.recipes import Folder
from nanochat.training.run import Run
from nanochat.vision.images import open_image

MEASURES = ("accuracy", "bleu4", "cider")  # of a row, where its data have them
MEAN = "mean of both"  # of the two rows before it
ROWS = {"photos": None, "from photos": folder_from_photos(), MEAN: None, "from random weights": Folder()}


@dataclass
class Args:
    data: str = ""
    "Dataset name or path, see docs/DATA.md."
    split: str = "val"
    "Part of the data to take pictures from."
    pictures: int = 100
    "Pictures to train on."
    test: int = 200
    "Other pictures, to score."
    steps: int | None = None
    "Optimiser steps of both runs; default what the recipe does."
    seed: int = 0
    "Seed of the choice of pictures, and of the runs."
    threads: int | None = None
    "CPU threads; default one per core."
    device: str = "auto"
    "cpu, cuda, ...; auto is the GPU where there is one."
    out: Path = Path("runs/start_from")
    "Folder of the pictures, the checkpoints, and a .json for each row that is done."


def write_pictures(args: Args, folder: Path) -> None:
    """Write train.jsonl, val.jsonl and their pictures. Raises UserError for data with too few pictures."""
    data = load_dataset(args.data, args.split)
    by_picture: dict[str, list] = {}
    for sample in data.samples:
        if len(sample.images) == 1:
            by_picture.setdefault(image_key(sample.images[0]), []).append(sample)
    wanted = args.pictures + args.test
    if len(by_picture) < wanted:
        raise UserError(f"{args.data} has {len(by_picture)} pictures in {args.split}, expected {wanted} or more")
    keys = np.random.default_rng(args.seed).permutation(list(by_picture))[:wanted]
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, chosen in (("train", keys[: args.pictures]), ("val", keys[args.pictures :])):
        lines = []
        for number, key in enumerate(chosen):
            image = f"{name}-{number}.png"
            open_image(by_picture[key][0].images[0]).save(new / image)
            lines += [json.dumps({"image": image} | texts) for texts in texts_of(data, by_picture[key])]
        (new / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.rename(folder)  # complete, or not there


def texts_of(data: Dataset, samples: list) -> list[dict]:
    """The fields of the rows about one picture."""
    if data.task == "caption":
        return [{"captions": list(sample.references)} for sample in samples]
    if any(sample.question == CAPTION_PROMPT for sample in samples):
        raise UserError(f"{data.name} mixes captions and questions, expected one of them")
    return [{"question": sample.question, "answer": sample.answer} for sample in samples]


def run_row(args: Args, name: str, recipe: Folder | None, folder: Path) -> dict:
    """Train and score one row. {"row", "minutes", "steps", "trained_on", and a measure's values by condition}."""
    checkpoint, since, out = "photos", time.monotonic(), args.out / name.replace(" ", "-")
    row = {"row": name}
    if recipe is not None:
        recipe = replace(
            recipe, data=str(folder), out=str(out), steps=args.steps or recipe.steps, seed=args.seed, threads=args.threads,
            device=args.device, resume=(out / "manifest.json").is_file(),
        )  # fmt: skip
        checkpoint = str(Run(recipe).train())
        training = load_checkpoint(checkpoint)[2]
        row |= {"minutes": round(training["seconds"] / 60, 1), "steps": training["steps"]}
    elif name == MEAN:
        shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped while it scored
        average_checkpoints(["photos", str(args.out / "from-photos")], out)
        checkpoint = str(out)
    result = evaluate_dataset(checkpoint, str(folder), "val", strict=True, device=pick_device(args.device))
    found = {measure: result[measure] for measure in MEASURES if measure in result}
    return row | {"total_minutes": round((time.monotonic() - since) / 60, 1)} | found


def table(args: Args, rows: list[dict]) -> str:
    """The rows in Markdown."""
    measures = [measure for measure in MEASURES if measure in rows[0]]
    lines = [
        f"{args.pictures} pictures to train on, {args.test} others to score ({Path(args.data).name}, {args.split}).\n",
        "| start | steps | minutes | " + " | ".join(f"{m} | 95 % | shuffled | blind" for m in measures) + " |",
        "|---|" + "---|" * (2 + 4 * len(measures)),
    ]
    for row in rows:
        cells = [row["row"], str(row.get("steps", "-")), str(row.get("minutes", "-"))]
        for measure in measures:
            scale = 100 if measure == "accuracy" else 1
            values = row[measure]
            low, high = (f"{scale * value:.1f}" for value in values["ci95"])
            shown = [
                f"{scale * values[c]:.1f}" if values[c] is not None else "-" for c in ("aligned", "shuffled", "blind")
            ]
            cells += [f"**{shown[0]}**", f"{low} .. {high}", *shown[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args) -> None:
    if not args.data:
        raise UserError("name the data: --data PATH")
    if min(args.pictures, args.test) < 2:
        raise UserError(f"--pictures and --test must be at least 2, got {args.pictures} and {args.test}")
    args.out.mkdir(parents=True, exist_ok=True)
    folder, rows = args.out / "pictures", []
    chosen = {name: getattr(args, name) for name in ("data", "split", "pictures", "test", "steps", "seed")}
    settings = args.out / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != chosen:
        raise UserError(f"{args.out} holds rows of other settings: choose another --out")
    settings.write_text(json.dumps(chosen))
    if not folder.is_dir():
        write_pictures(args, folder)
    for name, recipe in ROWS.items():
        done = args.out / f"{name.replace(' ', '-')}.json"
        if not done.is_file():
            row = run_row(args, name, recipe, folder)
            with atomic_path(done) as new:
                new.write_text(json.dumps(row, indent=1))
        rows.append(json.loads(done.read_text()))
    print(table(args, rows))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
