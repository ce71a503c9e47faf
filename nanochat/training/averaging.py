"""`nanochat average`: one model whose weights are the mean of several that were trained on from the same checkpoint (model soups,
Wortsman et al. 2022, arXiv 2203.05482; with the checkpoint itself among them, WiSE-FT, arXiv 2109.01903).

Training on from one checkpoint moves the weights little, so the mean often answers as well as each of them on what that one
learnt, and forgets less of what came before. Models that started from other random weights have no useful mean.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat.checkpoint import load_checkpoint, locate, save_checkpoint
from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.gpt import GPT
from nanochat.packing import terms
from nanochat.training.resuming import first_state

TOLERANCE = 0.1  # how far the ends of two scales may be apart, of their width: each run measures its own data
ADVICE = "average checkpoints that were trained on from the same one"


def average_checkpoints(names: Sequence[str], out: Path) -> GPT:
    """Write the mean of checkpoints to the new folder `out`, and return it. A name that is given twice counts twice. What is no
    weight, such as the scale of a policy's states, is that of the first.

    Raises FileExistsError where `out` exists, UserError for fewer than two or for models of other shapes or vocabularies, and as
    `load_checkpoint`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name for the average")
    if len(names) < 2:
        raise UserError(f"an average needs two checkpoints or more, got {', '.join(names) or 'none'}")
    model, tokenizer, training = load_checkpoint(names[0])
    total, trainings = model.state_dict(), [training]
    for name in names[1:]:
        other, its_tokenizer, training = load_checkpoint(name)
        check_alike(names[0], model, name, other)
        if its_tokenizer.to_json() != tokenizer.to_json():
            raise UserError(f"{names[0]} and {name} have different vocabularies: {ADVICE}")
        for key, value in other.state_dict().items():
            if value.is_floating_point():  # counters, as BatchNorm's of its batches, stay those of the first
                total[key] = total[key] + value
        trainings.append(training)
    model.load_state_dict({key: v / len(names) if v.is_floating_point() else v for key, v in total.items()})
    licences = {path.name: path.read_bytes() for name in names for path in terms(locate(name))}
    save_checkpoint(out, model, tokenizer, joined(trainings), extra=licences)
    return model


def check_alike(name: str, model: GPT, other_name: str, other: GPT) -> None:
    """Raises UserError, naming what differs, for models whose weights do not correspond."""
    ours, theirs = vars(model.config), vars(other.config)
    differ = [
        f"{key} {short_repr(ours.get(key))} and {short_repr(theirs.get(key))}"
        for key in ours | theirs
        if not nearly(ours.get(key), theirs.get(key))
    ]
    shapes, their_shapes = ({key: value.shape for key, value in one.state_dict().items()} for one in (model, other))
    if differ or shapes != their_shapes:
        raise UserError(f"{name} and {other_name} differ in {'; '.join(differ[:3]) or 'their tensors'}: {ADVICE}")


def nearly(ours: object, theirs: object) -> bool:
    """Whether values of two configs are equal or, of numbers that were measured on data (`actions.Scale`), about equal."""
    if ours == theirs or not (is_scale(ours) and is_scale(theirs)):
        return ours == theirs
    low, high = (np.array(ours[end]) for end in ("low", "high"))
    others = [np.array(theirs[end]) for end in ("low", "high")]
    return all(
        other.shape == end.shape and (abs(other - end) <= TOLERANCE * (high - low)).all()
        for end, other in zip((low, high), others, strict=True)
    )


def is_scale(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"low", "high"}


def joined(trainings: Sequence[dict]) -> dict:
    """The record of the first, with the runs of the others among the earlier ones, and what any of them learnt."""
    states = [first_state(training) for training in trainings]
    own, runs = states[0]["earlier"][-1], []
    for run in (run for state in states for run in state["earlier"]):
        if run != own and run not in runs:
            runs.append(run)
    learnt = {key: any(state["learnt"].get(key) for state in states) for key in states[0]["learnt"]}
    images = max(state["images"] for state in states)
    return trainings[0] | {"earlier": runs, "learnt": learnt, "images": images, "averaged": len(trainings)}
