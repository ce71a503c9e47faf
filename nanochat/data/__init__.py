"""Images and conversations from files: one small module per source; all of them return the same sample type."""

import os
from pathlib import Path

from nanochat.data import caption_questions, easy_vqa, folder, hf, jsonl, llava, pairs, several_photos, table
from nanochat.data.image_files import is_picture, short
from nanochat.data.sample import CAPTION_PROMPT, Dataset, Sample, image_key, limit, one_per_reference
from nanochat.data.splits import picture_groups
from nanochat.files import DataError

__all__ = [
    "CAPTION_PROMPT",
    "DataError",
    "Dataset",
    "Sample",
    "image_key",
    "limit",
    "load_dataset",
    "made_of",
    "one_per_reference",
    "own_splits",
    "picture_groups",
]

READABLE = (
    "readable are: easy_vqa; pairs; captions-questions:DATA; captions-several:DATA; .csv and .tsv with a header "
    "(file,caption or file,question,answer), .jsonl, .json (LLaVA, COCO captions) and .parquet files; folders with such "
    "files, with {split}.jsonl, with metadata.csv, or with a .txt next to each picture; hf:owner/name from the hub. "
    "docs/DATA.md has the fields"
)
READERS = {".jsonl": jsonl, ".json": llava, ".parquet": hf, ".csv": table, ".tsv": table}
DRAWN = {"easy_vqa": easy_vqa, "pairs": pairs}
FROM_CAPTIONS = {
    caption_questions.PREFIX: caption_questions.questions_dataset,
    several_photos.PREFIX: several_photos.several_dataset,
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".xz", ".zst")


def load_dataset(name_or_path: str | Path, split: str | None = "train", strict: bool = False) -> Dataset:
    """Read a dataset by name or path.

    split: one of the source's own; "val" is its validation split or, if it has none, a fixed tenth of the images of
        "train", and "fit" is the rest of "train". A source without splits of its own has "fit", "val" and "all" ("train"
        is another name of "all").
    strict: a missing image raises DataError; otherwise its row is left out and counted in `Dataset.skipped`.

    Raises:
        DataError: there is nothing readable, no such split, or a malformed row; the message names file and line.
        ImportError: the source needs a package that is not installed; the message names it.
    """
    prefix, source = made_of(name_or_path)
    if prefix:
        return FROM_CAPTIONS[prefix](load_dataset(source, split, strict))
    kind, place = _find(name_or_path)
    return kind.load(place, split, strict)


def made_of(name_or_path: str | Path) -> tuple[str, str]:
    """("captions-questions:", DATA) of "captions-questions:DATA", so also of the other prefix of questions that are made from
    captions; otherwise ("", the name)."""
    name = str(name_or_path)
    prefix = next((prefix for prefix in FROM_CAPTIONS if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)


def own_splits(name_or_path: str | Path) -> list[str]:
    """The splits that a source has itself; none if it is one file or folder from which "fit" and "val" are cut.
    Raises as `load_dataset`."""
    prefix, source = made_of(name_or_path)
    if prefix:
        return own_splits(source)
    kind, place = _find(name_or_path)
    if kind in (easy_vqa, pairs):
        return list(kind.OWN_SPLITS)
    if kind is folder:
        return folder.own_splits(Path(place))
    return hf.hub_splits(str(place)) if kind is hf and not os.path.isfile(place) else []


def _find(name_or_path: str | Path):
    """(the module that reads it, what it reads)"""
    name = str(name_or_path)
    if name in DRAWN:
        return DRAWN[name], name
    on_hub = name.startswith("hf:")
    path = _expanded(name.removeprefix("hf:"))
    if os.path.isdir(path):
        return folder, path
    if os.path.isfile(path) and path.suffix.lower() in READERS:
        return READERS[path.suffix.lower()], path
    if on_hub and not path.exists():
        return hf, name.removeprefix("hf:")
    raise DataError(f"cannot read the dataset {short(name)!r}: {_reason(name, path)}; {READABLE}")


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise DataError(f"cannot read the dataset {name!r}: {error}") from error


def _reason(name: str, path: Path) -> str:
    if "://" in name:
        return "it is a URL, and URLs are not fetched: download the data and name the folder"
    if not os.path.exists(path):
        return "there is no such file or folder"
    if path.suffix.lower() in ARCHIVES:
        return "it is an archive: unpack it and name the folder"
    return "it is a picture: name its folder" if is_picture(path.name) else "unknown kind of file"
