"""Frames of video files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.data.pictures import encode_png
from nanochat.files import DataError

Encode = Callable[[np.ndarray], bytes]
TOLERANCE = 0.75  # of the time between two frames: how far from its time stamp a picture may be
DRIFT = 0.002  # seconds per second: a video of 29.97 frames per second that is described as 30 differs by half of this


def video_frames(
    path: Path, start: float, times: Sequence[float], fps: float, where: str, encode: Encode = encode_png
) -> list[bytes]:
    """The pictures of a video that are nearest to `times`, encoded.

    start: second at which the episode begins in the video. times: T seconds from there, in increasing order. fps: of the
    dataset; the rate of the video itself may differ. where: episode and camera, for messages. encode: (H, W, 3) uint8 RGB ->
        the bytes of a picture.

    Raises:
        ImportError: PyAV is not installed.
        DataError: the file is not a video, or has no picture near one of the times.
    """
    pictures: list[bytes] = []
    last = None  # the picture before `frame`, and its time
    for now, frame in decoded(path, start, where, pictures):
        while len(pictures) < len(times) and (wanted := times[len(pictures)]) <= now:
            nearest = last if last is not None and wanted - last[0] < now - wanted else (now, frame)
            check_whole(nearest[1], len(pictures), path, where)
            check_near(nearest[0], wanted, fps, len(pictures), (path, start, where, len(times)))
            pictures.append(encode(nearest[1].to_ndarray(format="rgb24")))
        if len(pictures) == len(times):
            return pictures
        last = (now, frame)
    while len(pictures) < len(times):  # times behind the last picture
        now, frame = last or (float("inf"), None)
        check_near(now, times[len(pictures)], fps, len(pictures), (path, start, where, len(times)))
        pictures.append(encode(frame.to_ndarray(format="rgb24")))
    return pictures


def check_near(found: float, wanted: float, fps: float, done: int, names: tuple) -> None:
    """Raises DataError if the picture of the second `found` is too far from the wanted one. done: how many were found before."""
    if abs(found - wanted) > TOLERANCE / fps + DRIFT * wanted:
        path, start, where, length = names
        raise DataError(
            f"{path}: {where}: must have {length} frames from {start:g} s on at {fps:g} fps, found {done}: the video has no "
            f"picture at {start + wanted:.3f} s"
        )


def check_whole(frame, number: int, path: Path, where: str) -> None:
    """Raises DataError for a picture that the decoder could only guess."""
    if frame.is_corrupt:
        raise DataError(
            f"{path}: {where}, frame {number}: the picture is damaged: copy the video again, or remove the episode"
        )


def decoded(path: Path, start: float, where: str, done: list) -> Iterator[tuple[float, object]]:
    """(seconds after `start`, picture) of a video, from the key frame before `start` on. done: what has been read."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs the library PyAV: pip install av") from error
    try:
        with av.open(str(path.absolute())) as container:  # a relative "concat:a.mp4" would be a protocol of FFmpeg
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                yield frame.time - start, frame
    except (av.FFmpegError, IndexError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a video: {where}, frame {len(done)}: {reason}") from error
