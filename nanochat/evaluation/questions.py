"""How well a robot model answers questions about camera pictures of a recorded dataset: for each kind of question the share
of right answers, next to its controls (see `controls`).

Almost every frame of an episode has the answer "no" to "is the task done?". The balanced accuracy is the mean of the shares
of right answers for "yes" and for "no", so it is 50 % for any constant answer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from nanochat.agent import Agent
from nanochat.conversation import user_message
from nanochat.data.demonstration_folder import DemonstrationFolder, open_demonstrations
from nanochat.data.demonstrations import Demonstrations
from nanochat.errors import UserError
from nanochat.evaluation.controls import CONDITIONS, commonest_answer, conditions
from nanochat.evaluation.held_out import HELD_OUT, runs_of, was_trained_on
from nanochat.evaluation.metrics import accuracy, exact_match
from nanochat.files import atomic_path
from nanochat.metaworld.questions import draw_asked, has_scene, questions, task_name
from nanochat.metaworld.scene import Question

FRAMES = 1000  # that are asked about
NEW_TOKENS = 40  # a description has 25
console = Console()


def evaluate_questions(
    checkpoint: str,
    folder: str,
    split: str | None = None,
    *,
    n_frames: int = FRAMES,
    batch_size: int = 64,
    json_out: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict:
    """Ask about up to n_frames random frames of the demonstrations in `folder`; print the scores and return them.

    Half of the frames are from the ends of episodes, where tasks get done; no frame is used twice. split: "val" for the
    episodes that training holds out, "fit" for the others, "all" for both; None for "val" of the data that the model was
    trained on, "all" of other data. json_out: a file to write the scores to.

    Returns {kind of question: {"n", "aligned", "shuffled", "blind", "majority", "ci95", "balanced"}}, see `score`.

    Raises:
        ValueError: the batch size is below 1, the model cannot see, or the data has no simulator state.
        DataError, CheckpointError: the dataset or the checkpoint cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    agent = Agent.load(checkpoint, device)
    if not agent.places_per_image:
        raise UserError(f"{checkpoint} is a text model and cannot see: these questions are about pictures")
    recipe, *earlier = runs_of(agent.training)
    source, split = open_source(folder, split, recipe, getattr(agent.model.config, "cameras", [])[:1], earlier)
    data = read_as_trained(source, split, agent.model.config.vision_image_size, recipe)
    if not has_scene(data):
        raise UserError(
            f"{folder} has no simulator state, which answers are computed from: record a dataset with nanochat record"
        )
    rng = np.random.default_rng(seed)
    frames = list(dict.fromkeys(draw_asked(data, n_frames, rng)))
    asked = [found for frame in frames for found in questions(data, frame, rng)]
    answers = answer_questions(agent, data, asked, batch_size, partial(track, console=console))
    episodes = [int(data.episode[shown[-1]]) for shown, _ in asked]
    result = score([question for _, question in asked], episodes, answers)
    console.print(table(result, len(frames), len(data.by_task)))
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result, indent=1))
    return result


def open_source(
    folder: str, split: str | None, recipe: dict, cameras: Sequence[str] = (), earlier: Sequence[dict] = ()
) -> tuple[DemonstrationFolder, str]:
    """(the dataset, as the model was trained with it; the split to read). Says which episodes are read, and whether the model was
    trained on them. recipe, cameras: see `open_as_trained`. split: None for the default, see `evaluate_questions`. earlier: the
    recipes of the runs that the model started from."""
    source = open_as_trained(folder, recipe, cameras)
    own = any(was_trained_on(run, folder) for run in (recipe, *earlier))
    chosen = split or ("val" if own else "all")
    source.numbers(chosen)  # raises for a name that there is not
    if split is None:
        console.print(f"{escape(folder)}: split {chosen}, {HELD_OUT if own else 'all of it'}")
    elif own and chosen != "val":
        console.print(
            "[yellow]The model was trained on these episodes; --split val selects the held-out ones.[/yellow]"
        )
    if source.other_cameras:
        console.print(
            f"camera {', '.join(source.cameras)}; the data also has {', '.join(source.other_cameras)}", markup=False
        )
    return source, chosen


def open_as_trained(folder: str, recipe: dict, cameras: Sequence[str] = ()) -> DemonstrationFolder:
    """The dataset with the columns and the rate of a training run. recipe: of the run; may be empty. cameras: to read, by name;
    () for that of the recipe, as in older ones, else the first of the data. Raises as `open_demonstrations`."""
    if not cameras:
        cameras = [recipe["camera"]] if recipe.get("camera") else open_demonstrations(folder).cameras[:1]
    keys = {key: recipe.get(key) or "" for key in ("action_key", "state_key")}
    return open_demonstrations(folder, cameras, task_name, fps=recipe.get("fps"), **keys)


def read_as_trained(
    source: DemonstrationFolder, split: str, size: int, recipe: dict, also: Sequence[DemonstrationFolder] = ()
) -> Demonstrations:
    """The episodes of a split, with damaged ones left out if the training run did so. The cache is $NANOCHAT_CACHE or the
    default, whatever training had. also: further folders, read as one with this."""
    say, progress = partial(console.print, markup=False), partial(track, console=console)
    return source.read(split, size, progress, None, bool(recipe.get("skip_damaged")), say, also)


def answer_questions(
    agent: Agent,
    data: Demonstrations,
    asked: Sequence[tuple[list[int], Question]],
    batch_size: int,
    progress: Callable[..., Iterable[int]] = lambda starts, description: starts,
) -> dict[str, list[str]]:
    """Greedy answers to all questions under each condition; "shuffled" is missing if all frames are of one episode.

    asked: (frames to show, question). Pictures are exchanged between episodes, over all frames that are asked about: the
    batch size changes no answer. progress: wraps the starts of the batches.
    """
    numbers = sorted({frame for frames, _ in asked for frame in frames})
    row_of = {frame: row for row, frame in enumerate(numbers)}
    starts = range(0, len(numbers), batch_size)
    looked = [
        torch.as_tensor(agent.look(list(data.images(numbers[start : start + batch_size]))))
        for start in progress(starts, description="encoding pictures")
    ]
    shown = conditions(torch.cat(looked), [int(data.episode[frame]) for frame in numbers])  # (frames, N, D) each
    answers: dict[str, list[str]] = {condition: [] for condition in shown}
    for start in progress(range(0, len(asked), batch_size), description="answering"):
        part = asked[start : start + batch_size]
        conversations = [[user_message(found.question, len(frames))] for frames, found in part]
        rows = [[row_of[frame] for frame in frames] for frames, _ in part]
        for condition, vectors in shown.items():
            answers[condition] += agent.answer_all(conversations, [vectors[own] for own in rows], NEW_TOKENS)
    return answers


def score(asked: Sequence[Question], episodes: Sequence[int], answers: dict[str, list[str]]) -> dict:
    """{kind: {"n", "aligned", "shuffled", "blind", "majority", "ci95": [low, high] of aligned, "balanced": {condition: ...}}}.

    Values are shares of right answers; None under a condition that is not in `answers`. The interval is over episodes,
    because the frames of one episode are right or wrong together.
    """
    result = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        rows = [i for i, question in enumerate(asked) if question.kind == kind]
        truths = [asked[i].answer for i in rows]
        right = {name: [exact_match(found[i], [asked[i].answer]) for i in rows] for name, found in answers.items()}
        majority = commonest_answer(truths)
        estimate = accuracy(right["aligned"], [episodes[i] for i in rows])
        result[kind] = {
            "n": len(rows),
            **dict.fromkeys(CONDITIONS),
            **{name: float(np.mean(hits)) for name, hits in right.items()},
            "majority": float(np.mean([exact_match(majority, [truth]) for truth in truths])),
            "ci95": [estimate.low, estimate.high],
            "balanced": dict.fromkeys(CONDITIONS) | {name: balanced(truths, hits) for name, hits in right.items()},
        }
    return result


def balanced(truths: list[str], hits: list[bool]) -> float:
    """Balanced accuracy: the mean, over the different right answers, of the share that was answered rightly."""
    return float(
        np.mean([np.mean([h for t, h in zip(truths, hits, strict=True) if t == truth]) for truth in set(truths)])
    )


def table(result: dict, n_frames: int, n_tasks: int) -> Table:
    """The scores for a terminal: one row per kind of question."""
    out = Table(title=f"questions about {n_frames:,} frames of {n_tasks} tasks, % of answers that are right")
    out.caption = (
        "shuf: with a picture of another episode; major: the most common answer, computed on the test answers, so "
        "optimistic; bal: balanced accuracy"
    )
    columns = ("kind", "n", "right", "95 %", "shuf", "blind", "major", "bal", "bal\nshuf")
    for column in columns:
        out.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for kind, row in result.items():
        shares = [row[name] for name in ("aligned", "shuffled", "blind", "majority")]
        shares += [row["balanced"]["aligned"], row["balanced"]["shuffled"]]
        right, *others = ["" if share is None else f"{share:.1%}" for share in shares]
        out.add_row(kind, str(row["n"]), right, "..".join(f"{100 * v:.0f}" for v in row["ci95"]), *others)
    return out
