"""Frames of videos: evenly spaced, by seeking, with the time of each; and what is wrong with a file, in one line."""

import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nanochat.agent import Agent
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.errors import UserError
from nanochat.vision import clips
from nanochat.vision.clips import clip_frames
from nanochat.vision.images import ImageError
from tests.test_cli import PICTURE, QUESTION, SHAPES, picture
from tests.test_images import animated

av = pytest.importorskip("av")


def write_clip(path, n, fps="10", codec="mpeg4", size=(48, 32), start=0, first=True, **stream_options):
    """A video of n frames, each a little brighter than the one before; its upper half is black."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if first else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height = size
        stream.gop_size = 12
        for name, value in stream_options.items():
            setattr(stream, name, value)
        for number in range(n):
            pixels = np.full((size[1], size[0], 3), round(30 + 220 * number / n), np.uint8)
            pixels[: size[1] // 2] = 0
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = start + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def all_frames(path):
    """(seconds after the first, pixels) of every frame, by decoding the whole file."""
    with av.open(path) as container:
        found = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [(time - found[0][0], pixels) for time, pixels in found]


@pytest.mark.parametrize(("name", "start"), [("a.mp4", 0), ("a.mkv", 7), ("a.avi", 0), ("a.mov", 7), ("a.ts", 7)])
def test_frames_lie_in_the_middle_of_equal_parts(tmp_path, name, start):
    codec, fps = ("mpeg2video", 25) if name == "a.ts" else ("mpeg4", 10)
    path = write_clip(tmp_path / name, 60, str(fps), codec, start=start, bit_rate=10_000_000)
    whole = all_frames(path)
    assert len(whole) == 60 and len({pixels.tobytes() for _, pixels in whole}) > 50
    for n in (1, 2, 5, 12):
        frames = clip_frames(path, n)
        assert len(frames) == n
        expected = [int((i + 0.5) * 60 / n) for i in range(n)]
        for frame, number in zip(frames, expected, strict=True):
            # time stamps are rounded, so it may be the one before
            near = [whole[i] for i in (number - 1, number) if abs(whole[i][0] - frame.time) < 1e-6]
            assert len(near) == 1 and (near[0][1] == frame.pixels).all()


def test_a_short_clip_has_each_frame_once(tmp_path):
    frames = clip_frames(write_clip(tmp_path / "a.mp4", 5), 40)
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(5) / 10)


class Counted:
    """Counts the frames that are decoded."""

    def __init__(self, monkeypatch):
        self.n = 0
        decode = av.container.InputContainer.decode

        def decoded(container, *streams):
            for frame in decode(container, *streams):
                self.n += 1
                yield frame

        class Container:
            """An open file; PyAV's own class cannot be patched."""

            def __init__(self, container):
                self.container = container

            def __getattr__(self, name):
                return getattr(self.container, name)

            def decode(self, *streams):
                return decoded(self.container, *streams)

        make = clips.Video.__init__
        monkeypatch.setattr(
            clips.Video, "__init__", lambda video, path, box, stream: make(video, path, Container(box), stream)
        )


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Three hours: one frame per second of 16 x 16 pixels, a key frame every 12."""
    return write_clip(tmp_path_factory.mktemp("clip") / "long.mp4", 3 * 3600, "1", size=(16, 16))


def test_three_hours_are_not_decoded_whole(long_clip, monkeypatch):
    counted = Counted(monkeypatch)
    frames = clip_frames(long_clip, 8)
    np.testing.assert_allclose([frame.time for frame in frames], (np.arange(8) + 0.5) * 1350)
    assert 8 <= counted.n <= 8 * 16
    counted.n = 0
    clip_frames(long_clip, 100)
    assert counted.n <= 100 * 16


def test_frames_of_one_group_of_pictures_are_decoded_once(tmp_path, monkeypatch):
    path, counted = write_clip(tmp_path / "a.mp4", 60, gop_size=60), Counted(monkeypatch)
    assert len(clip_frames(path, 30)) == 30 and counted.n <= 62


def test_a_key_frame_that_is_too_far_away_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "MAX_DECODED", 20)
    path = write_clip(tmp_path / "a.mp4", 60, gop_size=60)
    assert len(clip_frames(path, 6)) == 6  # each continues from the one before
    with pytest.raises(ImageError, match="a.mp4: the frame at 3.0 s is more than 20 frames behind a key frame.*-g 250"):
        clip_frames(path, 1)


def test_a_turned_video_is_turned_back(tmp_path):
    """A telephone held upright records 48 x 32 and notes that it is to be turned by 90 degrees clockwise."""
    path = Path(write_clip(tmp_path / "a.mp4", 10))
    data = path.read_bytes()
    place = data.index(b"tkhd") + 44  # the matrix of a version 0 track header
    turned = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4").tobytes()
    assert data[place : place + 4] == b"\0\x01\0\0"
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    pixels = clip_frames(str(path), 1)[0].pixels
    assert (
        pixels.shape == (48, 32, 3) and pixels[:, 20:].max() < 20 < pixels[:, :12].min()
    )  # the top is on the right now


# ---- what is wrong


def damaged(path, kind):
    data = Path(path).read_bytes()
    if kind == "empty":
        data = b""
    elif kind == "text":
        data = b"no video\n" * 50
    elif kind == "without its end":  # its index is in front, so it opens
        data = data[: len(data) * 6 // 10]
    elif kind == "without its index":
        data = data[: data.index(b"moov") - 4]
    elif kind == "noise":
        start = data.index(b"mdat") + 4
        data = data[:start] + np.random.default_rng(0).bytes(len(data) - start)
    Path(path).write_bytes(data)


@pytest.mark.parametrize("kind", ["empty", "text", "without its end", "without its index", "noise"])
def test_damaged_files(tmp_path, kind):
    rng = np.random.default_rng(0)
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w", options={} if kind == "without its index" else {"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 48, 32
        for _ in range(30):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 256, (32, 48, 3), np.uint8), "rgb24"))
            )
        container.mux(stream.encode())
    assert len(clip_frames(path, 8)) == 8
    damaged(path, kind)
    with pytest.raises(ImageError, match=r"a\.mp4.*(damaged|truncated)") as found:
        clip_frames(path, 8)
    assert "\n" not in str(found.value)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match=r"a\.mp4 has no pictures, expected a video; found audio"):
        clip_frames(str(tmp_path / "a.mp4"), 2)


def test_without_any_frame(tmp_path):
    path = write_clip(tmp_path / "a.mkv", 0)
    with pytest.raises(ImageError, match=r"a\.mkv .*(no picture|cannot be read)"):
        clip_frames(path, 2)


def test_a_play_list_opens_no_other_file_or_address(tmp_path):
    (tmp_path / "a.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(ImageError, match="cannot be read as a video"):
        clip_frames(str(tmp_path / "a.mp4"), 2)


@pytest.mark.parametrize("n", [0, -1, 101])
def test_a_number_of_frames_that_is_out_of_range(n):
    with pytest.raises(UserError, match=f"in 1..100, got {n}"):
        clip_frames("never-read.mp4", n)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        clip_frames("a.mp4", 2)


# ---- at the command line


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", 40)


def test_each_frame_has_its_time(nanochat, clip):
    lines = nanochat("ask", *SHAPES, clip, QUESTION, "--frames", "8", "--each").out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{clip} at {0.25 + i / 2 - 0.05:.2f} s" for i in range(8)]
    rows = [
        json.loads(row)
        for row in nanochat("ask", *SHAPES, clip, QUESTION, "--frames", "8", "--each", "--json").out.splitlines()
    ]
    assert [line.split(": ")[1] for line in lines] == [row["answer"] for row in rows]
    assert rows[1] == {"file": clip, "time": pytest.approx(0.7), "question": QUESTION, "answer": rows[1]["answer"]}
    rows = [
        json.loads(row)
        for row in nanochat("caption", clip, "--frames", "2", "--checkpoint", "robot", "--json").out.splitlines()
    ]
    assert [row["time"] for row in rows] == [1.0, 3.0] and all(row["caption"] for row in rows)


def test_one_frame_and_a_short_clip(nanochat, clip, tmp_path):
    printed = nanochat("ask", *SHAPES, clip, QUESTION, "--frames", "1")
    assert printed.out.strip() and printed.err == f"note: about {clip} at 2.00 s\n"
    short = write_clip(tmp_path / "short.mp4", 2)
    printed = nanochat("ask", *SHAPES, short, QUESTION, "--frames", "5", "--each")
    assert printed.out.count("\n") == 2 and f"{short} has only 2 different frames at 5 times" in printed.err


def test_a_folder_of_frames(nanochat, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):  # frame2 is before frame10
        shutil.copy(picture(0 if number < 4 else 1), folder / f"frame{number}.png")
    for word in (folder, f"{folder}/*.png"):
        lines = nanochat("ask", *SHAPES, word, QUESTION, "--frames", "3", "--each").out.splitlines()
        assert lines == [f"{folder}/frame2.png: red", f"{folder}/frame6.png: black", f"{folder}/frame10.png: black"]
    printed = nanochat("ask", *SHAPES, folder, QUESTION, "--frames", "50", "--each")
    assert printed.out.count("\n") == 12 and "there are only 12 pictures" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CLIP", QUESTION], "is a video, expected a picture: --frames 8"),
        (["CLIP", QUESTION, "--frames", "0"], "--frames must be in 1..100, got 0"),
        (
            ["CLIP", QUESTION, "--frames", "8"],
            "8 pictures in one question, but this model has learnt questions about one picture only: ask about each of them "
            "alone (nanochat ask --each)",
        ),
        (["CLIP", "--frames", "8"], "at least one picture, then a question"),
        ([QUESTION, "CLIP", "--frames", "8"], "the question comes last"),
        (["gone.mp4", QUESTION, "--frames", "8"], "there is no file gone.mp4"),
        ([PICTURE, QUESTION, "--frames", "8"], "--frames takes pictures from videos, folders and globs"),
        ([__file__, QUESTION, "--frames", "8"], "cannot be read as a video"),
    ],
)
def test_wrong_words(nanochat, clip, words, message):
    printed = nanochat("ask", *SHAPES, *[clip if word == "CLIP" else word for word in words], code=2)
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_the_frames_of_one_question(nanochat, clip, tmp_path):
    model, tokenizer, training = load_checkpoint("shapes")
    save_checkpoint(tmp_path / "m", model, tokenizer, training | {"images": 2})
    words = ("ask", clip, QUESTION, "--frames", "2", "--checkpoint", tmp_path / "m")
    printed = nanochat(*words)
    assert printed.out.count("\n") == 1 and printed.err == f"note: about {clip} at 1.00 s, {clip} at 3.00 s\n"
    agent = Agent.load(tmp_path / "m")
    seen = agent.look([frame.pixels for frame in clip_frames(clip, 2)])
    row = json.loads(nanochat(*words, "--json").out)
    expected = {"files": [clip, clip], "times": [1.0, 3.0], "question": QUESTION}
    assert row == expected | {"answer": "".join(agent.ask(QUESTION, seen)).strip()}
    row = json.loads(nanochat("ask", PICTURE, clip, QUESTION, "--frames", "1", *words[-2:], "--json").out)
    assert row["files"] == [PICTURE, clip] and row["times"] == [None, 2.0]


def test_an_animation_is_no_picture(nanochat, tmp_path):
    (tmp_path / "a.gif").write_bytes(animated("GIF"))
    assert "animated" in nanochat("ask", *SHAPES, tmp_path / "a.gif", QUESTION, code=2).err
    assert "convert it to .mp4" in nanochat("ask", *SHAPES, tmp_path / "a.gif", QUESTION, "--frames", "2", code=2).err


def test_other_commands_say_who_reads_videos(nanochat, clip):
    assert "`nanochat caption` takes eight" in nanochat("embed", clip, "--json", code=2).err


def test_frames_of_several_videos_and_a_picture(nanochat, clip, tmp_path):
    write_clip(tmp_path / "clip2.mp4", 20)
    (tmp_path / "clip3.mp4").write_bytes(b"no video")
    printed = nanochat("ask", *SHAPES, PICTURE, f"{tmp_path}/*.mp4", QUESTION, "--frames", "2", "--each", "--json")
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["0.png", "clip.mp4", "clip.mp4", "clip2.mp4", "clip2.mp4"]
    assert [row.get("time") for row in rows] == [None, 1.0, 3.0, 0.5, 1.5]
    assert f"left out: {tmp_path}/clip3.mp4 cannot be read as a video" in printed.err
    error = nanochat("ask", *SHAPES, f"{tmp_path}/*3.mp4", QUESTION, "--frames", "2", "--each", code=2).err
    assert "none of the 1 videos that match" in error
