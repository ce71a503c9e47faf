"""Frames of a video file, evenly spaced in time. It seeks from one to the next, so a long video is not decoded whole.

Needs PyAV, which is imported when a video is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.errors import UserError
from nanochat.vision.images import ImageError

MAX_FRAMES = 100  # all are in memory: 620 MB of full HD
MAX_DECODED = 3000  # frames from a key frame, or the frame before, to the one that is wanted: seconds of work
MAX_LATE = 1.0  # seconds that a video may claim to last longer than its pictures: its sound often does


@dataclass(frozen=True)
class Frame:
    """time: seconds after the start of the video, of this very frame. pixels: (H, W, 3) uint8 RGB, upright."""

    time: float
    pixels: np.ndarray


def clip_frames(path: str, n: int) -> list[Frame]:
    """The frames that a video shows in the middle of each of n parts of equal length; fewer where it has fewer frames.

    Raises:
        UserError: n is outside of 1..MAX_FRAMES, or PyAV is not installed.
        ImageError: the file is no video, has no pictures, or is damaged or truncated where they are looked for; its key frames
            are too far apart to seek.
    """
    if not 1 <= n <= MAX_FRAMES:
        raise UserError(f"the number of frames of a video must be in 1..{MAX_FRAMES}, got {n}")
    found: dict[float, Frame] = {}  # by time: two parts of a short video may show the same frame
    with opened_video(path) as reader, opened_video(path) as scout:
        length = scout.length()
        for i in range(n):
            frame = reader.shown_at((i + 0.5) * length / n, scout)
            time = reader.time_of(frame)
            if time not in found:
                found[time] = Frame(time, upright(frame))
    return list(found.values())


@contextmanager
def opened_video(path: str) -> Iterator["Video"]:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: reading videos needs the library PyAV ({error}): pip install av") from error
    try:
        # the absolute name, as a relative "concat:a.mp4" would be a protocol of FFmpeg; files that name others stay local
        with av.open(str(Path(path).absolute()), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.best("video")
            if stream is None:
                kinds = ", ".join(sorted({other.type for other in container.streams})) or "no streams"
                raise ImageError(f"{path} has no pictures, expected a video; found {kinds}")
            yield Video(path, container, stream)
    except (av.FFmpegError, EOFError) as error:
        reason = " ".join(str(error.strerror if isinstance(error, av.FFmpegError) else error).split())
        raise ImageError(
            f"{path} cannot be read as a video ({reason}): it is damaged, truncated, or something else"
        ) from error


class Video:
    """An open video. Times are seconds after its start."""

    def __init__(self, path: str, container, stream):
        self.path, self.container, self.stream = path, container, stream
        self.start = float((stream.start_time or 0) * stream.time_base)
        self.frames, self.last, self.next = iter(()), None, None  # `next` is decoded, but not shown yet

    def length(self) -> float:
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration:  # of Matroska: it counts from 0, wherever the pictures begin
            return self.container.duration / 1e6 - self.start * ("matroska" in self.container.format.name)
        # the recordings of browsers do not say it: until the last packet, which are read but not decoded
        ends = [
            packet.pts + (packet.duration or 0)
            for packet in self.container.demux(self.stream)
            if packet.pts is not None
        ]
        return float(max(ends, default=0) * self.stream.time_base) - self.start

    def seek(self, time: float) -> None:
        """Go to the last key frame that is not behind `time`."""
        self.container.seek(int((self.start + time) / self.stream.time_base), stream=self.stream)

    def key_before(self, time: float) -> float:
        """The time of the last key frame that is not behind `time`. Reads a packet and decodes nothing."""
        self.seek(time)
        packet = next(self.container.demux(self.stream))
        return float("inf") if packet.pts is None else float(packet.pts * self.stream.time_base) - self.start

    def time_of(self, frame) -> float:
        return frame.time - self.start

    def shown_at(self, time: float, scout: "Video"):
        """The last frame that begins at or before `time`. Continues from the frame before, unless there is a key frame in between
        to jump to, which scout finds: jumping loses the place."""
        if self.next is None or scout.key_before(time) > self.time_of(self.next):
            self.jump(time)
        for _ in range(MAX_DECODED):
            if self.next is None or self.time_of(self.next) > time:
                break
            self.last, self.next = self.next, next(self.frames, None)
        else:
            raise ImageError(
                f"{self.path}: the frame at {time:.1f} s is more than {MAX_DECODED} frames behind a key frame, too many to "
                "decode: add key frames (ffmpeg -i IN -g 250 OUT)"
            )
        found = self.last or self.next
        if found is None or self.next is None and time > self.time_of(found) + MAX_LATE + self.seconds(found):
            raise ImageError(
                f"{self.path} has no picture at {time:.1f} s, though it claims to last longer: it is truncated"
            )
        if found.is_corrupt:
            raise ImageError(f"{self.path}: the picture at {time:.1f} s is damaged: copy the video again")
        return found

    def jump(self, time: float) -> None:
        """Decode from a key frame at or before `time` on. Some containers (.ts) seek to a later one: then look further back."""
        for back in (0.0, 2.0, 10.0, time):
            self.seek(time - back)
            self.frames = self.container.decode(self.stream)
            self.last, self.next = None, next(self.frames, None)
            if self.next is not None and self.time_of(self.next) <= time:
                return

    def seconds(self, frame) -> float:
        """How long a frame is shown."""
        return float((frame.duration or 0) * self.stream.time_base)


def upright(frame) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Telephones turn their videos by a note in the file."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
