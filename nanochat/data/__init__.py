"""Images and conversations from files: one small module per source; all of them return the same sample type."""

from pathlib import Path

from nanochat.data import easy_vqa, folder, hf, jsonl, llava
from nanochat.data.sample import (
    CAPTION_PROMPT,
    Dataset,
    Sample,
    image_key,
    limit,
    one_per_reference,
)
from nanochat.files import DataError

__all__ = [
    "CAPTION_PROMPT",
    "DataError",
    "Dataset",
    "Sample",
    "image_key",
    "limit",
    "load_dataset",
    "one_per_reference",
]

READABLE = (
    "readable are: easy_vqa; a .jsonl file (image, and question and answer or captions), a .json file (LLaVA), "
    "a .parquet file (Hugging Face messages and images); a folder with {split}.jsonl, captions.csv, parquet files or a "
    "saved Hugging Face dataset; hf:owner/name from the hub"
)


def load_dataset(name_or_path: str | Path, split: str | None = "train", strict: bool = False) -> Dataset:
    """Read a dataset by name or path.

    split: "val" is the source's own validation split or, if it has none, a fixed tenth of the images of "train"; "fit" is
        the rest of "train". A single file is read as a whole for any other split name.
    strict: a missing image raises DataError; otherwise its row is skipped and counted in `Dataset.skipped`.

    Raises:
        DataError: there is nothing readable, no such split, or a malformed row; the message names file and line.
        ImportError: the source needs a package that is not installed; the message names it.
    """
    name = str(name_or_path)
    if name == "easy_vqa":
        return easy_vqa.load(split or "train", strict)
    if name.startswith("hf:"):
        return hf.load(name.removeprefix("hf:"), split, strict)
    path = Path(name).expanduser()
    if path.is_dir():
        return _reader(path, split).load(path, split, strict)
    if path.is_file() and path.suffix in (".jsonl", ".json", ".parquet"):
        return {".jsonl": jsonl, ".json": llava, ".parquet": hf}[path.suffix].load(path, split, strict)
    found = "unknown kind of file" if path.exists() else "there is no such file or folder"
    raise DataError(f"cannot read the dataset {name!r}: {found}; {READABLE}")


def _reader(path: Path, split: str | None):
    """The module that reads a folder, chosen by the files in it."""
    if any((path / f"{name}.jsonl").is_file() for name in (split, "train")):
        return jsonl
    if (path / "captions.csv").is_file():
        return folder
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or any(path.rglob("*.parquet")):
        return hf
    if any(path.glob("*.jsonl")):
        return jsonl  # its error lists the splits that exist
    raise DataError(f"cannot read the dataset {str(path)!r}: unknown kind of folder; {READABLE}")
