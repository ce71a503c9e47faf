"""Pictures that a command is given: files, folders, quoted globs, - for the standard input, a camera, and frames of videos."""

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nanochat.errors import UserError
from nanochat.vision.clips import MAX_FRAMES, clip_frames
from nanochat.vision.images import MAX_BYTES, ImageError, file_bytes, open_image

# Endings by which pictures are found in a folder; a file that is named itself may have any name
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k .jpx .tga .ico "
    ".qoi".split()
)
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .mts .m2ts .ts .wmv .flv .3gp .ogv".split()
)  # a file that is named itself and is no picture by its name may be one, too
MAX_CAMERA = 99
WARM_UP = 5  # frames of a camera that are dropped: the first ones are often dark


@dataclass(frozen=True)
class Picture:
    """A picture that is not open yet.

    name: what messages and results call it. source: a path, encoded bytes, or an RGB array.
    named: the user named this very file, so a broken one is an error; broken pictures of a folder or a glob are left out.
    time: of a frame of a video, in seconds from its start.
    """

    name: str
    source: str | bytes | np.ndarray
    named: bool = True
    time: float | None = None

    @property
    def label(self) -> str:
        return self.name if self.time is None else f"{self.name} at {self.time:.2f} s"


def find_pictures(words: Sequence[str], camera: int | None = None, frames: int | None = None) -> list[Picture]:
    """The pictures behind the words of a command line, in order; those of a folder or a glob are sorted by path, the numbers in
    it by their value.

    frames: how many pictures to take of each video, folder and glob, evenly spaced; None takes all of a folder or a glob.

    Raises ImageError for a file that does not exist, a folder without pictures, a glob that matches nothing, a camera or a video
    that cannot be read; UserError for a number of frames without anything to take them from, and for a video without it.
    """
    if words.count("-") > 1:
        raise UserError("- is the picture on the standard input and can be given once")
    if frames is not None and not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"--frames must be in 1..{MAX_FRAMES}, got {frames}")
    if frames is not None and not any(holds_frames(word) for word in words):
        raise UserError(
            "--frames takes pictures from videos, folders and globs, and there is none; an animated GIF is no video "
            "here: convert it to .mp4"
        )
    found = [picture for word in words for picture in pictures_of(word, frames)]
    return found if camera is None else [*found, Picture(f"camera {camera}", camera_frame(camera))]


def holds_frames(word: str) -> bool:
    path = os.path.expanduser(word)
    return word != "-" and not (os.path.isfile(path) and is_picture_name(path))


def pictures_of(word: str, frames: int | None = None) -> list[Picture]:
    if word == "-":
        return [Picture("-", standard_input())]
    path = os.path.expanduser(word)
    if os.path.isdir(path):
        return evenly(pictures_below(path), frames)
    if os.path.isfile(path):
        is_video = is_video_name(path) or (frames is not None and not is_picture_name(path))
        return frames_of(path, word, frames) if is_video else [Picture(printable(word), path)]
    if os.path.exists(path):  # a pipe can be read only once
        return [Picture(printable(word), file_bytes(path))]
    if glob.has_magic(path):
        return pictures_matching(path, word, frames)
    open_image(path)  # raises the error for a file that is not there
    raise ImageError(f"{printable(word)} cannot be read")  # it was created just now


def frames_of(path: str, word: str, frames: int | None) -> list[Picture]:
    """Frames of a video. Prints a note if it has fewer."""
    name = printable(word)
    if frames is None:
        raise UserError(
            f"{name} is a video, expected a picture: --frames 8 of `nanochat ask` and `nanochat caption` takes eight "
            "pictures of it"
        )
    found = [Picture(name, frame.pixels, time=frame.time) for frame in clip_frames(path, frames)]
    if len(found) < frames:
        note(f"{name} has only {len(found)} different frames at {frames} times")
    return found


def evenly(pictures: list[Picture], frames: int | None) -> list[Picture]:
    """The pictures in the middle of each of `frames` parts of a list; all of them for None."""
    if frames is None:
        return pictures
    if len(pictures) < frames:
        note(f"--frames {frames}: there are only {len(pictures)} pictures, and all are taken")
        return pictures
    return [pictures[int((i + 0.5) * len(pictures) / frames)] for i in range(frames)]


def pictures_below(folder: str) -> list[Picture]:
    """All pictures in a folder and its subfolders, without hidden ones. Prints what is left out."""
    found, others = [], []

    def unreadable(error: OSError) -> None:
        note(f"{printable(str(error.filename))} cannot be read: {error.strerror}; its pictures are left out")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted((name for name in names if not name.startswith(".")), key=by_number):
            (found if is_picture_name(name) else others).append(os.path.join(place, name))
    if not found:
        raise ImageError(f"{printable(folder)} is a folder without pictures (.jpg, .png, .webp, ...)")
    if others:
        shown = ", ".join(printable(os.path.basename(name)) for name in others[:3]) + ", ..." * (len(others) > 3)
        note(f"{printable(folder)}: {len(found)} pictures; other files, left out: {len(others)} ({shown})")
    return [Picture(printable(name), name, named=False) for name in found]


def pictures_matching(pattern: str, word: str, frames: int | None) -> list[Picture]:
    """The pictures and videos that match a glob; ** is any number of folders. A folder that exists under its literal name is not
    a pattern, so brackets in the name of a folder are safe."""
    parts = Path(pattern).parts
    literal = next((n for n in range(len(parts) - 1, 0, -1) if os.path.isdir(Path(*parts[:n]))), 0)
    place = glob.escape(str(Path(*parts[:literal]))) if literal else ""
    matches = sorted(glob.glob(os.path.join(place, *parts[literal:]), recursive=True), key=by_number)
    found = [path for path in matches if not os.path.isdir(path)]
    if not found:
        hint = f", only {len(matches)} folders: name one, or match the files in it" if matches else ""
        hint = hint or (": a question is for nanochat ask" if " " in word and word.endswith("?") else "")
        raise ImageError(f"no file matches {printable(word)}{hint}")
    videos = [path for path in found if is_video_name(path)]
    pictures = [Picture(printable(path), path, named=False) for path in found if path not in videos]
    pictures = evenly(pictures, frames) if pictures else []
    for path in videos:
        try:
            pictures += frames_of(path, path, frames)
        except ImageError as error:
            note(f"left out: {error}")
    if not pictures:
        raise ImageError(f"none of the {len(videos)} videos that match {printable(word)} can be read")
    return pictures


def standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError("- is the picture on the standard input, which is the keyboard: cat photo.jpg | nanochat ...")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if not data:
        raise ImageError("the standard input (-) is empty, expected a picture: cat photo.jpg | nanochat ...")
    if len(data) > MAX_BYTES:
        raise ImageError(f"the standard input (-) has more than {MAX_BYTES:,} bytes: scale the image down first")
    return data


def camera_frame(number: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, one frame of a camera. Raises ImageError where there is none, UserError without OpenCV."""
    if not 0 <= number <= MAX_CAMERA:
        raise UserError(f"--camera must be the number of a camera, 0..{MAX_CAMERA} (0 is the first), got {number}")
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"--camera needs OpenCV ({error}): pip install opencv-python-headless") from error
    with suppress(AttributeError):  # it prints a warning for every driver that it tries
        (cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging).setLogLevel(0)  # OpenCV 4, or 5
    camera = cv2.VideoCapture(number)
    try:
        if not camera.isOpened():
            raise ImageError(
                f"camera {number} cannot be opened: none is connected, another program uses it, or you lack the permission "
                "(on Linux, cameras are /dev/video0, ..., and belong to the group video)"
            )
        frames = [frame for good, frame in (camera.read() for _ in range(WARM_UP + 1)) if good]
    finally:
        camera.release()
    if not frames:
        raise ImageError(f"camera {number} is open but gives no picture: does another program use it?")
    return np.ascontiguousarray(frames[-1][..., ::-1])  # OpenCV has BGR


def opened(pictures: Sequence[Picture], label: str, prints: bool) -> Iterator[tuple[Picture, Image.Image | ImageError]]:
    """Each picture with its image. For a broken picture of a folder or a glob, its error, which is printed; at the end they are
    counted. Shows a progress bar on a terminal. prints: the caller prints as it goes, which is progress enough.

    Raises ImageError for a broken picture that the user named, before the first one is yielded, and where all are broken.
    """
    if len(pictures) > 1:
        for picture in pictures:
            if picture.named:
                open_source(picture)
    n_broken = 0
    for picture in with_progress(pictures, label, quiet=prints and sys.stdout.isatty()):
        try:
            image = open_source(picture)
        except ImageError as error:
            if picture.named:
                raise
            n_broken += 1
            note(f"left out: {error}")
            yield picture, error
        else:
            yield picture, image
    if n_broken == len(pictures):
        raise ImageError(f"none of the {n_broken} pictures can be opened")
    if n_broken:
        note(f"{n_broken} of {len(pictures)} pictures cannot be opened and are left out")


def open_source(picture: Picture) -> Image.Image:
    try:
        return open_image(picture.source)
    except ImageError as error:
        if isinstance(picture.source, str):
            raise
        raise ImageError(f"{picture.name}: {error}") from error


def with_progress(items: Sequence, label: str, quiet: bool = False) -> Iterator:
    """The items, with a progress bar on the standard error if that is a terminal and there are several items."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = quiet or len(items) < 2 or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden, redirect_stdout=False) as progress:
        yield from progress.track(items, description=label)


def is_picture_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_video_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def by_number(name: str) -> tuple[list[str | int], str]:
    """A key to sort by that puts frame.png before frame2.png, and that before frame10.png."""
    stem, suffix = os.path.splitext(name)
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", stem))], suffix


def note(message: str) -> None:
    print(f"note: {' '.join(message.split())}", file=sys.stderr)


def printable(text: str) -> str:
    """A file's name on one line, for messages and JSON: bytes that are no text and control characters are replaced."""
    text = os.fsencode(text).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
