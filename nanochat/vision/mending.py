"""Image files with small damage that every viewer shows: what Pillow refuses in them is left out or completed. No torch.

PNG: chunks that are not needed for the pixels (profiles, texts, wrong checksums). JPEG: the end, where hardly a row of the
picture is missing. Nothing is mended in a file that Pillow reads.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that are kept: pixels, transparency, orientation, and animation, which is refused later
PNG_NEEDED = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
MAX_LOST = 0.1  # share of the rows of a JPEG that may be missing
SCALE = 8  # JPEG decoders can give an eighth of the size at an eighth of the cost


def mended(data: bytes) -> tuple[bytes, str] | None:
    """(bytes of the same picture without the damage, what is missing in it or ""); None where nothing can be mended, or too much
    is lost."""
    if data.startswith(PNG_SIGNATURE):
        return needed_chunks(data)
    if data.startswith(JPEG_START):
        return completed_jpeg(data)
    return None


def needed_chunks(data: bytes) -> tuple[bytes, str] | None:
    """A PNG without the chunks that its pixels do not need, and without optional ones whose checksum is wrong."""
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        critical = not kind[0] & 0x20  # as PNG defines it: an upper-case letter
        intact = end <= len(data) and zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
        if kind in PNG_NEEDED and (critical or intact):
            kept.append(data[at:end])
        at = end
    found = b"".join(kept)
    return (found, "") if len(found) < len(data) else None


def completed_jpeg(data: bytes) -> tuple[bytes, str] | None:
    """A JPEG with an end marker, if at most MAX_LOST of its rows are missing.

    Decoders fill what is missing, and do not say how much that is. So the file is continued in two arbitrary ways: rows that
    come out different are those that it lacks.
    """
    data = data.rstrip(b"\xff")  # half a marker
    if not all_scans_begun(data):
        return None
    first, second = (rows_of(data + continuation(data, filler) + JPEG_END) for filler in (b"\x00", b"\x55"))
    if first.shape != second.shape:
        return None
    lost = int((first != second).any(axis=1).sum())
    n_rows = len(first)
    if lost > max(MAX_LOST * n_rows, 2) or 2 * lost > n_rows:
        return None
    return data + JPEG_END, f"the file is cut off: up to {lost / n_rows:.0%} of its rows are grey" if lost else ""


def continuation(data: bytes, filler: bytes) -> bytes:
    """Arbitrary compressed data. A JPEG with restart markers gets them, since a decoder leaves out what is between two of them
    where it does not find the right number."""
    if not any(marker == 0xDD and any(segment) for marker, segment in segments(data)):
        return filler * 4096
    at = max(data.rfind(bytes([0xFF, 0xD0 + number])) for number in range(8))
    next_number = (data[at + 1] - 0xD0 + 1) % 8 if at > 0 else 0
    return b"".join(filler * 64 + bytes([0xFF, 0xD0 + (next_number + i) % 8]) for i in range(4096))


def rows_of(data: bytes) -> np.ndarray:
    """The rows of a JPEG as grey values, at about an eighth of its size."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.draft("L", (max(1, image.width // SCALE), max(1, image.height // SCALE)))
        return np.asarray(image.convert("L"))


def all_scans_begun(data: bytes) -> bool:
    """Whether the last bits of every component are at least begun. A progressive JPEG comes in several scans, from coarse to
    fine: one that lacks whole scans would be blurred."""
    components: set[int] = set()
    final_dc, final_ac = set(), set()
    for marker, segment in segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) >= 6:  # the frame's header
            components = set(segment[6 : 6 + 3 * segment[5] : 3])
        if marker == 0xDA and segment and len(segment) >= 4 + 2 * segment[0]:
            n = segment[0]
            first, last, bits = segment[1 + 2 * n : 4 + 2 * n]
            if bits & 15 == 0:
                scanned = set(segment[1 : 1 + 2 * n : 2])
                final_dc |= scanned if first == 0 else set()
                final_ac |= scanned if last == 63 else set()
    return bool(components) and components <= final_dc and components <= final_ac


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of a JPEG's segments. Compressed data between them is skipped."""
    at = 2
    while 0 <= at < len(data) - 3:
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD9:  # compressed data, fill bytes
            at = data.find(b"\xff", at + 1)
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + max(2, length)
