"""Files, columns of numbers and statistics underneath robot datasets; what is read is checked, not trusted."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.data.sample import DataError

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as error:
    raise ImportError("robot datasets need the library pyarrow: pip install 'nanochat-vision[robot]'") from error

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATS_PIXELS = 150  # and about how many of their rows and columns


def present(path: Path) -> Path:
    if not os.path.isfile(path):  # not Path.is_file, which raises for names that are too long
        raise FileNotFoundError(f"{path} is missing: this is no dataset of the expected kind, or not all of it")
    return path


def json_lines(path: Path) -> list[dict]:
    lines = enumerate(present(path).read_bytes().split(b"\n"), start=1)
    return [json_object(line, f"{path}:{number}") for number, line in lines if line.strip()]


def json_object(text: bytes, where: object) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} must be a JSON object, found {type(found).__name__}")
    return found


def read_parquet(read, path: Path, **options):
    present(path)
    try:
        return read(path, **options)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}") from error


def is_feature(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("dtype"), str) and isinstance(value.get("shape"), list)


def whole(row: dict, key: str, where: str) -> int:
    """A whole number that is not negative."""
    if type(row.get(key)) is not int or row[key] < 0:
        raise DataError(f"{where}: {key!r} must be a whole number, at least 0, found {row.get(key)!r}")
    return row[key]


def inside(folder: Path, name: object, where: str) -> Path:
    """A file below `folder`. Links there are followed, they are its owner's; names cannot climb out of it."""
    path = os.path.normpath(name) if isinstance(name, str) else ".."
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise DataError(f"{where}: {name!r} is not the path of a file in {folder}")
    return present(folder / path)


def fill(template: object, values: dict) -> str:
    """The path that a template such as "data/chunk-{chunk_index:03d}" means. Not str.format, which does what it is told."""
    try:
        return re.sub(r"\{(\w+)(?::0(\d)d)?\}", lambda m: str(values[m[1]]).zfill(int(m[2] or 0)), template)
    except (KeyError, TypeError) as error:
        raise DataError(f"the path template {template!r} must be text with the fields {', '.join(values)}") from error


def to_arrow(column: np.ndarray) -> pa.Array:
    """(T,) or (T, D) -> T numbers or T lists of D."""
    flat, width = pa.array(column.reshape(-1)), column.size // len(column)
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def to_numpy(values: pa.ChunkedArray, where: str = "") -> np.ndarray:
    """T numbers or T (nested) lists of equal length -> (T, ...), a copy."""
    array = values.combine_chunks()
    shape = [len(array)]
    array = array.storage if isinstance(array, pa.ExtensionArray) else array  # Array2D of the datasets library
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array)
        if array.null_count or len(lengths.unique()) != 1:
            raise DataError(f"{where}: rows must be lists of the same length, found {lengths.unique().to_pylist()[:9]}")
        shape.append(lengths[0].as_py())
        array = array.flatten()
    if array.null_count or not (pa.types.is_primitive(array.type) or pa.types.is_boolean(array.type)):
        raise DataError(f"{where}: must be numbers, found {array.type} with {array.null_count} missing")
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(shape)


def column_stats(column: np.ndarray) -> dict[str, list]:
    """(T,) or (T, D) -> min, max, mean, std and quantiles, each of length D (or 1), and the count, [T]."""
    x = column.reshape(len(column), -1).astype(np.float64)
    stats = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": np.array([len(x)])}
    stats |= dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in stats.items()}


def value_counts(picture: bytes) -> np.ndarray:
    """(3, 256): how often a channel has a value, in rows and columns that are evenly apart."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))  # (H, W, 3)
    step = max(1, min(pixels.shape[:2]) // STATS_PIXELS)
    return np.stack([np.bincount(pixels[::step, ::step, channel].reshape(-1), minlength=256) for channel in range(3)])


def counted_stats(counts: np.ndarray, n_pictures: np.ndarray) -> dict[str, list]:
    """column_stats of pixels in 0..1 from the (3, 256) counts of their values: each (3, 1, 1), and the count of pictures."""
    values, below, total = np.arange(256) / 255, counts.cumsum(1), counts.sum(1)  # (256,), (3, 256), (3,)
    mean = counts @ values / total
    stats = {"mean": mean, "std": np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / total)}
    for name, share in ({"min": 0.0, "max": 1.0} | QUANTILES).items():
        stats[name] = values[(below > share * (total[:, None] - 1)).argmax(1)]
    return {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()} | {"count": [int(n_pictures)]}


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> a PNG file, large but quickly made."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def video_frames(path: Path, start: float, length: int, fps: float) -> list[bytes]:
    """`length` pictures of a video from `start` seconds on, as PNG files."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: cameras that are videos need the library PyAV: pip install av") from error
    pictures: list[bytes] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                if round((frame.time - start) * fps) == len(pictures):
                    pictures.append(png(frame.to_ndarray(format="rgb24")))
                if len(pictures) == length:
                    break
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from error
    if len(pictures) != length:
        raise DataError(f"{path} must have {length} frames from {start} s on at {fps} a second, found {len(pictures)}")
    return pictures


def hf_features(features: dict[str, dict]) -> dict[str, dict]:
    """The same for the datasets library, which looks for it in the parquet files."""
    found = {}
    for key, feature in features.items():
        value = {"_type": "Value", "dtype": feature["dtype"]}
        rows = {"_type": "Sequence", "feature": value, "length": feature["shape"][0]}
        found[key] = {"_type": "Image"} if feature["dtype"] == "image" else value if feature["shape"] == [1] else rows
    return found


def tasks_table(tasks: dict[str, int]) -> pa.Table:
    """What pandas reads as a frame with the column task_index and the instructions as its index."""
    index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [index]}
    arrays = {"task_index": pa.array(tasks.values()), "task": pa.array(tasks)}
    return pa.table(arrays, metadata={"pandas": json.dumps(pandas)})
