"""Pictures with small damage that every viewer shows are read; those that lack too much are refused."""

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from nanochat.vision.images import ImageError, open_image

RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 250, (16, 16, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
PICTURE = Image.fromarray(BLOCKS + RNG.integers(0, 6, BLOCKS.shape, dtype=np.uint8))  # 256 x 256, some noise


def encoded(format="PNG", image=PICTURE, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(kind: bytes, body: bytes, damage=lambda chunk: chunk) -> bytes:
    """The PNG with one more chunk behind its header."""
    png = encoded()
    return png[:33] + damage(chunk(kind, body)) + png[33:]


LARGE = zlib.compress(b"x" * 3_000_000)


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"iCCP", b"profile\0\0" + LARGE),
        with_chunk(b"zTXt", b"Comment\0\0" + LARGE),
        with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
        with_chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        with_chunk(b"iCCP", b"profile\0\0broken"),
        with_chunk(b"tEXt", b"a\0b", lambda chunk: chunk[:-1] + b"?"),
        with_chunk(b"eXIf", b"\0\x08\0\x02\x01\x12"),
        with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        with_chunk(b"eXIf", b"", lambda chunk: chunk[:-1] + b"?"),
        encoded()[:-12],
        encoded()[:-5],
    ],
    ids=[
        "profile",
        "ztxt",
        "itxt",
        "text",
        "no profile",
        "checksum",
        "exif",
        "exif offset",
        "exif checksum",
        "end",
        "in end",
    ],
)
def test_a_png_with_damage_beside_its_pixels_is_the_same_picture(data):
    np.testing.assert_array_equal(pixels(data), pixels(encoded()))


def test_the_orientation_survives_a_large_text():
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    for image in (PICTURE, PICTURE.convert("P"), PICTURE.convert("L")):
        plain = encoded(image=image, exif=exif)
        np.testing.assert_array_equal(pixels(encoded(image=image, exif=exif, pnginfo=text)), pixels(plain))
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    assert (pixels(encoded(image=clear, pnginfo=text)) == 255).all()


@pytest.mark.parametrize("body", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk" * 9])
def test_a_jpeg_with_broken_exif_is_upright(body):
    jpeg = encoded("JPEG")
    broken = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
    np.testing.assert_array_equal(pixels(broken), pixels(jpeg))


def test_an_image_in_memory_with_broken_exif_is_upright():
    image = PICTURE.copy()
    image.info["exif"] = b"Exif\0\0junk"
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(PICTURE))


KINDS = {
    "plain": {}, "progressive": {"progressive": True}, "full colour": {"subsampling": 0}, "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1}, "many restarts": {"restart_marker_blocks": 3},
    "progressive restarts": {"restart_marker_blocks": 7, "progressive": True},
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_without_its_end_marker_is_the_same_picture(options):
    jpeg = encoded("JPEG", **options)
    for cut in (1, 2):
        with warnings.catch_warnings(action="error"):
            np.testing.assert_array_equal(pixels(jpeg[:-cut]), pixels(jpeg))


@pytest.mark.parametrize("options", [options for options in KINDS.values() if "progressive" not in options])
def test_a_jpeg_that_lacks_its_last_rows_says_so(options):
    jpeg = encoded("JPEG", **options)
    with pytest.warns(UserWarning, match="cut off: up to [1-9][0-9]*% of its rows are grey"):
        cut = pixels(jpeg[:-60])
    assert (cut != pixels(jpeg)).any(axis=(1, 2)).sum() <= 26


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_jpeg_that_lacks_much_is_refused(options, share):
    jpeg = encoded("JPEG", **options)
    share = (
        min(share, 0.5) if "progressive" in options else share
    )  # the last, finest scans take almost half of the bytes
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_image(jpeg[: int(share * len(jpeg))])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_png_that_lacks_pixels_is_refused(share):
    png = with_chunk(b"zTXt", b"Comment\0\0" + LARGE)
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_image(png[: int(share * len(png))])


def test_limits_hold_for_mended_pictures():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", b"Comment\0\0" + LARGE)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="larger than the limit"):
        open_image(bomb)
    frames = [PICTURE, PICTURE.rotate(90)]
    moving = encoded(image=frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="animated"):
        open_image(moving[:33] + text + moving[33:])


SAMPLES = [encoded(), encoded(image=PICTURE.resize((40, 30)).convert("P")), with_chunk(b"zTXt", b"Comment\0\0" + LARGE)]
SAMPLES += [encoded("JPEG", **options) for options in KINDS.values()]
SAMPLES += [encoded(format, PICTURE.resize((40, 30))) for format in ("GIF", "WEBP", "BMP", "TIFF", "TGA", "QOI", "ICO")]
CHANGE = st.tuples(st.floats(0, 1), st.binary(max_size=6))


@settings(max_examples=150)
@given(st.sampled_from(SAMPLES), st.lists(CHANGE, max_size=4), st.floats(0, 1))
def test_any_damage_gives_a_picture_or_one_line(data, changes, end):
    damaged = bytearray(data)
    for place, new in changes:
        at = int(place * len(damaged))
        damaged[at : at + len(new)] = new
    start = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):
            image = open_image(bytes(damaged[: int((1 - end**4) * len(damaged))]))
        assert image.mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    assert time.process_time() - start < 2
