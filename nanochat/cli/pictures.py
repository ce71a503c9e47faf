"""The commands that read pictures and give no text: embed and detect; and --json of all that read pictures."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from tyro.conf import OmitArgPrefixes, arg

from nanochat.errors import UserError
from nanochat.flags import (
    Camera,
    EncoderFlags,
    JsonRows,
    MaybeOut,
    Pictures,
    check_out,
    next_step,
)

EMBED_BATCH = 16  # images per forward pass of `embed`: limits the memory
BOX_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


# ---- results as JSON ----


@contextmanager
def written_rows(out: Path | None) -> Iterator[Callable[[dict], None]]:
    """A function that takes the rows of --json. out: None drops them, - prints each at once, a .jsonl file has one per line and
    a .json file a list. Raises OSError before any work if the file could not be written. If the block fails, also by Ctrl-C,
    the file has the rows until then; without any it stays as it was."""
    rows: list[dict] = []
    if out is None:
        yield lambda row: None
    elif str(out) == "-":
        yield lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        check_out(out, ".json", ".jsonl")
        try:
            yield rows.append
        except BaseException:
            if rows:
                write_rows(out, rows)
                print(f"{len(rows)} results in {out}, incomplete")
            raise
        write_rows(out, rows)
        print(f"{len(rows)} results in {out}")


def write_rows(out: Path, rows: Sequence[dict]) -> None:
    from nanochat.files import atomic_path

    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    whole = "[\n" + ",\n".join(lines) + "\n]\n" if out.suffix.lower() == ".json" else "\n".join([*lines, ""])
    with atomic_path(out) as new:
        new.write_text(whole, encoding="utf-8", errors="replace")


# ---- vision ----


def embed(
    images: Pictures,
    out: MaybeOut = None,
    layer: str = "",
    pool: Literal["avg", "max", "flatten"] = "avg",
    dtype: Literal["auto", "float32"] = "auto",
    rectangles: bool = False,
    camera: Camera = None,
    json_rows: JsonRows = None,
    vision: OmitArgPrefixes[EncoderFlags] = EncoderFlags(),
) -> None:
    """Write the embeddings of pictures to a .npz file with `embeddings` (n, C) float32 and `files` (n,), or as JSON.

    Args:
        layer: Feature map of the encoder: head (the predictions), p3, p4, p5, a module index, or several joined by +; networks
            of timm have features (the last map), p3, p4 and p5. Default the last one, for a checkpoint what its decoder reads.
        pool: How a map becomes one vector: its mean, its maximum, or all values.
        dtype: auto computes in bfloat16 where the processor does so and the layer's vector of a test picture keeps a cosine of
            0.999 with float32's. float32 gives the same vectors on every processor, up to rounding.
        rectangles: Add no more grey border than the encoder needs, instead of making each picture square: a quarter less time at
            4:3. Compare such vectors with their like only.
    """
    import numpy as np

    from nanochat.files import atomic_path
    from nanochat.inputs import find_pictures, opened
    from nanochat.onnx.folder import is_export
    from nanochat.vision.letterbox import rectangle, square

    if not images and camera is None:
        raise UserError("embed needs at least one picture: nanochat embed IMAGE... -o FILE.npz")
    if out is None and json_rows is None:
        raise UserError("embed needs the name of a file: -o FILE.npz, or --json")
    if out is not None:
        check_out(out, ".npz")
    names, parts, batch = [], [], []
    with written_rows(json_rows) as add:
        pictures = find_pictures(images, camera)
        embedder = exported_embedder if vision.weights and is_export(vision.weights) else torch_embedder
        size, antialias, embed_all = embedder(vision, layer, pool, dtype, rectangles)

        def flush() -> None:
            if not batch:
                return
            vectors = embed_all([image for _, image in batch])
            for (name, _), vector in zip(batch, vectors, strict=True):
                add({"file": name, "embedding": vector.tolist()} if json_rows is not None else {})
            names.extend(name for name, _ in batch)
            parts.extend([vectors] if out is not None else [])
            batch.clear()

        for picture, image in opened(pictures, "encoding", prints=str(json_rows) == "-"):
            if isinstance(image, Exception):
                add({"file": picture.name, "error": str(image)})
                continue
            batch.append(
                (picture.name, (rectangle if rectangles else square)(image, size, antialias)[0])
            )  # a photograph may have 300 MB
            if len(batch) == EMBED_BATCH:
                flush()
        flush()
    if out is None:
        return
    vectors = np.concatenate(parts)
    with atomic_path(out) as new, open(new, "wb") as file:
        np.savez(file, embeddings=vectors, files=np.array(names))
    print(f"{vectors.shape[0]} x {vectors.shape[1]} embeddings in {out}")
    next_step(f'in Python: numpy.load({str(out)!r})["embeddings"]')


class Embedder(NamedTuple):
    """image_size, antialias: how pictures are fitted. embed_all: a list of B fitted ones -> (B, C) float32 array."""

    image_size: int
    antialias: bool
    embed_all: Callable


def torch_embedder(vision: EncoderFlags, layer: str, pool: str, dtype: str, rectangles: bool) -> Embedder:
    from nanochat.checkpoint import layer_of
    from nanochat.vision.inference import embeddings, quick_dtype

    encoder, layer = vision.encoder(), layer or layer_of(vision.weights)
    computes = None if dtype == "float32" else quick_dtype(encoder, layer)

    def embed_all(fitted: Sequence):
        return embeddings(encoder, fitted, pool, layer, computes, rectangles).cpu().numpy()

    return Embedder(encoder.image_size, encoder.antialias, embed_all)


def exported_embedder(vision: EncoderFlags, layer: str, pool: str, dtype: str, rectangles: bool) -> Embedder:
    """Of a folder of `nanochat export`, where layer, size and dtype are fixed. Needs no torch."""
    from nanochat.agent import Agent

    fixed = {"--layer": layer, "--pool": pool != "avg", "--dtype": dtype != "auto", "--image-size": vision.image_size}
    if given := [flag for flag, value in fixed.items() if value]:
        raise UserError(
            f"{given[0]} cannot be chosen for {vision.weights}, which was exported: leave it out, or name the checkpoint"
        )
    model = Agent.load(vision.weights).model
    if getattr(model, "encoder", None) is None:
        raise UserError(f"{vision.weights} has no encoder: it is a text model, choose another one")
    return Embedder(
        model.encoder["image_size"], model.encoder["antialias"], lambda fitted: model.embed(fitted, rectangles)
    )


def detect(
    images: Pictures,
    out: Annotated[
        Path | None,
        arg(
            aliases=["-o"],
            help="Where to write the result: a picture with boxes (.png, .jpg), a list of boxes (.json), or a folder, which "
            "gets a picture with boxes for each picture and keeps the files that it has. By default the boxes are only printed.",
        ),
    ] = None,
    conf: float = 0.25,
    iou: float = 0.7,
    camera: Camera = None,
    json_rows: JsonRows = None,
    vision: OmitArgPrefixes[EncoderFlags] = EncoderFlags(),
) -> None:
    """Detect objects; print them, and write pictures with boxes or a list of boxes.

    Args:
        conf: Minimum score of a detection, 0..1.
        iou: Two boxes of one class that overlap more than this (intersection over union) count as one object.
    """
    from nanochat.inputs import find_pictures, opened

    if not images and camera is None:
        raise UserError("detect needs at least one picture: nanochat detect IMAGE... -o boxes.png")
    with written_rows(json_rows) as add:
        pictures = find_pictures(images, camera)
        write = BoxWriter(out, single=len(pictures) == 1 and pictures[0].named)
        check_keeps(out, [picture.source for picture in pictures if isinstance(picture.source, str)])
        encoder, n_objects = vision.encoder(), 0
        if not hasattr(encoder, "detect"):
            raise UserError(
                f"{vision.weights} finds no objects, it is no detector: use --weights yolov9t.pt, or nanochat embed"
            )
        for picture, image in opened(pictures, "detecting", prints=str(json_rows) in ("None", "-")):
            if isinstance(image, Exception):
                add({"file": picture.name, "error": str(image)})
                continue
            found = encoder.detect(image, conf=conf, iou=iou)
            n_objects += len(found)
            add({"file": picture.name, "detections": [asdict(detection) for detection in found]})
            write.add(picture.name, image, found)
            if json_rows is None:
                print_boxes(f"{picture.name}: " if len(pictures) > 1 else "", found)
        write.finish()
    if str(json_rows) != "-":
        of = f" in {len(pictures)} pictures" if len(pictures) > 1 else ""
        print(f"{n_objects} objects{of}" + (f", written to {out}" if out else ""))


def print_boxes(prefix: str, found) -> None:
    for detection in found:
        box = " ".join(f"{value:7.1f}" for value in detection.box)
        print(f"{prefix}{detection.class_name:20s} {detection.score:5.1%}  {box}")


def check_keeps(out: Path | None, pictures: Sequence[str]) -> None:
    """Raises UserError if `out` is the file of a picture, also under another name."""
    if out is None or not out.is_file():
        return
    if any(os.path.samefile(out, path) for path in pictures if os.path.exists(path)):
        raise UserError(f"{out} is the picture itself, which would be lost: choose another name for the result")


class BoxWriter:
    """Writes detections to `out`. Raises UserError or OSError before any work if that is not possible.

    single: one picture that the user named; a .json file is then the list of its boxes, else a list of pictures with boxes.
    """

    def __init__(self, out: Path | None, single: bool):
        self.out, self.single, self.rows = out, single, []
        self.names, self.renamed = set(), []
        self.suffix = "" if out is None or out.is_dir() else out.suffix.lower()
        if out is None:
            return
        if self.suffix in BOX_FORMATS and not single:
            raise UserError(f"{out} is one picture, but there may be several: use a folder (-o boxes) or a .json file")
        if self.suffix:
            check_out(out, *BOX_FORMATS, ".json")
        elif out.is_dir():
            check_out(out / "x.png")
        else:
            check_out(out)

    def add(self, name: str, image, found) -> None:
        from nanochat.files import atomic_path
        from nanochat.vision.detections import draw_detections

        if self.out is None:
            return
        if self.suffix == ".json":
            self.rows.append({"file": name, "detections": [asdict(detection) for detection in found]})
            return
        path = self.out if self.suffix else self.free_path(name)
        with atomic_path(path) as new:
            draw_detections(image, found).save(new, format=BOX_FORMATS[path.suffix.lower()])

    def free_path(self, name: str) -> Path:
        """A path in the folder `out` that no file has yet, neither of this run nor an older one: a.png, a-2.png, ..."""
        self.out.mkdir(exist_ok=True)
        stem, number, is_older = "stdin" if name == "-" else Path(name).stem, 1, False
        while os.path.lexists(path := self.out / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")):
            is_older |= path.name not in self.names
            number += 1
        self.names.add(path.name)
        self.renamed.extend([path.name] if is_older else [])
        return path

    def finish(self) -> None:
        from nanochat.files import atomic_path
        from nanochat.inputs import note

        if self.renamed:
            shown = ", ".join(self.renamed[:3]) + ", ..." * (len(self.renamed) > 3)
            note(f"{self.out} had files of the same names, which are kept; see {shown}")
        if self.suffix == ".json":
            rows = self.rows[0]["detections"] if self.single else self.rows
            with atomic_path(self.out) as new:
                new.write_text(json.dumps(rows, indent=1))
