"""Which rows belong to a split. A source has splits of its own (train.jsonl, val.jsonl), or they are cut from its pictures."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from nanochat.data.sample import Sample, image_key
from nanochat.files import DataError

VAL_SHARE = 0.1  # of the images, where a source has no validation split of its own
VALIDATION = ("val", "validation", "valid")  # names of one split
OWN_VALIDATION = (*VALIDATION, "dev")  # what a source may call its own; the first that it has is "val"
WHOLE = ("all", "train")  # of a source without splits of its own; "fit" and "val" divide it


def choose_split(source: object, names: Sequence[str], split: str | None) -> tuple[str, str | None]:
    """(the source's own split to read, "fit" or "val" if that has to be cut from it).

    names: the source's own splits; split: the wanted one, by default "train". "val" is the source's own validation split
    (also one named "dev"), otherwise a tenth of the images of "train"; "fit" is what "val" leaves of "train".

    Raises:
        DataError: there is no such split; the message lists those that there are.
    """
    split = split or "train"
    own = next((name for name in OWN_VALIDATION if name in names), None)
    wanted = "val" if split in VALIDATION else split
    if split in names:
        return split, None
    if wanted == "val" and own:
        return own, None
    if wanted in ("fit", "val") and "train" in names:
        return "train", None if own else wanted
    derived = [name for name in ("fit", "val") if name not in names] if "train" in names else []
    raise DataError(
        f"{source}: there is no split {split!r}; it has: {', '.join(names) or 'none'}"
        + (f", and {' and '.join(derived)} from train" if derived and not own else "")
    )


def whole_split(source: object, split: str | None, own: str = "") -> str | None:
    """For a source without splits of its own: "fit" or "val" if that part has to be cut from it, or None for the whole.

    own: the name of the whole, such as the stem of the file. Raises DataError for other names than "fit", "val" and those
    of the whole.
    """
    if split is None or split in WHOLE or split == own:
        return None
    if split == "fit" or split in VALIDATION:
        return "fit" if split == "fit" else "val"
    raise DataError(f"{source}: there is no split {split!r}; it has: all, and fit and val from it")


def cut(samples: list[Sample], split: str | None, root: Path | None = None, name: str = "the data") -> list[Sample]:
    """The samples of a split: "val", a fixed tenth of the images; "fit", the others; None, all samples.

    No image is in both: images that share a sample stay together, and so do those that such samples connect. The groups
    are chosen by the hash of their keys, which are paths below `root`: a folder that has moved gives the same splits.

    Raises:
        DataError: all samples belong together, so none can be held out.
    """
    if split not in ("fit", "val"):
        return samples
    keys = [_keys(sample, root) for sample in samples]
    groups = connected(keys)
    members: dict[str, int] = {}
    for group in groups.values():
        members[group] = members.get(group, 0) + 1
    if len(members) < 2:
        raise DataError(f"{name}: {_too_few(len(groups))}")
    held_out = _held_out(members)
    return [
        sample for sample, own in zip(samples, keys, strict=True) if (groups[own[0]] in held_out) == (split == "val")
    ]


def connected(keys: Sequence[Sequence[str]]) -> dict[str, str]:
    """{key: its group}. Keys of one row belong together, also over several rows. A group is named by its first key in the
    alphabet."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for first, *others in filter(None, keys):
        here = find(first)
        for other in others:
            there = find(other)
            low, high = min(here, there), max(here, there)
            parent[high] = here = low
    return {key: find(key) for key in parent}


def picture_groups(samples: Sequence[Sample]) -> dict[str, str]:
    """{image key: group} of all pictures: those that some sample shows together are in one group, see `connected`."""
    return connected([[image_key(image) for image in sample.images] for sample in samples])


def _keys(sample: Sample, root: Path | None) -> list[str]:
    if not sample.images:
        return [repr(sample.messages)]
    return [
        os.path.relpath(image, root) if root is not None and isinstance(image, Path) else image_key(image)
        for image in sample.images
    ]


def _held_out(members: dict[str, int]) -> set[str]:
    """Groups with together a tenth of the images, at least one image. members: the number of images of each group."""
    drawn = sorted(members, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    target = max(1, round(VAL_SHARE * sum(members.values())))
    chosen, room = set(), target
    for group in drawn:
        if members[group] <= room:
            chosen.add(group)
            room -= members[group]
        if room == 0:
            break
    return chosen or {min(drawn, key=lambda group: members[group])}  # every group is larger than a tenth


def _too_few(n_pictures: int) -> str:
    advice = "or use one split twice: --train-split all --val-split all"
    if n_pictures < 2:
        return (
            f"found {n_pictures} usable picture, but training needs at least 2, one of them to validate with: add pictures, "
            + advice
        )
    return (
        f"rows with several pictures connect all {n_pictures} pictures, so none can be held out for validation: give "
        f"train.jsonl and val.jsonl in one folder, {advice}"
    )
