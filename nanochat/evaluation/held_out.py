"""Which part of a dataset to evaluate a checkpoint on, and whether the checkpoint was trained on it. This module does not
import torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.data import DataError, Sample, image_key, load_dataset, made_of, own_splits
from nanochat.data.splits import OWN_VALIDATION, WHOLE

HELD_OUT = "the part that training held out (--split chooses another)"


@dataclass
class Overlap:
    """How many of the pictures to evaluate are pictures that the model was trained on. note: a line for the user, or ""."""

    trained_on: int | None  # None: the training data is not here
    note: str


def default_split(dataset: str, recipe: dict, earlier: Sequence[dict] = ()) -> tuple[str, str]:
    """(the split to evaluate if the user names none, why it).

    recipe: of the checkpoint's training; may be empty. earlier: of the runs that it started from. Raises DataError for data that
    cannot be read.
    """
    own = own_splits(dataset)
    if "test" in own:
        return "test", "its test split"
    _, pictures = made_of(dataset)
    run = next((run for run in (recipe, *earlier) if was_trained_on(run, pictures)), None)
    if run is not None:
        split = run.get("val_split") or "val"
        is_held_out = split not in (run.get("train_split"), *WHOLE)
        return split, HELD_OUT if is_held_out else "the split that training validated with"
    named = next((name for name in OWN_VALIDATION if name in own), None)
    if named:
        return named, "its validation split"
    if "train" in own:
        return "train", "its only split" if len(own) == 1 else f"it has the splits {', '.join(own)}"
    return ("all", "all of it") if not own else (own[0], f"it has the splits {', '.join(own)}")


def runs_of(training: dict) -> list[dict]:
    """The recipe of a checkpoint's training, {} if it names none, and those of the runs that it started from, the last first."""
    return [training.get("recipe") or {}, *(training.get("earlier") or [])[::-1]]


def was_trained_on(run: dict, dataset: str) -> bool:
    """Whether a run, by its recipe, read this data set."""
    return any(same_data(dataset, name) for name in sources_of(run))


def sources_of(run: dict) -> list[str]:
    """The data sets whose pictures a run was trained on, from its recipe."""
    return [made_of(name)[1] for name in (run.get("data"), *(run.get("also") or ())) if name]


def same_data(dataset: str, trained_on: str) -> bool:
    """Whether a dataset is the one that a model was trained on, by its path. A relative path of the recipe may have been
    relative to another folder; then its end is compared."""
    if not trained_on or dataset == trained_on:
        return bool(trained_on)
    here, there = Path(os.path.realpath(_expanded(dataset))), _expanded(trained_on)
    candidates = {Path(os.path.realpath(there))}
    candidates |= {place.parent for place in candidates if _is_index(place)}  # a folder is the same as its captions.csv
    places = {here, here.parent} if _is_index(here) else {here}
    if places & candidates:
        return True
    parts = tuple(part for part in there.parts if part not in ("..", "."))
    if there.is_absolute() or there.exists() or not parts:
        return False
    return any(place.parts[-len(parts) :] == parts for place in places)


def training_overlap(samples: Sequence[Sample], recipe: dict, earlier: Sequence[dict] = ()) -> Overlap:
    """Compares the pictures with those of the training run, and of the earlier runs whose weights it started from."""
    known, read, gone = set(), False, ""
    sources = [(name, run.get("train_split") or "fit") for run in (recipe, *earlier) for name in sources_of(run)]
    for source, split in dict.fromkeys(sources):
        try:
            trained = load_dataset(source, split).samples
        except (DataError, ImportError, OSError):
            gone = gone or source
            continue
        read = True
        known |= {identity(image) for sample in trained for image in sample.images}
    shown = {identity(image) for sample in samples for image in sample.images}
    both = len(known & shown)
    if both:
        note = f"{both} of these {len(shown)} pictures are training pictures: the score says little about others"
    elif gone:
        note = f"the training data {gone} is not here: whether the model knows these pictures was not checked"
    else:
        note = ""
    checked = read and not gone
    return Overlap(both if both or checked else None, note)


def identity(image) -> str:
    """The same for the same file, however its path is written, and for the same bytes."""
    return os.path.realpath(image) if isinstance(image, (str, Path)) else image_key(image)


def _is_index(path: Path) -> bool:
    """Whether a file is the one that makes a folder readable."""
    return path.stem.lower() in ("captions", "metadata") and path.suffix != ""


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of an unknown user
        return Path(name)
