"""The demonstrations that a recipe names: which columns, cameras and frames are read, and how long a chunk of them is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.progress import track

from nanochat.data.demonstration_folder import DemonstrationFolder, open_demonstrations
from nanochat.data.demonstrations import ACTION, STATE, Demonstrations
from nanochat.data.lerobot import NO_TASK
from nanochat.errors import UserError
from nanochat.metaworld.questions import SCENE_COLUMNS, has_scene, task_name
from nanochat.training.recipes import Robot
from nanochat.training.task import console, say

SCENE_CHUNK = 10  # steps, where data come from the simulator
RECORDING_SECONDS = 1.0  # of a chunk, where they are a recording
MAX_CHUNK = 1000
STEPS, LEAST_STEPS = 4500, 300
LONG = {"blind_share": 0.03, "dropout": 0.0, "weight_decay": 0.0, "state_noise": 0.0}
SHORT = {"blind_share": 0.9, "dropout": 0.1, "weight_decay": 0.1, "state_noise": 0.6}
PASSES = 13  # over the frames of a recording, at most: a short one is learnt by heart (dev/LOG.md)


def open_recipe_data(recipe: Robot, folder: str = "") -> DemonstrationFolder:
    """The folder of the recipe, or another one, with the recipe's cameras, columns and rate. Raises as `open_demonstrations`."""
    return open_demonstrations(
        folder or recipe.data, recipe.cameras, task_name,
        action_key=recipe.action_key, state_key=recipe.state_key, fps=recipe.fps,
    )  # fmt: skip


def read_data(recipe: Robot) -> tuple[Demonstrations, Demonstrations]:
    """(training, validation) demonstrations of the recipe, with pictures."""
    first, *others = (open_recipe_data(recipe, name) for name in (recipe.data, *recipe.also))
    for folder in (first, *others):
        for line in describe_columns(folder):
            say(f"{folder.folder}: {line}" if recipe.also else line)
    fit, val = (
        first.read(
            split, recipe.image_size, partial(track, console=console),
            Path(recipe.cache) if recipe.cache else None, recipe.skip_damaged, say, others,
        )
        for split in ("fit", "val")
    )  # fmt: skip
    return fit, val


def describe_columns(folder: DemonstrationFolder) -> list[str]:
    """What is read of the data and what is left out, as lines for the screen."""
    used = [STATE, ACTION]
    if all(column in folder.columns for column in SCENE_COLUMNS):
        used += SCENE_COLUMNS
    numbers = {
        name: f"{folder.renamed.get(name, name)} ({width} number{'s' * (width != 1)})"
        for name, width in folder.columns.items()
    }
    read = [f"camera {name}" for name in folder.cameras] + [numbers[name] for name in used if name in numbers]
    left = [f"camera {name}" for name in folder.other_cameras]
    left += [text for name, text in numbers.items() if name not in used] + folder.unreadable
    lines = [f"reads {', '.join(read) or 'nothing'}; leaves out {', '.join(left) or 'nothing'}"]
    if STATE not in numbers:
        lines.append(
            "the data has no column observation.state or state: the policy reads no state, only pictures and instructions "
            "(--state-key takes another column)"
        )
    if folder.fps < folder.data_fps:
        lines.append(f"reads {folder.fps:g} of the data's {folder.data_fps:g} frames per second (--fps)")
    if unnamed := folder.tasks.count(NO_TASK):
        lines.append(f"{unnamed} of {len(folder.tasks)} episodes have no instruction: theirs is {NO_TASK!r}")
    return lines


def suited(recipe: Robot, data: Demonstrations) -> Robot:
    """The recipe with numbers for what it leaves to the data: steps, and what keeps a short recording from being learnt by heart.
    A recording is short if the steps are more than PASSES over its frames."""
    fitting = round(PASSES * len(data) / recipe.images_per_step)
    short = fitting < STEPS and not has_scene(data)
    defaults = {"steps": max(LEAST_STEPS, fitting) if short else STEPS} | (SHORT if short else LONG)
    return replace(recipe, **{name: value for name, value in defaults.items() if getattr(recipe, name) is None})


def chunk_length(recipe: Robot, data: Demonstrations) -> int:
    """Actions per prediction: --chunk, or --chunk-seconds at the data's rate; by default 1 s, and 10 steps of a simulator.
    Raises UserError for both, and for less than one action."""
    if recipe.chunk is not None and recipe.chunk_seconds is not None:
        raise UserError("--chunk and --chunk-seconds both say how long a chunk is: give one of them")
    if recipe.chunk is not None:
        return recipe.chunk
    if recipe.chunk_seconds is None and has_scene(data):
        return SCENE_CHUNK
    seconds = RECORDING_SECONDS if recipe.chunk_seconds is None else recipe.chunk_seconds
    steps = seconds * data.fps
    if not 0.5 <= steps < MAX_CHUNK + 0.5:  # also NaN
        raise UserError(
            f"--chunk-seconds {seconds:g} at {data.fps:g} frames per second must be 1 to {MAX_CHUNK} actions, is {steps:g}"
        )
    return max(1, round(steps))


def check_rate(data: Demonstrations, targets: str) -> None:
    """Raises UserError where frames are left out whose actions are motions: the motions of all frames add up, those of every
    third do not."""
    if data.fps < data.data_fps and targets == "relative":
        raise UserError(
            f"--fps {data.fps:g} leaves out frames of {data.data_fps:g} per second, but the actions are relative: a motion that "
            "is left out is missing. Leave out --fps, or say --targets absolute if the actions are targets"
        )
