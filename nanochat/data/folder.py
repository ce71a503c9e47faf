"""Folders: the kind of a folder is found by the files in it. docs/DATA.md lists the layouts."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.data import coco, hf, jsonl, llava, table
from nanochat.data.image_files import is_picture
from nanochat.data.rows import MISSING, RowReader
from nanochat.data.sample import Dataset
from nanochat.data.splits import OWN_VALIDATION, choose_split, whole_split
from nanochat.files import DataError, json_object

TABLES = (".csv", ".tsv")
KINDS = (".jsonl", ".json", *TABLES, ".parquet")
KNOWN = ("train", "fit", *OWN_VALIDATION, "test")  # usual names of splits
NO_DATA = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
# train-00000-of-00001.parquet, data/validation.parquet, test/0000.parquet
SHARD = re.compile(r"(.+?)-\d+-of-\d+")
WITHOUT_TEXT = "there is no .txt file with their caption"


@dataclass
class Layout:
    """What there is to read in a folder.

    name: of the layout, for messages. parts: split -> its files; {"": files} if the folder has no splits of its own.
    root: the folder that image paths are relative to, given a file. files: the ones that belong to the layout.
    """

    name: str
    parts: dict[str, list[Path]]
    root: Callable[[Path], Path]
    merge: bool = False
    files: list[Path] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        return [name for name in self.parts if name]


def load(path: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a folder.

    Raises:
        DataError: nothing readable, no such split, or a malformed row (the message names the file and the row); with
            `strict`, also for a missing image.
    """
    folder = Path(path).expanduser()
    layout, *others = layouts(folder, split)
    if layout.splits:
        chosen, part = choose_split(folder, layout.splits, split)
    else:
        chosen, part = "", whole_split(folder, split)
    files = layout.parts[chosen]
    # "photos/val" for val.jsonl as well as for a part that is cut
    name = folder.resolve().name + (f"/{chosen}" if chosen and not part else "")
    reader = RowReader(layout.root(files[0]), strict, layout.merge)
    if layout.name == "text files":
        read_beside(reader, folder, files)
    for file in [] if layout.name == "text files" else files:
        reader.root = layout.root(file)
        for where, row in rows_of(file):
            reader.add(where, row)
    reader.root = folder
    data = reader.dataset(name, part)
    if len(files) > 1 and layout.name != "text files":
        data.notes.append(f"{len(files)} files read: {', '.join(str(file.relative_to(folder)) for file in files[:5])}")
    data.notes += [f"also in {folder}, not read: {name}" for name in unread(folder, [layout, *others])]
    return data


def own_splits(path: Path) -> list[str]:
    """The splits that a folder has itself; none if "fit" and "val" are cut from all of it."""
    return layouts(path, None)[0].splits


def rows_of(file: Path) -> Iterator[tuple[str, dict]]:
    """("file:row", row) of a file, or of a folder that `save_to_disk` has written."""
    if file.is_dir():
        return hf.saved_rows(file)
    kind = file.suffix.lower()
    if kind == ".json":
        found = llava.read_json(file)
        return llava.list_rows(file, found) if isinstance(found, list) else coco.rows(file, found, file.parent)
    return {".jsonl": jsonl.rows, ".csv": table.rows, ".tsv": table.rows, ".parquet": hf.rows}[kind](file)


def layouts(folder: Path, split: str | None) -> list[Layout]:
    """The layouts that the files of a folder fit, the first of them is read.

    Raises:
        DataError: there is none.
    """
    files = [Path(entry) for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)]
    if (folder / "meta/info.json").is_file():
        raise DataError(f"{folder} is a LeRobot dataset, which is read by nanochat train robot and nanochat eval")
    found = [
        saved(folder, files),
        split_files(files, (".jsonl",), (*KNOWN, *filter(None, [split]))),
        captions(files),
        metadata(files),
    ]
    if not any(found):  # this looks into all subfolders
        found = [parquet(folder)]
    found += [
        split_files(files, (".json", *TABLES), KNOWN),
        split_files(files, (".jsonl",), None),
        only_file(files),
    ]
    fitting = [layout for layout in found if layout] or [layout for layout in [text_files(folder)] if layout]
    if not fitting:
        raise DataError(f"cannot read the dataset {str(folder)!r}: {unknown(folder)}")
    first = fitting[0]
    return [
        first,
        *(other for other in fitting[1:] if not {*other.files} & {*first.files} and other.name != "one file"),
    ]


def unread(folder: Path, found: list[Layout]) -> list[str]:
    """What else a folder has: the other layouts that it fits, and data files that belong to none."""
    known = {file for layout in found for file in layout.files}
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in KINDS and file.name not in NO_DATA]
    return [layout.name for layout in found[1:]] + [file.name for file in files if file not in known and file.is_file()]


def saved(folder: Path, files: list[Path]) -> Layout | None:
    """A dataset, or a dictionary of datasets, written by `save_to_disk`."""
    names = {file.name for file in files}
    if "state.json" in names:
        return Layout("a saved dataset", {"": [folder]}, lambda file: folder, files=[folder])
    if "dataset_dict.json" not in names:
        return None
    place = folder / "dataset_dict.json"
    splits = json_object(place.read_bytes(), place).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise DataError(f"{place}: 'splits' must be a list of names")
    parts = {name: [folder / name] for name in splits if os.path.basename(name) == name and (folder / name).is_dir()}
    return Layout("a saved dataset", parts, lambda file: folder, files=[folder]) if parts else None


def split_files(files: list[Path], kinds: tuple[str, ...], names: tuple[str, ...] | None) -> Layout | None:
    """{split}.jsonl and the like, if one of them has one of these names (None: any)."""
    parts: dict[str, list[Path]] = {}
    for file in files:
        stem = file.stem if names is None or file.stem.lower() not in names else file.stem.lower()
        if file.suffix.lower() in kinds and stem.lower() != "metadata" and file.name not in NO_DATA and file.is_file():
            parts.setdefault(stem, []).append(file)
    if not parts or names is not None and not set(parts) & set(names):
        return None
    if names is not None and kinds != (".jsonl",):
        parts = {name: own for name, own in parts.items() if name in names}
    twice = next((own for own in parts.values() if len(own) > 1), None)
    if twice:
        raise DataError(
            f"{twice[0].parent} has {' and '.join(file.name for file in twice)}: name the file that is meant"
        )
    chosen = [file for own in parts.values() for file in own]
    merge = all(file.suffix.lower() in TABLES for file in chosen)
    return Layout(", ".join(file.name for file in chosen), parts, lambda file: file.parent, merge, chosen)


def captions(files: list[Path]) -> Layout | None:
    own = [file for file in files if file.stem.lower() == "captions" and file.suffix.lower() in TABLES]
    return Layout(own[0].name, {"": own[:1]}, lambda file: file.parent, True, own[:1]) if own else None


def metadata(files: list[Path]) -> Layout | None:
    """metadata.csv, .jsonl or .parquet with file_name, as in Hugging Face's image folders: next to the pictures, or in one
    folder for each split."""

    def of(entries: list[Path]) -> list[Path]:
        return [
            f for f in entries if f.stem.lower() == "metadata" and f.suffix.lower() in (".jsonl", *TABLES, ".parquet")
        ]

    if own := of(files):
        return Layout(own[0].name, {"": own[:1]}, lambda file: file.parent, True, own[:1])
    parts = {folder.name: of(sorted(folder.iterdir()))[:1] for folder in files if folder.is_dir()}
    parts = {name: own for name, own in parts.items() if own}
    chosen = [own[0] for own in parts.values()]
    return Layout("metadata files", parts, lambda file: file.parent, True, chosen) if parts else None


def parquet(folder: Path) -> Layout | None:
    """Parquet files anywhere in a folder; the split is in their name or in that of their folder, by default "train"."""
    chosen = [file for file in walk(folder) if file.suffix.lower() == ".parquet" and file.stem.lower() != "metadata"]
    parts: dict[str, list[Path]] = {}
    for file in chosen:
        parts.setdefault(split_in(file.relative_to(folder)), []).append(file)
    shown = chosen[0].name if len(chosen) == 1 else f"{len(chosen)} parquet files"
    return Layout(shown, parts, lambda file: folder, files=chosen) if chosen else None


def split_in(path: Path) -> str:
    """The split in the name of a parquet file: "test-00000-of-00001", "data/validation", "en/dev/0000"."""
    shard = SHARD.fullmatch(path.stem)
    if shard:
        return shard[1]
    for part in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", part.lower())
        for name in ("test", *OWN_VALIDATION, "fit", "train"):
            if name in words:
                return name
    return "train"


def only_file(files: list[Path]) -> Layout | None:
    """The only .json or table of a folder, whatever its name."""
    own = [file for file in files if file.suffix.lower() in (".json", *TABLES) and file.name not in NO_DATA]
    return Layout("one file", {"": own}, lambda file: file.parent, True, own) if len(own) == 1 else None


def text_files(folder: Path) -> Layout | None:
    """Pictures, each with a .txt file of the same name."""
    files = walk(folder)
    texts = {file.with_suffix("") for file in files if file.suffix.lower() == ".txt"}
    pictures = [file for file in files if is_picture(file.name)]
    if not any(file.with_suffix("") in texts for file in pictures):
        return None
    return Layout("text files", {"": files}, lambda file: folder, files=files)


def read_beside(reader: RowReader, folder: Path, files: list[Path]) -> None:
    """Captions in text files next to the pictures: each line that is not empty is one caption of the picture."""
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    unused = dict(texts)
    for picture in filter(lambda file: is_picture(file.name), files):
        text = texts.get(picture.with_suffix(""))
        if text is None:
            if reader.strict:
                raise DataError(f"{picture}: {WITHOUT_TEXT.replace('their', 'its')}")
            reader.leave_out(str(picture), WITHOUT_TEXT)
            continue
        unused.pop(picture.with_suffix(""), None)
        try:
            lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{text}: not text in UTF-8: {error}") from error
        if not lines:
            raise DataError(f"{text}: expected a caption, found an empty file")
        reader.add(str(text), {"image": str(picture.relative_to(folder)), "captions": lines})
    for text in unused.values():
        reader.leave_out(str(text), MISSING)


def walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones. Raises OSError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def unknown(folder: Path) -> str:
    """Why a folder cannot be read."""
    files = walk(folder)
    pictures = sum(is_picture(file.name) for file in files)
    data = [
        str(file.relative_to(folder)) for file in files if file.suffix.lower() in KINDS and file.name not in NO_DATA
    ]
    if data:
        return f"it has no file of a usual name: name one of its files, such as {', '.join(data[:3])}"
    if pictures:
        return (
            f"it has {pictures} pictures but no text about them: write captions.csv with the header file,caption or "
            "file,question,answer, or a .txt file next to each picture"
        )
    return "it is empty" if not files else "unknown kind of folder"
