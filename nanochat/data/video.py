"""Frames of video files."""

from pathlib import Path

from nanochat.data.pictures import encode_png
from nanochat.files import DataError


def video_frames(path: Path, start: float, length: int, fps: float) -> list[bytes]:
    """`length` frames of a video, from `start` seconds on, as PNG files.

    Raises:
        ImportError: PyAV is not installed.
        DataError: the file is not a video, or has fewer frames there.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs the library PyAV: pip install av") from error
    pictures: list[bytes] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)  # goes to the key frame before
            for frame in container.decode(stream):
                if round((frame.time - start) * fps) == len(pictures):
                    pictures.append(encode_png(frame.to_ndarray(format="rgb24")))
                if len(pictures) == length:
                    break
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from error
    if len(pictures) != length:
        raise DataError(f"{path} must have {length} frames from {start} s on at {fps} fps, found {len(pictures)}")
    return pictures
