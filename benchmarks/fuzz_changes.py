"""How fuzz.py damages inputs: one change of a JSON value, of bytes, or of a file of a known format. Each function returns the
changed copy, and text that says what the change is."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import msgpack
from PIL import Image

from nanochat.data.columns import pa, pq

# ---- changing JSON

DEEP, LONG = "@@DEEP@@", "@@LONG@@"  # written as 100,000 nested lists and as a number of 5,000 digits, see `to_json`
NUMBERS = [0, -1, 1, 2, 3, 255, 65537, 10**6, 2**31, 2**32 + 1, 2**63, 2**64, 10**30, -(10**18), 0.5, -0.0, 29.97, 1e-320, 1e308,
           float("nan"), float("inf"), float("-inf"), LONG]  # fmt: skip
TEXTS = ["", " ", "\0", "\ud800", "a\nb", "\u202e\u200d\U0001f469\u200d\U0001f680", "e\u0301" * 300, "x" * 100_000, "3", "true",
         "../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "~nobody/a", "a\0b", ".", "C:\\a.png", "http://127.0.0.1:9/a.png",
         "data:image/png;base64,AAAA", "{0.__class__}", "{episode_index:0999999d}", "(", "(a+)+$", "(?<=a*)b", "<image>" * 50,
         "<|image|>", "nn.Linear", "float32", "object", "video", "a,b;c", '"']  # fmt: skip
OTHERS = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"type": "image"},
    {"type": "text"},
    [0] * 2000,
    ["a"] * 300,
    DEEP,
]


def to_json(value: object) -> str:
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "7" * 5000)


def places(value: object, rng: random.Random) -> tuple[list | dict, object, str]:
    """(container, key, path) of a random item of nested lists and dicts. The branches are equally likely, however large."""
    path = ""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path += f".{key}" if isinstance(value, dict) else f"[{key}]"
        if not isinstance(value[key], (dict, list)) or not value[key] or rng.random() < 0.25:
            return value, key, path[:80]
        value = value[key]


def change_json(value: dict | list, rng: random.Random) -> tuple[dict | list, str]:
    """A copy with one change, and what it is."""
    value = deepcopy(value)
    if not value:
        return rng.choice(OTHERS), "replaced as a whole"
    container, key, path = places(value, rng)
    action = rng.choice(["number", "text", "other", "other", "delete", "copy", "wrap", "rename", "repeat", "near"])
    if action == "delete":
        del container[key]
    elif action == "copy":
        donor, donor_key, source = places(value, rng)
        container[key] = deepcopy(donor[donor_key])
        return value, f"{path} = {source}"
    elif action == "wrap":
        container[key] = rng.choice([[container[key]], {"a": container[key]}, str(container[key])])
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key)
    elif action == "repeat" and isinstance(container[key], (list, str)):
        container[key] = container[key] * rng.choice([0, 2, 3, 100])
    elif action == "near" and isinstance(container[key], (int, float)):
        container[key] = container[key] + rng.choice([-1, 1, 0.5, 2, 1000])
    else:
        new = rng.choice({"number": NUMBERS, "text": TEXTS}.get(action, OTHERS + NUMBERS + TEXTS))
        container[key] = deepcopy(new)
        return value, f"{path} = {ascii(new)[:40]}"
    return value, f"{path}: {action}"


def to_msgpack(value: object) -> bytes:
    """As `to_json`; integers that msgpack cannot hold become text."""

    def plain(item):
        if isinstance(item, dict):
            return {plain(key): plain(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [plain(inner) for inner in item]
        return str(item) if type(item) is int and not -(2**63) <= item < 2**64 else item

    packed = msgpack.packb(plain(value), unicode_errors="surrogatepass")
    return packed.replace(msgpack.packb(DEEP), b"\x91" * 5000 + b"\xc0")


# ---- changing bytes

TOKENS = [b"\0", b"\xff\xff\xff\xff", b"\xed\xa0\x80", b'"', b'""', b",", b"\r", b"\n", b"\\", b"NaN", b"1e999", b"[" * 3000,
          b"\xef\xbb\xbf", b"<image>", b"../", b"~"]  # fmt: skip
EXTREMES = [
    struct.pack(form, value) for form in ("<H", ">H", "<I", ">I", "<Q", ">Q") for value in (0, 1, 0x7FFF, 0xFFFF)
]
EXTREMES += [struct.pack(form, value) for form in ("<I", ">I") for value in (0x7FFFFFFF, 0xFFFFFFFF, 30_000, 100_000)]


def change_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> tuple[bytes, str]:
    """A copy with one change, and what it is. other: bytes of another file, to splice with. Half of the changes are in the first
    128 bytes, where headers are."""
    changed, at = bytearray(data), rng.randrange(max(1, min(len(data), rng.choice([128, 10**9]))))
    length = rng.choice([1, 4, 16, rng.randrange(1, 1 + max(1, len(data)))])
    action = rng.choice(
        ["flip", "flip", "extreme", "extreme", "token", "truncate", "delete", "repeat", "noise", "splice"]
    )
    if action == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            if changed:
                changed[rng.choice([at, rng.randrange(len(changed))])] ^= 1 << rng.randrange(8)
    elif action == "extreme":
        new = rng.choice(EXTREMES)
        changed[at : at + len(new)] = new
    elif action == "token":
        changed[at : at + rng.choice([0, 1])] = rng.choice(TOKENS)
    elif action == "truncate":
        del changed[at:]
    elif action == "delete":
        del changed[at : at + length]
    elif action == "repeat":
        changed[at:at] = changed[at : at + length] * rng.choice([1, 2, 50])
    elif action == "noise":
        changed[at : at + length] = rng.randbytes(min(length, 64))
    else:
        changed = changed[:at] + other[rng.randrange(max(1, len(other))) :]
    return bytes(changed), f"{action} at {at}"


def times(rng: random.Random) -> range:
    return range(rng.choice([1, 1, 1, 2, 3]))


def with_checksums(data: bytes) -> bytes:
    """A PNG file with the right CRC behind every chunk: otherwise most changes end there."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        end = at + 8 + struct.unpack(">I", fixed[at : at + 4])[0]
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


# ---- changing files of a format

Change = Callable[[bytes, random.Random], tuple[bytes, str]]


def change_json_file(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed, what = change_json(json.loads(data), rng)
    return to_json(changed).encode("utf-8", "surrogatepass"), what


def change_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed, what = change_json([json.loads(line) for line in data.splitlines()], rng)
    rows = changed if isinstance(changed, list) else [changed]
    return "\n".join(map(to_json, rows)).encode("utf-8", "surrogatepass"), what


def change_csv(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A cell becomes another text; it is quoted or not."""
    mark = next((mark for mark in (b"\t", b";") if mark in data), b",")
    rows = [line.split(mark) for line in data.splitlines()]
    row = rng.choice(rows)
    at, new = rng.randrange(len(row)), rng.choice([*TEXTS, *map(str, NUMBERS)])
    row[at] = json.dumps(new).encode() if rng.random() < 0.5 else new.encode("utf-8", "surrogatepass")
    return b"\n".join(map(mark.join, rows)), f"a cell = {ascii(new)[:40]}"


def change_parquet(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Another value in one row or, where the others are of another type, in all of them; or a column less."""
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    name, new = (
        rng.choice(list(rows[0])),
        rng.choice([*NUMBERS[:-1], *TEXTS, *OTHERS[:-1], [[1], [2, 3]], b"", b"\xff"]),
    )
    if rng.random() < 0.2:
        rows = [{key: value for key, value in row.items() if key != name} for row in rows]
        return write_parquet(rows), f"no column {name}"
    if rng.random() < 0.3:
        changed, what = change_json(rows[0] if name.startswith("stats") else {name: rows[0][name]}, rng)
        new = changed.get(name)
    rng.choice(rows)[name] = new
    with suppress(Exception):
        return write_parquet(rows), f"{name} = {ascii(new)[:40]} in a row"
    with suppress(Exception):
        return write_parquet([row | {name: new} for row in rows]), f"{name} = {ascii(new)[:40]} in all rows"
    return change_bytes(data, rng)


def write_parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


CHANGES: dict[str, Change] = {
    ".json": change_json_file,
    ".jsonl": change_lines,
    ".csv": change_csv,
    ".tsv": change_csv,
    ".parquet": change_parquet,
}


def change_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Another header, whose length is written in front of it."""
    size = struct.unpack("<Q", data[:8])[0]
    changed, what = change_json(json.loads(data[8 : 8 + size]), rng)
    header = to_json(changed).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + size :], what


# ---- files of valid inputs


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
