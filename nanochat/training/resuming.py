"""What a run continues: its own checkpoint (`--resume`) or another one (`--start-from`), and whether that is the same run."""

import shlex
from dataclasses import asdict, fields
from pathlib import Path

from nanochat.checkpoint import CheckpointError, read_json, read_manifest, readable
from nanochat.errors import UserError
from nanochat.training.fingerprint import changes
from nanochat.training.recipe import Recipe, flag
from nanochat.training.recipes import recipe_name
from nanochat.training.task import Task, say

# Fields of a recipe that may change when a run is resumed: they say where and how, not what is learnt. More reward steps
# may be added at any time. The data are compared by their fingerprint.
PLACES = ("out", "cache", "resume")
HOW = (
    "data", "encoder", "start_from", "device", "encoder_device", "device_batch_size", "gradient_checkpointing", "threads",
    "save_every", "eval_every", "reward_steps", "picture_memory", "also",
)  # fmt: skip
LENGTH = ("epochs", "steps", "min_steps")  # compared as the steps that follow from them


def out_folder(recipe: Recipe) -> Path:
    return Path(recipe.out or f"runs/{recipe_name(recipe)}").expanduser()


def train_command(recipe: Recipe, *flags: object) -> str:
    """A command line for the user, quoted for a shell."""
    return shlex.join(["nanochat", "train", recipe_name(recipe), *map(str, flags)])


def resume_command(recipe: Recipe) -> str:
    return train_command(recipe, "--out", out_folder(recipe), "--resume")


def start_from_command(recipe: Recipe, *flags: object) -> str:
    """The command that trains on from the checkpoint of a run, as a run of its own."""
    out = out_folder(recipe)
    return train_command(recipe, "--data", recipe.data, "--start-from", out, "--out", f"{out}-2", *flags)


def first_state(training: dict | None = None) -> dict:
    """The state of a run before its first step. training: of the checkpoint that it starts from; its runs are kept in "earlier",
    so that a model records all of its training."""
    if training is None:
        return {"step": 0, "seconds": 0.0, "history": [], "earlier": []}
    recipe = training.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}  # packed by others
    run = {key: training.get(key) for key in ("recipe_name", "step", "seconds")}
    run |= {key: recipe.get(key) for key in ("data", "also", "seed", "train_split", "val_split")}
    # a checkpoint older than the record may have learnt anything
    learnt, earlier = training.get("learnt"), training.get("earlier")
    if not isinstance(learnt, dict):
        learnt = dict.fromkeys(("questions", "captions", "actions"), True)
    earlier = earlier if isinstance(earlier, list) else []
    images = training.get("images") if isinstance(training.get("images"), int) else 1
    return first_state() | {"earlier": [*earlier, run], "learnt": learnt, "images": images}


def all_learnt(before: dict[str, bool] | None, now: dict[str, bool]) -> dict[str, bool]:
    """What the model was trained for, the checkpoint that it started from included: "questions", "captions", "actions"."""
    return {name: taught or bool((before or {}).get(name)) for name, taught in now.items()}


def started_recipe(recipe: Recipe) -> Recipe:
    """The recipe that the run in `recipe.out` was started with. Raises CheckpointError where there is none, ValueError where it
    is another kind of recipe."""
    out = out_folder(recipe)
    folder = readable(out.absolute())
    read_manifest(folder)  # raises where there is no checkpoint
    training = read_json(folder / "training.json")
    check_record(training, recipe, folder / "training.json")
    if training["recipe_name"] != recipe_name(recipe):
        raise UserError(
            f"the run in {out} was started with the recipe {training['recipe_name']}, not {recipe_name(recipe)}; resume with: "
            f"nanochat train {training['recipe_name']} --out {shlex.quote(str(out))} --resume"
        )
    known = {field.name for field in fields(recipe)}
    saved = {"min_steps": 1} | training["recipe"]  # release 0.1 had no least number of steps
    saved = {"cameras": [saved["camera"]]} | saved if saved.get("camera") else saved  # it read one camera
    saved = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
    }  # JSON has lists
    return type(recipe)(**{name: value for name, value in saved.items() if name in known}, out=recipe.out, resume=True)


def check_record(training: dict, recipe: Recipe, file: Path) -> None:
    """Raises CheckpointError unless training.json holds what a run is resumed from, with the right types."""
    expected = {"recipe_name": str, "recipe": dict, "step": int, "steps": int, "seconds": (int, float), "history": list}
    wrong = [name for name, kind in expected.items() if not isinstance(training.get(name), kind)]
    if not wrong and training["recipe_name"] == recipe_name(recipe):
        for name, default in asdict(type(recipe)()).items():
            value = training["recipe"].get(name, default)
            if not fits(value, default):
                wrong.append(f"recipe.{name} ({value!r})"[:80])
    if wrong:
        raise CheckpointError(f"{file} does not describe a run that can be resumed, see its {', '.join(wrong)}")


def fits(value: object, default: object) -> bool:
    """Whether a field of a recipe may have this value, by its type."""
    if value is None or default is None:
        return default is None and isinstance(value, (str, int, float, type(None)))
    number = (int, float)
    if isinstance(default, number) and not isinstance(default, bool):
        return isinstance(value, number) and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(item, str) for item in value) or value == default
    return type(value) is type(default)


def check_settings(recipe: Recipe, started: Recipe) -> None:
    """A resumed run must continue what it was started with. Raises UserError naming the settings that changed."""
    free, out = {*PLACES, *HOW, *LENGTH}, out_folder(recipe)
    old, new = asdict(started), asdict(recipe)
    changed = [f"{flag(k)} was {old[k]!r}, now {new[k]!r}" for k in new if k not in free and old[k] != new[k]]
    if changed:
        raise UserError(
            f"these settings differ from those of the run in {out}: {'; '.join(changed)}. Omit them to resume it, or choose "
            "another --out"
        )


def check_length(task: Task, started: Recipe, state: dict) -> None:
    """A resumed run may become longer or shorter until its learning rates begin to fall: up to there both are the same run.
    state: training.json. Raises UserError after that."""
    recipe = task.recipe
    now, before = task.steps - task.reward_steps, state["steps"] - getattr(started, "reward_steps", 0)
    falling = int((1 - recipe.cooldown) * min(now, before))
    if now != before and state["step"] > falling:
        raise UserError(
            f"the run in {out_folder(recipe)} is at step {state['step']} and was started with {before} steps, now {now}: its "
            f"learning rates depend on that from step {falling} on, so it would be another run. Finish it with: "
            f"{resume_command(recipe)}; then train on from it with: {start_from_command(recipe, '--steps', max(1, now - before))}"
        )


def check_same_data(recipe: Recipe, before: dict | None, now: dict) -> None:
    """before, now: fingerprints. Raises ValueError where the data of a run changed before it was resumed."""
    if before is None:
        say(
            "The checkpoint is older than the record of a run's data: whether they are the same is not checked.",
            "yellow",
        )
        return
    found = changes(before, now)
    if found:
        raise UserError(
            f"the data differ from those of the run in {out_folder(recipe)}: {'; '.join(found)}. Restore them to resume the run, "
            f"or train on from it with the new data: {start_from_command(recipe)}"
        )
