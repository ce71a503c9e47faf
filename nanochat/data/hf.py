"""Hugging Face datasets with `messages` and `images` columns (the form that TRL trains on), or with `image` and
`question`/`answer` or `caption`: parquet and JSON files, folders, saved datasets, and names on the hub.

Rows are read as Arrow data, past the library's image decoding, so that pictures stay encoded bytes; all of these bytes
are held in memory. Parquet files are read in place, everything else goes through the cache of the datasets library.
"""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

from nanochat.data.sample import (
    DataError,
    Dataset,
    Sample,
    check_text,
    cut,
    find_image,
    row_sample,
    task_of,
    tidy_messages,
    written_whole,
)
from nanochat.vision.images import ImageSource, file_bytes, open_image

ROWS_AT_ONCE = 100


def load(source: str | Path, split: str | None = None, strict: bool = False) -> Dataset:
    """Samples of a .parquet, .json or .jsonl file, a folder, or a dataset on the hub ("owner/name").

    "fit" and "val" are cut by image from "train" where the source has no validation split. For every other split name
    a file is read whole; of anything else, "train" is the default.

    Raises:
        ImportError: the datasets library is not installed.
        DataError: unreadable source, no such split; a malformed row, with its number; with `strict`, a missing picture.
    """
    datasets, _ = _libraries()
    path = Path(source).expanduser()
    rows, part = _read(source, path, split)
    # pictures that are not inside the data must lie beside it, or where the library unpacked them
    root = path.parent if path.is_file() else path if path.is_dir() else Path(datasets.config.HF_CACHE_HOME)
    samples, skipped, tasks = [], 0, set()
    for number, row in enumerate(rows):
        where = f"{source}: row {number}"
        images = [_image(value, root, where, strict) for value in _as_list(row, "images", "image")]
        task, sample = _sample(row, images, where)
        tasks.add(task)
        if len(tasks) > 1:
            raise DataError(f"{where}: {' and '.join(sorted(tasks))} rows in one dataset; it has to be of one kind")
        if None in images:
            skipped += 1
        else:
            samples.append(sample)
    name = f"{path.stem}/{split}" if split else path.stem
    task = task_of(samples) if tasks == {"messages"} else next(iter(tasks), "vqa")
    return Dataset(name, task, cut(samples, part, root), skipped)


def _libraries():
    """(datasets, pyarrow), imported on use because that takes a second."""
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Hugging Face data needs the library datasets: pip install -e '.[train]'") from error
    return datasets, pyarrow


def _read(source: str | Path, path: Path, split: str | None) -> tuple[list[dict], str | None]:
    """All rows with encoded pictures, and "fit" or "val" if the samples are still to be cut."""
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
    """(datasets.Dataset, "fit" or "val" if it is to be cut)"""
    if path.is_file():
        return datasets.load_dataset("json", data_files=str(path), split="train"), _own_part(path, split)
    if (path / "state.json").is_file():  # one split, as save_to_disk leaves it
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
    """The split to read, and "fit" or "val" if it is to be cut."""
    split = split or "train"
    own = {"val": "validation"}.get(split, split)  # the hub's name
    for name in (split, own):
        if name in names:
            return name, None
    if split in ("fit", "val") and "train" in names:
        whole = split == "fit" and ("val" in names or "validation" in names)
        return "train", None if whole else split
    raise DataError(f"{source}: there is no split {split!r}; it has: {', '.join(names)}")


def _as_list(row: dict, *names: str) -> list:
    """The first of these fields that the row has, as a list."""
    value = next((row[name] for name in names if row.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _sample(row: dict, images: list[ImageSource | None], where: str) -> tuple[str, Sample]:
    if row.get("messages") is not None:
        references = [check_text(text, "references", where) for text in _as_list(row, "references")]
        return "messages", Sample(tuple(images), tidy_messages(row["messages"], len(images), where), tuple(references))
    if len(images) != 1:
        raise DataError(f"{where}: expected 'messages' and 'images', or one 'image', found {', '.join(map(repr, row))}")
    texts = {name: value for name, value in row.items() if value is not None}  # Arrow fills absent fields with None
    return row_sample(texts, images[0], where)


def _image(value: object, root: Path, where: str, strict: bool) -> bytes | Path | None:
    """The encoded bytes of a picture, or its path, or None if there is no such file."""
    if isinstance(value, dict) and value.get("bytes"):
        return value["bytes"]
    if isinstance(value, bytes) and value:
        return value
    name = value.get("path") if isinstance(value, dict) else value
    for base in (root.absolute(), root.resolve()):  # the library writes paths in full, sometimes with links followed
        if isinstance(name, str) and Path(name).is_relative_to(base):
            name = str(Path(name).relative_to(base))
    return find_image(root, name, where, strict)


def write(samples: Iterable[Sample], path: str | Path) -> None:
    """Write a parquet file with the columns messages, images and references, pictures inside; all of it or nothing.

    Raises:
        ImportError: the datasets library is not installed.
        ImageError: a picture cannot be read. OSError: the file cannot be written.
    """
    datasets, pyarrow = _libraries()
    text = datasets.Value("string")
    schema = datasets.Features(  # its Arrow form carries the note by which the library knows an image
        {
            "messages": [{"role": text, "content": [{"type": text, "text": text}]}],
            "images": [datasets.Image()],
            "references": [text],
        }
    ).arrow_schema
    file = Path(path).expanduser()
    with written_whole(file) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        rows = map(_row, samples)
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def _row(sample: Sample) -> dict:
    messages = []
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({"role": message["role"], "content": parts})
    images = [{"bytes": _encoded(image), "path": None} for image in sample.images]
    return {"messages": messages, "images": images, "references": list(sample.references)}


def _encoded(image: ImageSource) -> bytes:
    """The bytes of a picture's file as they are; pixels that come from no file as PNG."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, (str, Path)):
        return file_bytes(Path(image))
    if isinstance(image, bytes):
        return image
    png = io.BytesIO()
    open_image(image).save(png, "PNG")
    return png.getvalue()
