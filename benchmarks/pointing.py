"""Does the attention of an answer point at what the question is about? See nanochat/evaluation/pointing.py for the measure.

    nanochat train easy_vqa --encoder efficientnet_lite2 --layer p4 --image-size 224 --vision-tokens 196 --fusion cross \
        --no-train-encoder --n-layer 2 --n-embd 128 --epochs 3 --out runs/cells      # 5 minutes
    python benchmarks/pointing.py easy-vqa runs/cells            # or shapes, which ships
    python benchmarks/pointing.py frames DIR                     # draws simulated frames: about 3 minutes on one free core
    nanochat train folder --data DIR --encoder robot --layer 3 --image-size 128 --vision-tokens 256 --fusion cross \
        --no-train-encoder --batchnorm frozen --word-loss 0 --n-layer 2 --n-embd 128 --steps 300 --out runs/frames
    python benchmarks/pointing.py simulator runs/frames --data DIR
    python benchmarks/pointing.py teach runs/frames --data DIR --out runs/taught         # a minute
    python benchmarks/pointing.py simulator runs/taught --data DIR

Layer 3 of the encoder is the last whose cells see a part of the picture only (35 pixels). From layer 4 on, every cell can know
what is anywhere in a picture of 128 pixels, so a model answers well without its attention being on the object.

A model that learns from answers alone looks at whatever tells them: where a closed drawer is, its handle is known. `teach` trains
it on with the boxes of the objects too (attention supervision, Liu et al. 2017, arXiv 1605.09553).

The layer and head that are read are chosen on training pictures, and reported on held-out ones.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional

from nanochat.agent import Agent
from nanochat.attention_weights import recorded
from nanochat.checkpoint import save_checkpoint
from nanochat.conversation import render, user_message
from nanochat.data import image_key, load_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.evaluation.pointing import (
    BATCH,
    CRITERIA,
    Pointed,
    cells_on_box,
    foreground_box,
    point,
    pointing_score,
    simulated_box,
)
from nanochat.files import atomic_path, json_lines
from nanochat.metaworld.instructions import MT10
from nanochat.metaworld.scene import OBJECT, scene_questions
from nanochat.metaworld.simulator import Arm
from nanochat.vision.letterbox import square

LIMIT = 1000  # questions that are asked, of each split
SIZE = 128  # pixels of a frame
SPLITS = {"train": (500_000, 150), "val": (600_000, 5), "test": (700_000, 15)}  # first seed, layouts of each task
FRAMES = 3  # of each layout
STEPS = 80  # of the expert, before the last frame at most
LEARNT = ("cell", "object", "side")  # kinds of questions about one picture that the model is trained on
SCORED = "cell"  # "in which cell is it?": the others can be answered from elsewhere (a drawer names its handle)
RATE, COOLDOWN = 1e-3, 0.6  # of `teach`: the learning rate, and the last share of the steps, in which it falls
ROWS, LOOK_WEIGHT = 16, 0.3  # questions of a step, and what the attention's loss counts beside the answer's

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
        Pointed(
            str(data / row["image"]),
            row["question"],
            row["answer"],
            tuple(row["box"]),
            row["layout"],
            row["layout"].rpartition("-")[0],  # the task
        )
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


def teach(checkpoint: Positional[str], data: Path, out: Path, steps: int = 200, seed: int = 0) -> None:
    """Train a checkpoint on, with frozen encoder and cross-attention, to answer about the training frames that `frames` made and
    to attend to the box meanwhile.

    Args:
        checkpoint: A folder.
        data: Folder of the frames.
        out: Folder of the new checkpoint.
        steps: Optimiser steps.
        seed: Of the order of the questions.
    """
    agent = Agent.load(checkpoint)
    model, rng = agent.model, random.Random(seed)
    if getattr(model, "cross_attention", None) is None:
        raise UserError(f"{checkpoint} has no cross-attention to teach: train one with --fusion cross")
    items = frame_items(data, "train", sys.maxsize)  # all
    starts = track(range(0, len(items), BATCH), description="encoding", console=console)
    vectors = torch.cat([model.look([item.image for item in items[start : start + BATCH]]) for start in starts])
    learnt = [weight for name, weight in model.named_parameters() if not name.startswith("vision_encoder")]
    optimizer = torch.optim.AdamW(learnt, RATE, weight_decay=0)
    for step in track(range(steps), description="training", console=console):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (steps - step) / (COOLDOWN * steps))
        for number in rng.choices(range(len(items)), k=ROWS):
            (taught_loss(agent, items[number], vectors[number]) / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(out, model, agent.tokenizer, agent.training)


def taught_loss(agent: Agent, item: Pointed, vectors: torch.Tensor) -> torch.Tensor:
    """Nats of a token of the answer, and LOOK_WEIGHT times those of the attention to cells in the box, the mean of all layers,
    heads and tokens. vectors: (N, D)."""
    model = agent.model
    said = [user_message(item.question, 1), {"role": "assistant", "content": item.answer}]
    row = render(agent.tokenizer, said, model.config.places_per_image)
    ids, is_answer = torch.tensor(row.ids), torch.tensor(row.mask[1:]) == 1  # (T,), (T - 1,)
    with recorded(model) as weights:
        hidden = model.hidden(model.inputs(ids[None, :-1], [vectors]))
    answer_loss = F.cross_entropy(model.logits(hidden)[0, is_answer], ids[1:][is_answer])
    size = model.config.vision_image_size
    fit = square(item.image, size, model.vision_encoder.antialias)[1]
    on_box = torch.from_numpy(cells_on_box(item.box, fit, size, vectors.size(0)))
    on_object = torch.stack(weights)[:, :, is_answer][..., on_box].sum(-1)  # (n_layer, n_head, T)
    return answer_loss - LOOK_WEIGHT * on_object.clamp_min(1e-6).log().mean()


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
        tyro.extras.subcommand_cli_from_dict(
            {"easy-vqa": easy_vqa, "simulator": simulator, "frames": frames, "teach": teach}
        )
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
