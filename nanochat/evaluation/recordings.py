"""Evaluating a checkpoint on recorded episodes of a robot: questions about the pictures where a simulator's state answers them,
otherwise the open-loop report."""

import json
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from nanochat.agent import Agent
from nanochat.data.demonstration_folder import DemonstrationFolder, open_demonstrations
from nanochat.data.demonstrations import ACTION, STATE, Demonstrations
from nanochat.errors import UserError
from nanochat.evaluation.held_out import runs_of, same_data, sources_of
from nanochat.evaluation.open_loop import check_sizes, frames_to_ask, predict, run_open_loop
from nanochat.evaluation.open_loop_plot import Played, draw_open_loop, typical_episode
from nanochat.evaluation.open_loop_report import number_table, row_table, summary
from nanochat.evaluation.questions import FRAMES, evaluate_questions, open_as_trained, open_source, read_as_trained
from nanochat.files import atomic_path
from nanochat.metaworld.questions import SCENE_COLUMNS, paraphrase

console = Console()


def evaluate_recording(
    checkpoint: str,
    folder: str,
    split: str | None = None,
    *,
    n_frames: int = FRAMES,
    batch_size: int = 64,
    json_out: Path | None = None,
    plot: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Evaluate on up to n_frames frames of the split; print the figures and return them.

    split: as in `questions.evaluate_questions`. json_out: a file for the figures. plot: a PNG file, see `open_loop_plot`; only
    for data without a simulator.

    Raises:
        ValueError: the batch size is below 1, the model cannot do what the data asks, or sizes do not match.
        DataError, CheckpointError: the dataset or the checkpoint cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    whole = open_demonstrations(folder)
    if all(column in whole.columns for column in SCENE_COLUMNS):
        if plot is not None:
            raise UserError(
                f"--plot draws the actions of a real robot; {folder} is of a simulator, where nanochat rollout says more"
            )
        return evaluate_questions(
            checkpoint, folder, split, n_frames=n_frames, batch_size=batch_size, json_out=json_out, device=device
        )
    agent = Agent.load(checkpoint, device)
    recipe, *earlier = runs_of(agent.training)
    rate = agent.metadata["fps"]
    if rate > whole.data_fps:
        raise UserError(
            f"{checkpoint} chooses {rate:g} actions per second, but {folder} has only {whole.data_fps:g} frames per second"
        )
    recipe = recipe | ({"fps": rate} if rate else {})
    source, split = open_source(folder, split, recipe, agent.metadata["cameras"], earlier)
    check_sizes(agent, source.columns.get(STATE, 0), source.columns.get(ACTION, 0))  # before pictures are decoded
    data = read_as_trained(source, split, agent.metadata["image_size"], recipe)
    is_alone = data.episode[-1] == 0  # then shuffled takes pictures of a training episode
    known = learnt_from(agent, source, recipe, with_pictures=is_alone)
    result = {"checkpoint": str(checkpoint), "data": folder, "split": split}
    result |= evaluate_open_loop(agent, data, known, n_frames, batch_size, plot)
    if json_out is not None:
        with atomic_path(json_out) as new:
            new.write_text(json.dumps(result, indent=1))
    return result


def evaluate_open_loop(
    agent: Agent, data: Demonstrations, known: Demonstrations | None, n_frames: int, batch_size: int, plot: Path | None
) -> dict:  # fmt: skip
    """Print the open-loop report and return its figures. known: what the policy learnt from, if it is there."""
    names, units = names_and_units(agent, data)
    found = run_open_loop(
        agent, data, frames_to_ask(data, n_frames), batch_size, known, partial(track, console=console)
    )
    result = summary(found, names, units, data.fps)
    console.print(number_table(found, names, units))
    console.print(row_table(found, data.fps))
    for line in result["verdict"]:
        console.print(line, markup=False)
    if plot is not None:
        draw_open_loop(found, play(agent, data, typical_episode(found), batch_size), names, units, data.fps, plot)
    return result


def learnt_from(agent: Agent, source: DemonstrationFolder, recipe: dict, with_pictures: bool) -> Demonstrations | None:
    """The episodes that the policy was trained on; None if a folder of them cannot be read, which is said. with_pictures: if
    `source` is among them, whose training has decoded them. recipe: see `open_as_trained`."""
    names, cameras, size = sources_of(recipe), agent.metadata["cameras"], agent.metadata["image_size"]
    try:
        if not names:
            raise UserError("the checkpoint does not name it")
        first, *others = folders = [
            source if same_data(str(source.folder), name) else open_as_trained(name, recipe, cameras) for name in names
        ]
        if with_pictures and source in folders:
            return read_as_trained(first, "fit", size, recipe, others)
        return first.demonstrations(chain.from_iterable(each.episodes(each.numbers("fit")) for each in folders))
    except (UserError, OSError) as error:
        console.print(
            f"the rows mean action and nearest state are left out, which need the training data: {error}", markup=False
        )
        return None


def names_and_units(agent: Agent, data: Demonstrations) -> tuple[list[str], list[str]]:
    """Of each number of an action: its name in the data or in the policy, else its place from 1 on; the policy's unit, or ""."""
    width, about = data.action.shape[1], agent.metadata
    names = data.names_of.get("action") or about["action_names"] or [str(number + 1) for number in range(width)]
    return names, [about["units"]] * width


def play(agent: Agent, data: Demonstrations, episode: int, batch_size: int) -> Played:
    """Chunks that follow each other through an episode, each predicted at the recorded frame where it starts."""
    first = int(np.flatnonzero(data.episode == episode)[0])
    starts = np.arange(first, data.end[first], agent.metadata["chunk"])
    texts = [paraphrase(data.task(frame), None) for frame in starts]
    batches = range(0, len(starts), batch_size)
    chunks = predict(agent, data, starts, (data, starts), texts, batch_size, batches)
    return Played(data.names[episode].rpartition(": ")[2], data.action[first : data.end[first]], starts - first, chunks)
