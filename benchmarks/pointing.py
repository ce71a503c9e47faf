"""Does the attention of an answer point at what the question is about? See nanochat/evaluation/pointing.py for the measure.

    nanochat train easy_vqa --layer 3 --vision-tokens 64 --fusion cross --epochs 12 --out runs/cells
    python benchmarks/pointing.py easy-vqa runs/cells            # or shapes, which ships
    python benchmarks/pointing.py frames DIR                     # draws simulated frames: about 3 minutes on one free core
    nanochat train folder --data DIR --encoder robot --layer 3 --image-size 128 --vision-tokens 256 --fusion cross \
        --no-train-encoder --batchnorm frozen --word-loss 0 --n-layer 2 --n-embd 128 --steps 300 --out runs/frames
    python benchmarks/pointing.py simulator runs/frames --data DIR

Layer 3 of the encoder is the last whose cells see a part of the picture only (35 pixels). From layer 4 on, every cell can know
what is anywhere in a picture of 128 pixels, so a model answers well without its attention being on the object.

The layer and head that are read are chosen on training pictures, and reported on held-out ones.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional

from nanochat.agent import Agent
from nanochat.data import image_key, load_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.evaluation.pointing import CRITERIA, Pointed, foreground_box, point, pointing_score, simulated_box
from nanochat.files import atomic_path, json_lines
from nanochat.metaworld.instructions import MT10
from nanochat.metaworld.scene import OBJECT, scene_questions
from nanochat.metaworld.simulator import Arm

LIMIT = 1000  # questions that are asked, of each split
SIZE = 128  # pixels of a frame
SPLITS = {"train": (500_000, 150), "val": (600_000, 5), "test": (700_000, 15)}  # first seed, layouts of each task
FRAMES = 3  # of each layout
STEPS = 80  # of the expert, before the last frame at most
LEARNT = ("cell", "object", "side")  # kinds of questions about one picture that the model is trained on
SCORED = "cell"  # "in which cell is it?": the others can be answered from elsewhere (a drawer names its handle)

console = Console()


def easy_vqa(checkpoint: Positional[str], limit: int = LIMIT, json_out: Path | None = None) -> None:
    """Score a checkpoint on easy-VQA: one shape a picture, whose box is what differs from the background.

    Args:
        checkpoint: A folder, or a model that ships.
        limit: Questions that are asked of each split.
        json_out: Also write the scores to this file.
    """
    agent = Agent.load(checkpoint)
    parts = [
        [
            Pointed(
                sample.images[0],
                sample.question,
                sample.answer,
                foreground_box(sample.images[0]),
                image_key(sample.images[0]),
                "yes or no" if sample.answer in ("yes", "no") else "color or shape",
            )
            for sample in drawn(load_dataset("easy_vqa", split).samples, limit)
        ]
        for split in ("fit", "test")
    ]
    report(agent, f"{checkpoint} on easy-VQA", parts, json_out)


def simulator(checkpoint: Positional[str], data: Path, limit: int = LIMIT, json_out: Path | None = None) -> None:
    """Score a checkpoint on simulated frames that `frames` made.

    Args:
        checkpoint: A folder, or a model that ships.
        data: Folder of the frames.
        limit: Questions that are asked of each split.
        json_out: Also write the scores to this file.
    """
    agent = Agent.load(checkpoint)
    parts = [frame_items(data, split, limit) for split in ("train", "test")]
    report(agent, f"{checkpoint} on simulated frames", parts, json_out)


def frame_items(data: Path, split: str, limit: int) -> list[Pointed]:
    rows = [row for _, row in json_lines(data / f"{split}.jsonl") if row["box"] and row["kind"] == SCORED]
    return [
        Pointed(str(data / row["image"]), row["question"], row["answer"], tuple(row["box"]), row["layout"])
        for row in drawn(rows, limit)
    ]


def drawn(rows: Sequence, limit: int) -> list:
    return random.Random(0).sample(rows, min(limit, len(rows)))


def report(agent: Agent, title: str, parts: Sequence[Sequence[Pointed]], json_out: Path | None) -> None:
    chosen_on, held_out = (
        point(agent, items, lambda starts, name=name: track(starts, description=name, console=console))
        for items, name in zip(parts, ("training pictures", "held-out pictures"), strict=True)
    )
    result = pointing_score(chosen_on, held_out)
    table = Table(
        "what points",
        "inside",
        "touching",
        title=f"{title}: {result['n']:,} questions, {100 * result['answers']:.1f} % answered rightly",
        caption="% of the questions where the cell has its centre in the object's box, or touches the box",
    )
    for reading, label in (("cell", "strongest cell"), ("around", "strongest 3 x 3 cells")):
        found = [result[reading][criterion] for criterion in CRITERIA]
        table.add_row(
            f"{label}, {result[reading]['view']}",
            *(f"{percent(row['attention'])} ({' .. '.join(map(percent, row['ci95']))})" for row in found),
        )
        for kind in filter(None, found[0]["kinds"]):
            table.add_row(f"  {kind}", *(percent(row["kinds"][kind]) for row in found))
        table.add_row("  with boxes of other pictures", *(percent(row["shuffled"]) for row in found))
        table.add_row("  of all layers and heads", *(percent(row["mean_view"]) for row in found))
    labels = {
        "fixed_cell": "the best constant cell of the training pictures",
        "centre_cell": "centre cell",
        "random_cell": "random cell",
    }
    for name, label in labels.items():
        table.add_row(label, *(percent(result["controls"][criterion][name]) for criterion in CRITERIA))
    console.print(table)
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result, indent=1))


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def frames(out: Positional[Path]) -> None:
    """Make frames of ten simulated tasks with questions and the boxes of the objects: a folder of .jsonl and PNG files.

    The layouts of the splits have other seeds, also than the data of the model that ships.

    Args:
        out: The folder, which must not exist.
    """
    (out / "images").mkdir(parents=True)
    for split, (first_seed, layouts) in SPLITS.items():
        rows = []
        for task in track(MT10, description=split, console=console):
            arm = Arm(task, SIZE)
            for number in range(layouts):
                rows += layout_rows(arm, task, first_seed + number, out)
            arm.close()
        with atomic_path(out / f"{split}.jsonl") as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in rows))


def layout_rows(arm: Arm, task: str, seed: int, out: Path) -> list[dict]:
    """Questions about FRAMES frames of the expert's way through one layout; writes the frames."""
    rng = np.random.default_rng(seed)
    shown = set(rng.choice(STEPS, FRAMES, replace=False).tolist())
    scene, rows = arm.reset(seed), []
    for step in range(max(shown) + 1):
        if step in shown:
            state = scene.environment_state
            name, box = f"images/{task}-{seed}-{step}.png", simulated_box(state[OBJECT], SIZE)
            (out / name).write_bytes(encode_png(arm.image()))
            visible = min(box[:2]) >= 0 and max(box[2:]) <= SIZE
            success, held = (np.array([truth]) for truth in (scene.success, scene.held))
            rows += [
                {"image": name, "question": asked.question, "answer": asked.answer, "kind": asked.kind,
                 "box": box if visible else None, "layout": f"{task}-{seed}"}
                for asked in scene_questions(task, state[None], success, held, 0, 0, rng)
                if asked.kind in LEARNT
            ]  # fmt: skip
        scene = arm.step(arm.expert_action())
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)  # small models: a second thread only waits
    try:
        tyro.extras.subcommand_cli_from_dict({"easy-vqa": easy_vqa, "simulator": simulator, "frames": frames})
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
