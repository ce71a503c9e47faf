"""What is checked of a checkpoint's files before anything is built from them. They may come from a stranger: every check
costs no more than reading the files once, and only the known files of the folder are touched."""

import struct
from collections.abc import Collection
from pathlib import Path

from nanochat.errors import UPDATE, UserError
from nanochat.files import DataError, json_object, json_value, sha256, short_repr

FORMAT_VERSION = 1
RESUME = "resume.safetensors"
COPY_AGAIN = "copy the checkpoint again"
REQUIRED = ("model.safetensors", "config.json", "tokenizer.json", "training.json")
MAX_JSON = 64_000_000  # bytes of a JSON file; config.json and manifest.json have a few thousand
MAX_HEADER = 8_000_000  # bytes of the list of tensors in a safetensors file; YOLOv9-e with a large GPT has 300,000
MAX_TENSORS = 20_000
FLOATS, INTEGERS = ("F16", "BF16", "F32", "F64"), ("I64", "I32", "U8", "BOOL")  # dtypes of safetensors that may be read


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of a newer format."""


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file is as the manifest says. Only resume.safetensors may be missing: uploads and
    downloads leave it out, and `load_resume` says so to whom it matters."""
    for name, expected in read_manifest(folder).items():
        if name != RESUME or (folder / name).exists():
            check_file(folder, name, expected)


def read_manifest(folder: Path) -> dict[str, dict]:
    """File name -> {"size", "sha256"}, of the known files only."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        found = (
            "it is a file" if folder.is_file() else "it has no manifest.json" if folder.exists() else "no such folder"
        )
        raise CheckpointError(f"{folder} is no checkpoint: {found}")
    files = listed_files(manifest_path, FORMAT_VERSION, REQUIRED, COPY_AGAIN)
    for name, entry in files.items():
        if name not in (*REQUIRED, RESUME):  # such as ../../secret: not even its size is looked at
            raise CheckpointError(
                f"{manifest_path} lists {short_repr(name)}, expected {', '.join((*REQUIRED, RESUME))} only: "
                "do not use this checkpoint unless you know who made it"
            )
        check_entry(manifest_path, name, entry, COPY_AGAIN)
    return files


def listed_files(manifest_path: Path, newest: int, required: Collection[str], remedy: str) -> dict:
    """File name -> its entry, not checked yet, of a manifest.json whose format is at most `newest`. Raises CheckpointError, which
    says `remedy`, where a required file is not listed."""
    manifest = read_json(manifest_path)
    version, files = manifest.get("format_version"), manifest.get("files")
    if not isinstance(version, int) or not isinstance(files, dict):
        raise CheckpointError(f"{manifest_path} is damaged: {remedy}")
    if version > newest:
        raise CheckpointError(
            f"{manifest_path.parent} has format {version}, this version reads up to {newest}: {UPDATE}"
        )
    for name in required:
        if name not in files:
            raise CheckpointError(f"{manifest_path} does not list {name}: {remedy}")
    return files


def check_entry(manifest_path: Path, shown: str, entry: object, remedy: str) -> None:
    """Raises CheckpointError for an entry that is not {"size", "sha256"}. shown: the file's name as the message has it."""
    if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
        raise CheckpointError(f"{manifest_path} is damaged at {shown}: {remedy}")


def check_file(folder: Path, name: str, expected: dict) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing: copy the checkpoint again")
    size = path.stat().st_size
    if size != expected["size"]:
        raise CheckpointError(
            f"{path} has {size} bytes, {short_repr(expected['size'])} expected: copy the checkpoint again"
        )
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} was altered: its SHA-256 is not the manifest's; copy the checkpoint again")


def read_json(path: Path) -> dict:
    """The object in a JSON file of a checkpoint. Raises CheckpointError for anything else."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise CheckpointError(f"{path} has {size:,} bytes, the limit for a JSON file is {MAX_JSON:,}")
    try:
        return json_object(path.read_bytes(), path)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def read_training(folder: Path) -> dict:
    """training.json, how the model was made, with the types that its readers expect; null is as if the key were not there.

    Raises CheckpointError for other types. Unknown keys stay as they are.
    """
    path = folder / "training.json"
    training = {key: value for key, value in read_json(path).items() if value is not None}
    kinds = {"recipe": dict, "earlier": list, "history": list, "learnt": dict, "multi_turn": bool, "images": int}
    for key, kind in kinds.items():
        if type(training.get(key, kind())) is not kind:
            expected = {dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}[kind]
            raise CheckpointError(f"{path}: {key!r} should be {expected}, found {short_repr(training[key])}")
    for key in ("earlier", "history"):
        if not all(isinstance(entry, dict) for entry in training.get(key, [])):
            raise CheckpointError(f"{path}: {key!r} should be a list of objects")
    return training


# ---- the list of tensors in a safetensors file: 8 bytes with its length, then JSON ----


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) of a safetensors file. Raises CheckpointError for a list that is damaged or too long."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(
                f"{path} is damaged, or no model of this project: its list of tensors has {length:,} bytes, the limit is "
                f"{MAX_HEADER:,}"
            )
        text = file.read(length)
    try:
        header = json_value(text, path)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in tensors.items()}
    except (DataError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: its list of tensors cannot be read") from error
    if len(shapes) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(shapes):,} tensors, the limit is {MAX_TENSORS:,}")
    return shapes


def check_header(path: Path, expected: dict, later: Collection[str] = ()) -> None:
    """Compare the tensors of a file with those of a model. expected: name -> tensor, on any device, also meta. later: names that
    older files may lack.

    Raises CheckpointError, naming the first differences.
    """
    found = read_header(path)
    problems = [f"{name} is missing" for name in expected if name not in found and name not in later]
    problems += [f"{short_repr(name)} is unknown" for name in found if name not in expected]
    for name, tensor in expected.items():
        dtype, shape = found.get(name, (None, None))
        if dtype is None:
            continue
        if shape != tuple(tensor.shape):
            problems.append(f"{name} has the shape {short_repr(shape)}, expected {tuple(tensor.shape)}")
        elif dtype not in (FLOATS if tensor.is_floating_point() else INTEGERS):
            problems.append(f"{name} has the dtype {short_repr(dtype)}, expected {tensor.dtype}")
    if problems:
        more = f" and {len(problems) - 3} more" if problems[3:] else ""
        raise CheckpointError(f"{path.parent}: the weights do not fit config.json: {'; '.join(problems[:3])}{more}")
