"""The policy that a run trains: what its config takes from the data, and what it keeps of the policy that it starts from."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from nanochat.actions import Scale, span
from nanochat.cameras import short_names
from nanochat.data.deltas import LAST_NEARER, difference_scale, find_deltas, from_last
from nanochat.data.demonstrations import Demonstrations
from nanochat.errors import UserError
from nanochat.previous_actions import PREVIOUS
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.training.recipes import Robot


def fields_of_data(data: Demonstrations) -> dict:
    """The fields of a policy's config that follow from its data: cameras, ranges, names and rate."""
    has_state = data.state.shape[1] > 0
    return {
        "cameras": short_names(data.cameras),
        "state_scale": asdict(Scale.fit(data.state)) if has_state else {},
        "state_range": span(data.state) if has_state else {},
        "action_scale": asdict(Scale.fit(data.action)),
        "state_names": data.names_of.get("observation.state", []),
        "action_names": data.names_of.get("action", []),
        "fps": data.fps,
    }


def fields_of_deltas(
    recipe: Robot, chunk: int, targets: str, data: Demonstrations, val: Demonstrations
) -> tuple[dict, str]:
    """The fields of a policy's config that say what its network predicts, by --predict, and the same as a line for the screen.
    Raises UserError for delta and last where no number can be a difference."""
    none, asked = {"deltas": [], "delta_scale": {}, "previous": 0}, recipe.predict
    if targets == "relative":
        if asked in ("delta", "last"):
            raise UserError(
                f"--predict {asked} is for absolute targets, but these actions are relative, so they are differences already: "
                "leave it out (or say --targets absolute if they are targets)"
            )
        return none, "the network predicts the actions as they are: they are relative"
    if asked == "absolute":
        return none, "the network predicts the targets as they are (--predict absolute)"
    follows, scale, last, still = from_last(data, chunk)
    chosen = asked == "auto" and recipe.action_head == "continuous" and last < LAST_NEARER * still
    if asked == "last" and not (follows and recipe.action_head == "continuous"):
        why = "no number of the actions follows the state" if not follows else "the action head bins cannot"
        raise UserError(f"--predict last: {why}: leave it out")
    if chosen or asked == "last":
        line = (
            f"the network predicts all {data.action.shape[1]} numbers as differences from the last action sent (repeated, it is "
            f"{last:.3f} half ranges off, the present state {still:.3f}); clients send their last {PREVIOUS} actions along; "
            "to do without: --predict delta, or absolute"
        )
        return {"deltas": follows, "delta_scale": asdict(scale), "previous": PREVIOUS}, line
    deltas, target, difference = find_deltas(data, val, chunk)
    found = (
        f"in held-out episodes a constant difference from the state is {difference:.3f} half ranges off, a constant target "
        f"{target:.3f}"
    )
    if deltas:
        n = f"{len(deltas)} of {data.action.shape[1]} numbers as differences from the state"
        line = f"the network predicts {n} ({found}); to predict the targets as they are: --predict absolute"
        return none | {"deltas": deltas, "delta_scale": asdict(difference_scale(data, deltas, chunk))}, line
    if asked == "delta":
        raise UserError(f"--predict delta: no number of the actions follows the state ({found}): leave it out")
    return none, f"the network predicts the targets as they are ({found})"


def adopted(model: RobotGPT, config: RobotGPTConfig) -> RobotGPT:
    """A policy of `config` with the weights and the encoder of `model`. An action head of another kind is new. A camera has the
    glances of the one with its name; a camera that the model does not know begins with those of the first."""
    new = RobotGPT(config)
    new.init_weights()
    new.attach_encoder(model.vision_encoder)
    kept = model.state_dict()
    if config.action_head != model.config.action_head:
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith("action_head.")}
    for name in [name for name in kept if name.startswith("glances.")]:
        kept[name] = of_cameras(kept[name], model.config.cameras, config.cameras)
    if config.known_rows != model.config.known_rows:  # other numbers: the layer is a new one
        kept.pop("committed_projector.weight", None)
    new.load_state_dict(new.state_dict() | kept)
    return new


def new_cameras(before: Sequence[str], now: Sequence[str]) -> str:
    """Which cameras begin with the weights of another one, as a line for the screen; "" if none does."""
    new = [name for name in now[0 if before else 1 :] if name not in before]
    first = before[0] if before else "the one that there was"
    return (
        f"the model does not know the camera{'s' * (len(new) > 1)} {', '.join(new)}: begins with the weights of {first}"
        if new
        else ""
    )


def of_cameras(rows: torch.Tensor, before: Sequence[str], now: Sequence[str]) -> torch.Tensor:
    """The rows of the cameras `now`, of a tensor with as many rows for each camera of `before` (none: one without a name)."""
    parts = dict(zip(before or [""], rows.chunk(max(1, len(before))), strict=True))
    return torch.cat([parts.get(name, next(iter(parts.values()))) for name in now or [""]])


def check_fits(model: RobotGPT, name: str, data: Demonstrations, folder: str, advice: str) -> None:
    """Raises UserError if the data has states or actions of another size than the model. name, folder: of the model and of the
    data, for the message."""
    for kind, expected, found in (
        ("state", model.config.state_dim, data.state.shape[1]),
        ("action", model.config.action_dim, data.action.shape[1]),
    ):
        if found != expected:
            raise UserError(
                f"{name} has a{'n' if kind == 'action' else ''} {kind} of {expected} numbers, but that of the data in "
                f"{folder} has {found}: {advice}"
            )


def check_cameras(model: RobotGPT, name: str, data: Demonstrations) -> None:
    """Raises UserError if a run would go on with other cameras, or with the same ones in another order."""
    expected, found = model.config.cameras, short_names(data.cameras)
    if found != expected and (expected or len(found) > 1):
        raise UserError(
            f"{name} was trained with {cameras_in_words(expected)}, but the data has {cameras_in_words(found)}: resume it with "
            "its own data, or choose another --out"
        )


def cameras_in_words(names: Sequence[str]) -> str:
    return f"the camera{'s' * (len(names) > 1)} {', '.join(names)}" if names else "one camera"
