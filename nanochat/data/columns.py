"""Parquet columns as numpy arrays, and checks of what a robot dataset says about them: such files are not trusted."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.errors import install
from nanochat.files import DataError, existing_file, short_repr

LFS_POINTER = b"version https://git-lfs"

try:  # other modules take these from here, so that the message stands in one place
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(f"robot datasets need the library pyarrow: {install('robot')}") from error

__all__ = [
    "Layout", "check_fetched", "column_names", "file_layout", "fill_template", "is_camera", "is_feature", "natural_number",
    "number_names", "pa", "parquet_errors", "pc", "places_of", "pq", "read_groups", "read_parquet", "read_rows",
    "to_arrow", "to_numpy",
]  # fmt: skip


@contextmanager
def parquet_errors(where: object) -> Iterator[None]:
    """Makes DataErrors of what pyarrow raises for a broken file, also while its values are converted. where: the file, or the
    place in it."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read as parquet: {str(error).splitlines()[0][:200]}") from error


def read_parquet(read, path: Path, **options):
    """read(path, **options), for a reading function of pyarrow.parquet.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read as parquet.
    """
    existing_file(path)
    with parquet_errors(path):
        check_fetched(path)
        try:
            return read(path, **options)
        except OSError as error:
            raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}") from error


def check_fetched(path: Path) -> None:
    """Raises DataError for what git leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path} is a pointer of git-lfs, not the file: fetch it with git lfs pull")


def column_names(path: Path) -> list[str]:
    """The columns of a file. Raises as `read_parquet`."""
    with parquet_errors(path):
        return read_parquet(pq.read_schema, path).names


@dataclass(frozen=True)
class Layout:
    """What a file says of itself. columns: their names. leaves: these and the fields in them, such as "front.path". empty: leaves
    without any value. spans: (n, 2) float64, the first and the last episode_index of each row group, as far as the file says.
    metadata: its footer, which grows with the number of groups: read once, as reading it for every group takes quadratic time."""

    columns: frozenset[str]
    leaves: frozenset[str]
    empty: frozenset[str]
    spans: np.ndarray
    metadata: pq.FileMetaData


def file_layout(path: Path) -> Layout:
    """Raises as `read_parquet`."""
    with parquet_errors(path):
        return layout_of(read_parquet(pq.read_metadata, path), column_names(path))


def layout_of(metadata: pq.FileMetaData, columns: list[str]) -> Layout:
    leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    with_values: set[str] = set()
    spans = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        span = (-math.inf, math.inf)
        for number, leaf in enumerate(leaves):
            found = group.column(number).statistics
            if found is None or not found.has_null_count or found.null_count < group.num_rows:
                with_values.add(leaf)
            if leaf == "episode_index" and found is not None and found.has_min_max and type(found.min) is int:
                span = (found.min, found.max)
        spans.append(span)
    empty = frozenset(leaves) - with_values
    return Layout(frozenset(columns), frozenset(leaves), empty, np.array(spans, float).reshape(-1, 2), metadata)


def read_groups(path: Path, groups: list[int], columns: list[str], layout: Layout) -> pa.Table:
    """Some columns of some row groups of a file. A column may be a field of one, "front.path". Raises as `read_parquet`, and
    DataError for a column that is not there."""
    if missing := [name for name in columns if name not in layout.columns | layout.leaves]:
        raise DataError(f"{path} has no column {', '.join(missing)}, which meta/info.json describes or training needs")

    def read(path: Path) -> pa.Table:
        with pq.ParquetFile(path, metadata=layout.metadata) as file:
            return file.read_row_groups(groups, columns=columns)

    return read_parquet(read, path)


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict]:
    """The rows of a file. Raises as `read_parquet`."""
    with parquet_errors(path):
        return read_parquet(pq.read_table, path, columns=columns, partitioning=None).to_pylist()


def is_feature(value: object) -> bool:
    """Whether this describes a column as meta/info.json does: an object with a dtype and a shape."""
    return isinstance(value, dict) and isinstance(value.get("dtype"), str) and isinstance(value.get("shape"), list)


def number_names(feature: dict, width: int) -> list[str]:
    """The names that meta/info.json gives to the `width` numbers of a column; [] if it gives none, or another count.
    They may be a list, a list in a list, lists by group ({"motors": [...]}), or name -> place ({"x": 0})."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = list(names.values()) if all(isinstance(group, list) for group in names.values()) else list(names)
    if isinstance(names, list) and all(isinstance(group, list) for group in names):
        names = [name for group in names for name in group]
    is_complete = isinstance(names, list) and len(names) == width and all(isinstance(name, str) for name in names)
    return names if is_complete else []


def is_camera(feature: dict) -> bool:
    """Whether the column has colour pictures. Depth maps are stored as videos too, and are none."""
    about = [feature.get(key) for key in ("info", "video_info")]
    flags = [
        found.get(key) for found in about if isinstance(found, dict) for key in ("video.is_depth_map", "is_depth_map")
    ]
    return feature["dtype"] in ("image", "video") and not any(flags)


def natural_number(row: dict, key: str, where: str) -> int:
    """row[key]. Raises DataError if it is not an integer of at least 0."""
    if type(row.get(key)) is not int or row[key] < 0:
        raise DataError(f"{where}: {key!r} must be an integer, at least 0, found {short_repr(row.get(key))}")
    return row[key]


def fill_template(template: object, values: dict) -> str:
    """The path that a template such as "data/chunk-{chunk_index:03d}" stands for. Raises DataError for unknown fields.

    Not str.format: a template from a file could read any attribute with it.
    """
    try:
        return re.sub(r"\{(\w+)(?::0(\d)d)?\}", lambda m: str(values[m[1]]).zfill(int(m[2] or 0)), template)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the path template {short_repr(template)} must be text with the fields {', '.join(values)}"
        ) from error


def to_arrow(column: np.ndarray) -> pa.Array:
    """(T,) or (T, D) -> T numbers or T lists of D."""
    flat, width = pa.array(column.reshape(-1)), column.size // len(column)
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def to_numpy(values: pa.ChunkedArray, where: str = "") -> np.ndarray:
    """T numbers or T (nested) lists of equal length -> (T, ...), a copy. Missing floats become NaN."""
    array = values.combine_chunks()
    shape = [len(array)]
    array = array.storage if isinstance(array, pa.ExtensionArray) else array  # Array2D of the datasets library
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array)
        if array.null_count or len(lengths.unique()) != 1:
            raise DataError(f"{where}: rows must be lists of the same length, found {other_row(array, lengths)}")
        shape.append(lengths[0].as_py())
        array = array.flatten()
    if not (pa.types.is_primitive(array.type) or pa.types.is_boolean(array.type)):
        raise DataError(f"{where}: must be numbers, found {array.type}")
    if array.null_count and not pa.types.is_floating(array.type):  # a missing float becomes NaN
        frame = array.is_null().index(True).as_py() // max(1, math.prod(shape[1:]))
        raise DataError(f"{where}: must be numbers, found {array.null_count} missing, the first in frame {frame}")
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(shape)


def places_of(values: np.ndarray) -> dict[float, np.ndarray]:
    """(T,) -> {value: the places that have it, in increasing order}."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=False))  # no value has one empty part


def other_row(lists: pa.Array, lengths: pa.Array) -> str:
    """What differs in a column of lists, for messages."""
    if lists.null_count:
        return f"{lists.null_count} rows without a list, the first in frame {lists.is_null().index(True).as_py()}"
    frame = pc.not_equal(lengths, lengths[0]).index(True).as_py()
    return f"{lengths[0].as_py()} numbers in frame 0 and {lengths[frame].as_py()} in frame {frame}"
