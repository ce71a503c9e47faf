"""What a run of the recipe `robot` would take from its data, told before it begins."""

from nanochat.data.targets import find_targets
from nanochat.errors import UserError
from nanochat.training.recipes import Robot
from nanochat.training.robot_data import check_rate, chunk_length, describe_columns, open_recipe_data, suited
from nanochat.training.robot_models import fields_of_deltas


def training_plan(recipe: Robot) -> list[str]:
    """Lines for the screen. No picture is decoded. The last line says why the run would be refused, if it would be."""
    lines: list[str] = []
    try:
        folder = open_recipe_data(recipe)
        lines += describe_columns(folder)
        fit, val = folder.numbers("fit"), folder.numbers("val")
        lines.append(f"{len(fit):,} episodes to learn from, {len(val):,} held out to validate with")
        data, held_out = folder.read_numbers("fit"), folder.read_numbers("val")  # what a run refuses raises here
        targets, reason = find_targets(data)
        lines.append(f"actions are {targets} ({reason})")
        check_rate(data, targets)
        chunk = chunk_length(recipe, data)
        lines.append(fields_of_deltas(recipe, chunk, targets, data, held_out)[1])
        lines.append(f"chunks of {chunk} actions, {chunk / folder.fps:.2g} s; {suited(recipe, data).steps:,} steps")
        size, n_pictures = recipe.image_size, (len(data) + len(held_out)) * len(folder.cameras)
        lines.append(f"{n_pictures:,} pictures of {size} pixels, {n_pictures * size**2 * 3 / 1e9:.2g} GB in the cache")
    except (UserError, OSError) as error:
        lines.append(f"it would be refused: {error}")
    return lines
