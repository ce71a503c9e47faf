"""How well a policy answers questions about what it sees: for each kind of question the share of right answers, beside the same
questions with another picture (shuffled), with none (blind), and the commonest answer (majority).

"Is it done?" is answered no by almost every frame of an episode. Its balanced accuracy, the mean of the rates for yes and
for no, is 50 % for any answer that does not look.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from nanochat.assistant import Assistant, resolve_checkpoint
from nanochat.checkpoint import load_checkpoint
from nanochat.data.demonstrations import Demonstrations, open_demonstrations
from nanochat.data.sample import written_whole
from nanochat.evaluation.metrics import accuracy, exact_match
from nanochat.metaworld.questions import draw_asked, has_scene, question_messages, questions, task_name
from nanochat.metaworld.scene import Question

NEW_TOKENS = 40  # a description has 25
WAYS = ("aligned", "shuffled", "blind")
console = Console()


def run(
    checkpoint: str, folder: str, split: str, n_frames: int, batch_size: int, json_out: Path | None,
    device: torch.device, seed: int = 0,
) -> dict:  # fmt: skip
    """Ask about up to n_frames different random frames of the demonstrations in `folder`, half of them from the ends of
    episodes, where things get done. split: "val" and "fit" are the episodes that training keeps back, and the others; any
    other name is all. Prints a table and returns its figures, {kind: {"n", "aligned", ..., "majority", "balanced"}}."""
    model, tokenizer, training = load_checkpoint(resolve_checkpoint(checkpoint), device)
    assistant = Assistant(model, tokenizer)
    if not assistant.tokens_per_image:
        raise ValueError(f"{checkpoint} is a text model without eyes: these questions are about pictures")
    recipe = training.get("recipe", {})
    trained_on, source = recipe.get("data"), open_demonstrations(folder, recipe.get("camera", ""), task_name)
    if split != "val" and trained_on and Path(trained_on).expanduser().resolve() == source.folder.resolve():
        console.print(
            "[yellow]The model was trained on these episodes: --split val are those that it was not.[/yellow]"
        )
    data = source.read(
        split, model.config.vision_image_size, partial(track, description="reading episodes", console=console)
    )
    if not has_scene(data):
        raise ValueError(
            f"{folder} has no simulator state, which answers are computed from: record a dataset with nanochat record"
        )
    rng = np.random.default_rng(seed)
    frames = list(dict.fromkeys(draw_asked(data, n_frames, rng)))
    asked = [found for frame in frames for found in questions(data, frame, rng)]
    said = {way: [] for way in WAYS}
    with Progress(console=console) as progress:
        for start in progress.track(range(0, len(asked), batch_size), description="answering"):
            part = asked[start : start + batch_size]
            for way, answers in answer(assistant, data, part).items():
                said[way] += answers
    episodes = [int(data.episode[shown[-1]]) for shown, _ in asked]
    result = score([question for _, question in asked], episodes, said)
    console.print(table(result, len(frames), len(data.by_task)))
    if json_out is not None:
        with written_whole(json_out) as new:
            new.write_text(json.dumps(result, indent=1))
    return result


def answer(assistant: Assistant, data: Demonstrations, part: list) -> dict[str, list[str]]:
    """Greedy answers to a batch in each way; "shuffled" shows the pictures of the batch's next frame."""
    numbers = sorted({frame for frames, _ in part for frame in frames})
    seen = dict(zip(numbers, assistant.look(list(data.images(numbers))), strict=True))
    other = dict(zip(numbers, numbers[len(numbers) // 2 :] + numbers[: len(numbers) // 2], strict=True))
    conversations = [question_messages(asked.question, "", len(frames))[:1] for frames, asked in part]
    vectors = [torch.stack([seen[frame] for frame in frames]) for frames, _ in part]
    shuffled = [torch.stack([seen[other[frame]] for frame in frames]) for frames, _ in part]
    ways = {"aligned": vectors, "shuffled": shuffled, "blind": [torch.zeros_like(v) for v in vectors]}
    return {way: assistant.answer_all(conversations, shown, NEW_TOKENS) for way, shown in ways.items()}


def score(asked: list[Question], episodes: list[int], said: dict[str, list[str]]) -> dict:
    """For each kind of question, see `run`. Intervals are over episodes: frames of one are right or wrong together."""
    result = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        rows = [i for i, question in enumerate(asked) if question.kind == kind]
        truths = [asked[i].answer for i in rows]
        right = {way: [exact_match(said[way][i], [asked[i].answer]) for i in rows] for way in said}
        counts = Counter(truths)
        result[kind] = {"n": len(rows)} | {way: float(np.mean(hits)) for way, hits in right.items()}
        result[kind]["majority"] = counts.most_common(1)[0][1] / len(rows)
        estimate = accuracy(right["aligned"], [episodes[i] for i in rows])
        result[kind]["ci95"] = [estimate.low, estimate.high]
        result[kind]["balanced"] = {way: balanced(truths, hits) for way, hits in right.items()}
    return result


def balanced(truths: list[str], hits: list[bool]) -> float:
    """The mean, over the different right answers, of the share that was hit."""
    return float(
        np.mean([np.mean([h for t, h in zip(truths, hits, strict=True) if t == truth]) for truth in set(truths)])
    )


def table(result: dict, n_frames: int, n_tasks: int) -> Table:
    out = Table(title=f"questions about {n_frames:,} frames of {n_tasks} tasks, % right")
    out.caption = (
        "other: about another picture; major: always the commonest answer; bal: mean over the different answers"
    )
    columns = ("kind", "n", "right", "95 %", "other", "blind", "major", "bal", "other")
    for column in columns:
        out.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for kind, row in result.items():
        shares = [row[way] for way in ("aligned", "shuffled", "blind", "majority")]
        right, *others = [
            f"{share:.1%}" for share in (*shares, row["balanced"]["aligned"], row["balanced"]["shuffled"])
        ]
        out.add_row(kind, str(row["n"]), right, "..".join(f"{100 * v:.0f}" for v in row["ci95"]), *others)
    return out
