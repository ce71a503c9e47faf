"""Frames of video files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.data.columns import check_fetched
from nanochat.files import DataError

TOLERANCE = 0.75  # of the time between two frames: how far from its time stamp a picture may be
DRIFT = 0.002  # seconds per second: a video of 29.97 frames per second that is described as 30 differs by half of this


def video_pictures(path: Path, start: float, times: Sequence[float], fps: float, where: str) -> Iterator[np.ndarray]:
    """The pictures of a video that are nearest to `times`, (H, W, 3) uint8 RGB, one after the other.

    start: second at which the episode begins in the video. times: T seconds from there, in increasing order. fps: of the
    dataset; the rate of the video itself may differ. where: episode and camera, for messages.

    Raises:
        ImportError: PyAV is not installed.
        DataError: the file is not a video, has no picture near one of the times, or that picture is damaged.
    """
    last = None  # the picture before `frame`, and its time
    done = 0
    for now, frame in decoded(path, start, where):
        while done < len(times) and (wanted := times[done]) <= now:
            nearest = last if last is not None and wanted - last[0] < now - wanted else (now, frame)
            check_whole(nearest[1], done, path, where)
            check_near(nearest[0], wanted, fps, done, (path, start, where, len(times)))
            yield nearest[1].to_ndarray(format="rgb24")
            done += 1
        if done == len(times):
            return
        last = (now, frame)
    while done < len(times):  # times behind the last picture
        now, frame = last or (float("inf"), None)
        check_near(now, times[done], fps, done, (path, start, where, len(times)))
        check_whole(frame, done, path, where)
        yield frame.to_ndarray(format="rgb24")
        done += 1


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


def decoded(path: Path, start: float, where: str) -> Iterator[tuple[float, object]]:
    """(seconds after `start`, picture) of a video, from the key frame before `start` on."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs the library PyAV: pip install av") from error
    second = 0.0
    try:
        with av.open(str(path.absolute())) as container:  # a relative "concat:a.mp4" would be a protocol of FFmpeg
            stream = container.streams.video[0]
            stream.thread_count = 1  # episodes are decoded in as many processes as there are cores
            container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                second = frame.time - start
                yield second, frame
    except (av.FFmpegError, IndexError, TypeError, ValueError) as error:
        if path.is_file():
            check_fetched(path)
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read as a video: {where}, after {max(0.0, second):.2f} s: {reason}"
        ) from error
