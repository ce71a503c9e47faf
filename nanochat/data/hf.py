"""Hugging Face datasets with `messages` and `images` columns (the form that TRL trains on), or with `image` and
`question`/`answer` or `caption`: parquet and JSON files, folders, saved datasets, and names on the hub.

Rows are read as Arrow data without the library's image decoding, so images stay encoded; all of their bytes are held in
memory. Parquet files are read in place, everything else goes through the cache of the datasets library.
"""

from pathlib import Path

from nanochat.data.sample import (
    Dataset,
    Sample,
    check_text,
    cut,
    dataset_task,
    find_image,
    normal_messages,
    row_sample,
)
from nanochat.files import DataError
from nanochat.vision.images import ImageSource

ROWS_AT_ONCE = 100


def load(source: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Read a .parquet, .json or .jsonl file, a folder, or a dataset on the hub ("owner/name").

    "fit" and "val" are split off by image from "train" if the source has no validation split. For any other split name a
    single file is read as a whole; for other sources the default is "train".

    Raises:
        ImportError: the datasets library is not installed.
        DataError: the source cannot be read, has no such split, or a row is malformed (the message names its number);
            with `strict`, also for a missing image.
    """
    datasets, _ = _libraries()
    path = Path(source).expanduser()
    rows, part = _read(source, path, split)
    # images that are not stored in the rows must be below the data's folder, or where the library unpacked them
    root = path.parent if path.is_file() else path if path.is_dir() else Path(datasets.config.HF_CACHE_HOME)
    samples, skipped, tasks = [], 0, set()
    for number, row in enumerate(rows):
        where = f"{source}: row {number}"
        images = [_image(value, root, where, strict) for value in _as_list(row, "images", "image")]
        task, sample = _sample(row, images, where)
        tasks.add(task)
        if len(tasks) > 1:
            raise DataError(
                f"{where}: {' and '.join(sorted(tasks))} rows in one dataset: split it into one dataset for each"
            )
        if None in images:
            skipped += 1
        else:
            samples.append(sample)
    name = f"{path.stem}/{split}" if split else path.stem
    task = dataset_task(samples) if tasks == {"messages"} else next(iter(tasks), "vqa")
    return Dataset(name, task, cut(samples, part, root), skipped)


def _libraries():
    """(datasets, pyarrow), imported only when used because the import takes a second."""
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Hugging Face data needs the library datasets: pip install -e '.[train]'") from error
    return datasets, pyarrow


def _read(source: str | Path, path: Path, split: str | None) -> tuple[list[dict], str | None]:
    """All rows with encoded images, and "fit" or "val" if that split still has to be cut from them."""
    datasets, pyarrow = _libraries()
    try:
        if path.suffix == ".parquet" and path.is_file():
            part = _own_part(path, split)
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE)
        else:
            table, part = _table(datasets, source, path, split)
            batches = table.with_format("arrow").iter(ROWS_AT_ONCE)
        return [row for batch in batches for row in batch.to_pylist()], part
    except DataError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: the datasets library cannot read it: {error}") from error


def _table(datasets, source: str | Path, path: Path, split: str | None):
    """(datasets.Dataset, and "fit" or "val" if that split still has to be cut from it)"""
    if path.is_file():
        return datasets.load_dataset("json", data_files=str(path), split="train"), _own_part(path, split)
    if (path / "state.json").is_file():  # one split, written by save_to_disk
        return datasets.load_from_disk(path), _own_part(path, split)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        chosen, part = _choose(source, list(splits), split)
        return splits[chosen], part
    name = str(path) if path.is_dir() else str(source)
    chosen, part = _choose(source, datasets.get_dataset_split_names(name), split)
    return datasets.load_dataset(name, split=chosen), part


def _own_part(path: Path, split: str | None) -> str | None:
    return split if split in ("fit", "val") and split != path.stem else None


def _choose(source: str | Path, names: list[str], split: str | None) -> tuple[str, str | None]:
    """The split to read, and "fit" or "val" if that split has to be cut from it."""
    split = split or "train"
    own = {"val": "validation"}.get(split, split)  # its usual name on the hub
    for name in (split, own):
        if name in names:
            return name, None
    if split in ("fit", "val") and "train" in names:
        whole = split == "fit" and ("val" in names or "validation" in names)
        return "train", None if whole else split
    raise DataError(f"{source}: there is no split {split!r}; it has: {', '.join(names)}")


def _as_list(row: dict, *names: str) -> list:
    """The value of the first of these fields that the row has, as a list."""
    value = next((row[name] for name in names if row.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _sample(row: dict, images: list[ImageSource | None], where: str) -> tuple[str, Sample]:
    if row.get("messages") is not None:
        references = [check_text(text, "references", where) for text in _as_list(row, "references")]
        messages = normal_messages(row["messages"], len(images), where)
        return "messages", Sample(tuple(images), messages, tuple(references), (where,))
    if len(images) != 1:
        raise DataError(f"{where}: expected 'messages' and 'images', or one 'image', found {', '.join(map(repr, row))}")
    texts = {name: value for name, value in row.items() if value is not None}  # Arrow fills absent fields with None
    return row_sample(texts, images[0], where)


def _image(value: object, root: Path, where: str, strict: bool) -> bytes | Path | None:
    """The encoded bytes of an image, or its path, or None if there is no such file."""
    if isinstance(value, dict) and value.get("bytes"):
        return value["bytes"]
    if isinstance(value, bytes) and value:
        return value
    name = value.get("path") if isinstance(value, dict) else value
    for base in (root.absolute(), root.resolve()):  # the library stores absolute paths, sometimes with links resolved
        if isinstance(name, str) and Path(name).is_relative_to(base):
            name = str(Path(name).relative_to(base))
    return find_image(root, name, where, strict)
