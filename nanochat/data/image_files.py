"""The pictures that rows name: files below the data's folder, or encoded images in the rows themselves. Nothing is fetched
from the network, and no file outside the folder is read."""

import base64
import binascii
import os
import re
from collections.abc import Iterable
from pathlib import Path

from nanochat.data.sample import check_text
from nanochat.files import DataError, path_inside, short_repr
from nanochat.vision.images import ImageError, ImageSource, open_image

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.I)
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.I)
# How PNG, JPEG, GIF and WebP files begin in base64
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
SHORTEST_BASE64 = 80  # characters; anything shorter with such a beginning is a path
SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .avif .jp2 .tga .qoi .ico .jfif".split())


def find_image(folder: Path, value: object, where: str, strict: bool) -> Path | bytes | None:
    """The image of a row: its encoded bytes, or its file, or None if there is no such file.

    value: a path, relative to `folder` or absolute; a data: URL or base64 text; bytes; or {"bytes", "path"}.

    Raises:
        DataError: the value is none of these, a file outside of the folder, or a URL; with `strict`, also a missing file.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") else value.get("path") or value.get("url")
        if value is None:
            raise DataError(f'{where}: an image must have "bytes" or "path", found neither')
    if isinstance(value, bytes) and value:
        return value
    name = check_text(value, "image", where)
    if DATA_URL.match(name) or (name.startswith(BASE64) and len(name) > SHORTEST_BASE64):
        return _decoded(name, where)
    path = _local_path(folder, name, where)
    if os.path.isfile(path):  # Path.is_file raises for names that are too long
        return path
    if "\\" in name:  # written on Windows
        path = _local_path(folder, name.replace("\\", "/"), where)
        if os.path.isfile(path):
            return path
    if strict:
        raise DataError(f"{where}: the image {short(path)} does not exist")
    return None


def check_decodable(pictures: Iterable[tuple[ImageSource, str]]) -> None:
    """Raises DataError naming the row of the first image that cannot be decoded. pictures: (image, its row)."""
    for image, where in pictures:
        try:
            open_image(image)
        except ImageError as error:
            raise DataError(f"{where}: {error}" if where else str(error)) from error


def is_picture(name: str) -> bool:
    """Whether the file name is one of a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def short(path: object) -> str:
    """A path for messages: one line, not too long."""
    text = str(path)
    if not text.isprintable():
        return short_repr(text)
    return text if len(text) <= 300 else f"{text[:40]}... ({len(text)} characters)"


def _decoded(text: str, where: str) -> bytes:
    encoded = "".join(DATA_URL.sub("", text, count=1).split())
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not valid base64: {error}, found {short_repr(text)}") from error


def _local_path(folder: Path, name: str, where: str) -> Path:
    if name.lower().startswith("file://"):
        name = name[len("file://") :]
    elif URL.match(name):
        raise DataError(
            f"{where}: the image is a URL, and URLs are not fetched: download the pictures below {folder} and name the files, "
            f"found {short_repr(name)}"
        )
    if name.startswith("~/"):
        name = os.path.expanduser(name)
    if not os.path.isabs(name):
        return path_inside(folder, name, where)
    path = os.path.normpath(name)
    for base in (os.path.normpath(folder.absolute()), folder.resolve()):  # also a folder behind a link
        if Path(path).is_relative_to(base):
            return folder / Path(path).relative_to(base)
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, or links in a circle
        resolved = Path(path)
    if resolved.is_relative_to(folder.resolve()):
        return folder / resolved.relative_to(folder.resolve())
    raise DataError(
        f"{where}: expected the path of a file below {folder}, found {short_repr(name)}: move the pictures there, or write "
        "their paths relative to it"
    )
