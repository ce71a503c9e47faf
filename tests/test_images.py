"""Images open as the right RGB or raise a one-line ImageError; the letterbox equals that of ultralytics."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanochat.vision.images import MAX_PIXELS, ImageError, file_bytes, image_digest, open_image
from nanochat.vision.letterbox import Letterbox, letterbox, rectangle, resize_bilinear, square

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # height 5, width 7, no two pixels equal


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def values(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


PNG = encoded(Image.fromarray(COLOURS))


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "an image.png"
    path.write_bytes(PNG)
    tensor = torch.from_numpy(COLOURS).permute(2, 0, 1)
    sources = [
        path,
        str(path),
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": str(path)},
        bytearray(PNG),
        memoryview(PNG),
        {"bytes": bytearray(PNG)},
        io.BytesIO(PNG),
        Image.open(path),
        Image.fromarray(COLOURS),
        COLOURS,
        COLOURS[None],
        COLOURS.astype(np.float64) / 255,
        COLOURS.astype(np.float32) / 255,
        tensor,
        tensor[None],
        tensor / 255,
        (tensor / 255).double().requires_grad_(),
    ]
    for source in sources:
        np.testing.assert_array_equal(values(source), COLOURS)
    assert len({image_digest(source) for source in sources}) == 1


def test_open_files_are_read_from_their_start(tmp_path):
    written = io.BytesIO()
    Image.fromarray(COLOURS).save(written, "PNG")  # the position is now at the end
    for _ in range(2):
        np.testing.assert_array_equal(values(written), COLOURS)
    (tmp_path / "a.png").write_bytes(PNG)
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(values(file), COLOURS)
    reader, writer = os.pipe()  # which cannot be rewound
    with open(reader, "rb") as pipe:
        os.write(writer, PNG)
        os.close(writer)
        np.testing.assert_array_equal(values(pipe), COLOURS)
    closed = io.BytesIO(PNG)
    closed.close()
    for file, message in (
        (io.BytesIO(), "open file is empty"),
        (io.StringIO("x"), "mode 'rb'"),
        (closed, "closed file"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(file)


def test_arrays_need_not_be_contiguous():
    np.testing.assert_array_equal(values(COLOURS[::-1, :, ::-1]), COLOURS[::-1, :, ::-1])
    np.testing.assert_array_equal(values(COLOURS[..., 0]), np.repeat(COLOURS[..., :1], 3, 2))  # grey


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PNG)
    np.testing.assert_array_equal(values("~/a.png"), COLOURS)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats(format):
    np.testing.assert_array_equal(values(encoded(Image.fromarray(COLOURS), format)), COLOURS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(format):
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    assert np.abs(values(encoded(Image.fromarray(flat), format, quality=95)).astype(int) - flat).max() <= 4


# ---- modes


def test_cmyk():
    inks = np.zeros((4, 4, 4), np.uint8)
    inks[:2], inks[2:] = (0, 255, 255, 0), (255, 0, 0, 102)  # red; cyan with 40 % black
    image = Image.frombytes("CMYK", (4, 4), inks.tobytes())
    pixels = values(encoded(image, "TIFF"))
    assert (pixels[:2] == (255, 0, 0)).all() and (pixels[2:] == (0, 153, 153)).all()
    lossy = values(encoded(image.resize((64, 64), Image.Resampling.NEAREST), "JPEG", quality=95)).astype(int)
    assert np.abs(lossy[8] - (255, 0, 0)).max() <= 6 and np.abs(lossy[-8] - (0, 153, 153)).max() <= 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_is_scaled_not_clipped(format):
    deep = np.array([[0, 128, 129, 255], [256, 257, 32768, 32896], [40000, 65278, 65279, 65535]], np.uint16)
    expected = np.round(deep / 65535 * 255).astype(np.uint8)
    pixels = values(encoded(Image.fromarray(deep), format))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)


def test_16_bit_big_endian_and_wide_integers():
    deep = np.array([[0, 257], [32896, 65535]])
    for image in (
        Image.open(io.BytesIO(encoded(Image.frombytes("I;16B", (2, 2), deep.astype(">u2").tobytes()), "TIFF"))),
        Image.fromarray(deep.astype(np.int32)),
    ):
        np.testing.assert_array_equal(values(image)[..., 0], [[0, 1], [128, 255]])
    for wrong in (-1, 65536, 2**31 - 1):
        with pytest.raises(ImageError, match=rf"32-bit pixels in .*{wrong}.*16 bit at most"):
            open_image(Image.fromarray(np.array([[0, wrong], [1, 2]], np.int32)))


def test_float_modes_are_refused():
    with pytest.raises(ImageError, match="float pixels"):
        open_image(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_palette():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([9, 9, 9, 10, 200, 30, 250, 0, 0])
    image.putpixel((2, 1), 2)
    pixels = values(encoded(image))
    assert tuple(pixels[0, 0]) == (10, 200, 30) and tuple(pixels[1, 2]) == (250, 0, 0)
    transparent = values(encoded(image, transparency=1))  # colour 1 is transparent
    assert tuple(transparent[0, 0]) == (255, 255, 255) and tuple(transparent[1, 2]) == (250, 0, 0)
    assert (values(encoded(image, "GIF"))[..., 1] == pixels[..., 1]).all()


def test_alpha_over_white():
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 255))
    image.putpixel((0, 0), (0, 100, 200, 0))
    image.putpixel((1, 0), (0, 100, 200, 51))  # a fifth
    pixels = values(encoded(image)).astype(int)
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert np.abs(pixels[0, 1] - (204, 224, 244)).max() <= 1
    assert tuple(pixels[3, 3]) == (0, 100, 200)
    grey = Image.new("LA", (4, 4), (0, 51))
    assert np.abs(values(encoded(grey)).astype(int) - 204).max() <= 1
    keyed = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))  # one transparent colour
    assert (values(keyed) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I"])
def test_large_images_are_converted_in_strips(mode, monkeypatch):
    """Whole, a 390 kB PNG of 100 million transparent pixels took 1.9 GB."""
    noise = np.random.default_rng(0).integers(0, 256, (31, 20, 4), np.uint8)
    if mode.startswith("I"):
        image = Image.fromarray(
            noise[..., 0].astype(np.uint16) * 257 if mode == "I;16" else noise[..., 0].astype(np.int32) * 257
        )
    else:
        image = Image.fromarray(noise).convert(mode)
        image.info |= {"transparency": 3} if mode == "P" else {}
    whole, sizes, compose = values(image), [], Image.alpha_composite
    monkeypatch.setattr("nanochat.vision.images.STRIP_PIXELS", 100)
    monkeypatch.setattr(Image, "alpha_composite", lambda a, b: sizes.append(b.size) or compose(a, b))
    np.testing.assert_array_equal(values(image), whole)
    assert set(sizes) == (set() if mode.startswith("I") else {(20, 5), (20, 1)})


@pytest.mark.parametrize("format, refused", [("WEBP", True), ("PNG", False)])
def test_formats_whose_decoders_need_much_memory_have_a_lower_limit(format, refused, monkeypatch):
    monkeypatch.setattr("nanochat.vision.images.MAX_PIXELS", 100)
    data = encoded(Image.new("RGB", (8, 8)), format)
    if refused:
        with pytest.raises(ImageError, match="8 x 8 pixels, the limit is 50"):
            open_image(data)
    else:
        open_image(data)


def test_grey_and_black_and_white():
    ramp = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(values(encoded(Image.fromarray(ramp))), np.repeat(ramp[..., None], 3, 2))
    bits = Image.fromarray((ramp % 2 * 255).astype(np.uint8)).convert("1")
    np.testing.assert_array_equal(values(encoded(bits))[..., 0], ramp % 2 * 255)


UPRIGHT = {  # EXIF 2.3, tag 0x0112: how a viewer has to turn the stored rows
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_rotation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOURS), format, exif=exif)
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(values(source), UPRIGHT[orientation](COLOURS))


def test_exif_rotation_of_16_bit():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = COLOURS[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(
        values(encoded(Image.fromarray(deep), exif=exif))[..., 0], np.rot90(COLOURS[..., 0], -1)
    )


def test_camera_jpeg_followed_by_a_preview():
    """MPO, written by many phones and stereo cameras: two frames, of which the first is the photo."""
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encoded(red, "MPO", save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(values(data).astype(int) - (255, 0, 0)).max() <= 4


def test_given_image_is_not_changed():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    open_image(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (0, 0, 0, 0)


def test_opened_image_is_not_copied_again(tmp_path):
    """One image may pass through open_image several times on its way from a command to the encoder."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (PNG, encoded(Image.fromarray(COLOURS), "TIFF"), encoded(Image.fromarray(COLOURS), exif=exif)):
        opened = open_image(data)
        assert type(opened) is Image.Image and open_image(opened) is opened  # and no longer tied to the file's bytes
    turned = Image.fromarray(COLOURS)
    turned.getexif()[0x0112] = 6
    np.testing.assert_array_equal(values(turned), np.rot90(COLOURS, -1))


def test_square_is_open_image_and_letterbox(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    expected, expected_fit = letterbox(Image.fromarray(COLOURS), 64)
    for source in (path, PNG, COLOURS, Image.fromarray(COLOURS)):
        pixels, fit = square(source, 64)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and fit == expected_fit
        np.testing.assert_array_equal(pixels, expected)
    with pytest.raises(ImageError, match="is empty"):
        square(b"", 64)


# ---- refusals


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares a huge image; it contains no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "is not an image in a format"),
        (PNG[:-30], "damaged or truncated"),
        (
            encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")[:900],
            "damaged or truncated",
        ),
        (animated("GIF"), r"animated or has pages \(3 frames\)"),
        (animated("PNG"), r"animated or has pages \(3 frames\)"),
        (animated("WEBP"), r"animated or has pages \(3 frames\)"),
        (animated("TIFF"), r"animated or has pages \(3 frames\)"),
        (encoded(Image.new("RGB", (1, 1))), r"1 x 1 pixels, expected at least 2 x 2"),
        (encoded(Image.new("RGB", (1, 50))), r"1 x 50 pixels, expected at least 2 x 2"),
        (claims(20_000, 20_000), r"larger than the limit of 100,000,000"),
        (claims(11_000, 10_000), r"11000 x 10000 pixels, the limit is 100,000,000"),
        (POSTSCRIPT, "is a EPS file"),  # Pillow would run Ghostscript
    ],
)
def test_refused_files(data, message, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="x.png"):
        open_image(path)


def test_ultralytics_image_open_gives_the_same_error(monkeypatch):
    def opener(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'pi_heif'")

    monkeypatch.setattr(Image, "open", opener)
    with pytest.raises(ImageError, match="is not an image in a format"):
        open_image(b"hello, this is text")


def test_decompression_bomb_is_refused_before_decoding(monkeypatch):
    """Also where other code has disabled Pillow's own limit, as ultralytics does."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="20000 x 20000"):
        open_image(claims(20_000, 20_000))
    with pytest.raises(ImageError, match="limit"):
        open_image(Image.open(io.BytesIO(claims(MAX_PIXELS // 2 + 1, 2))))


def test_refused_paths(tmp_path):
    locked = tmp_path / "loop"
    locked.symlink_to(locked)
    for source, message in [
        ("", "path is empty"),
        (str(tmp_path / "nowhere.jpg"), "there is no file .*nowhere.jpg"),
        (tmp_path, "is a folder"),
        (".", "is a folder"),
        ("a\0b", "is not a valid path"),
        ("~nobody-of-that-name/a.png", "is not a valid path"),
        ("data:image/png;base64," + "A" * 5000, r"data:image/png.*\(5022 characters\) cannot be read"),
        (str(locked), "cannot be read"),
        ({"bytes": None, "path": None}, "cannot open NoneType"),
        ({}, "cannot open NoneType"),
        (None, "cannot open NoneType"),
        (3, "cannot open int"),
        ([COLOURS], "cannot open list"),
    ]:
        with pytest.raises(ImageError, match=message):
            open_image(source)


def test_endless_file(monkeypatch):
    if not os.path.exists("/dev/zero"):
        pytest.skip("this system has no /dev/zero")
    monkeypatch.setattr("nanochat.vision.images.MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="larger than 1,000 bytes"):
        file_bytes("/dev/zero")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf), "NaN or infinite"),
        (torch.full((3, 4, 4), float("nan")), "NaN or infinite"),
        (torch.full((3, 4, 4), -float("inf")), "NaN or infinite"),
        (np.full((4, 4, 3), 255.0), r"0..1, got 255..255: divide by 255"),
        (np.full((4, 4, 3), -0.1), r"0..1, got -0.1"),
        (torch.full((3, 4, 4), 1.01), r"0..1, got 1.01"),
        (np.zeros((4, 4, 3), np.int64), "uint8, or floats in 0..1, got int64"),
        (np.zeros((4, 4, 3), bool), "got bool"),
        (np.zeros((4, 4, 3), object), "got object"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(H, W, 3\) or \(H, W\), got \(4, 4, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got \(2, 4, 4, 3\)"),
        (np.zeros(7, np.uint8), r"got \(7,\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"shape \(3, H, W\) or \(1, 3, H, W\), got \(4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"got \(2, 3, 4, 4\)"),
        (torch.zeros(4, 4), r"got \(4, 4\)"),
        (torch.zeros(()), r"got \(\)"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels"),
        (torch.zeros(3, 1, 9), "9 x 1 pixels"),
    ],
)
def test_refused_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        open_image(array)


FILES = [
    PNG,
    encoded(Image.fromarray(COLOURS), "JPEG"),
    encoded(Image.fromarray(COLOURS), "TIFF"),
    encoded(Image.fromarray(COLOURS), "WEBP"),
    encoded(Image.fromarray(COLOURS), "BMP"),
    encoded(Image.fromarray(COLOURS), "GIF"),
    encoded(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw"),
    animated("GIF"),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.integers(0), st.binary(min_size=0, max_size=12), st.integers(0, 200))
@example(FILES[0], 20, b"\xff\xff\xff\xff", 4)
def test_damaged_files_open_or_are_refused(data, at, junk, dropped):
    at %= len(data)
    broken = data[:at] + junk + data[at + dropped :]
    try:
        assert open_image(broken).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    with pytest.raises(ImageError):
        open_image(data)


# ---- digest


def test_digest_depends_on_pixels_and_shape():
    assert image_digest(PNG) == image_digest(encoded(Image.fromarray(COLOURS), "BMP"))
    changed = COLOURS.copy()
    changed[2, 3, 1] ^= 1
    assert image_digest(changed) != image_digest(COLOURS)
    assert image_digest(np.zeros((4, 6, 3), np.uint8)) != image_digest(np.zeros((6, 4, 3), np.uint8))


# ---- letterbox


@settings(max_examples=120, deadline=None)
@given(st.integers(2, 700), st.integers(2, 700), st.integers(1, 12).map(lambda n: 32 * n), st.integers(0, 2**32 - 1))
@example(2, 700, 32, 0)  # so thin that a side rounds to 0 pixels
@example(640, 640, 320, 0)  # exactly half, where OpenCV averages areas
@example(96, 96, 96, 0)
def test_letterbox_equals_ultralytics(height, width, size, seed):
    pytest.importorskip("ultralytics")
    from ultralytics.data.augment import LetterBox

    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours, fit = letterbox(Image.fromarray(image), size)
    theirs = LetterBox(size, auto=False, scale_fill=False)(image=image)
    assert ours.shape == theirs.shape == (size, size, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (fit.width, fit.height) == (width, height)
    ours, fit = rectangle(Image.fromarray(image), size)
    theirs = LetterBox(size, auto=True, stride=32)(image=image)
    assert ours.shape == theirs.shape and max(ours.shape) == size and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (fit.width, fit.height) == (width, height)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5000), st.integers(2, 5000), st.integers(1, 20).map(lambda n: 32 * n), st.integers(0, 2**32 - 1))
def test_boxes_to_image_equal_ultralytics(height, width, size, seed):
    pytest.importorskip("ultralytics")
    from ultralytics.utils.ops import scale_boxes

    scale = min(size / height, size / width)
    new = [max(1, round(side * scale)) for side in (width, height)]
    fit = Letterbox(scale, *(round((size - side) / 2 - 0.1) for side in new), width, height)
    boxes = np.random.default_rng(seed).uniform(-20, size + 20, (6, 4))
    expected = scale_boxes((size, size), boxes.copy(), (height, width))
    np.testing.assert_allclose(fit.to_image(boxes), expected, atol=1e-6 * max(height, width))


def test_boxes_by_hand():
    _, fit = letterbox(np.zeros((100, 200, 3), np.uint8), 64)  # scaled to 64 x 32, 16 grey rows above
    assert (fit.scale, fit.pad_x, fit.pad_y, fit.width, fit.height) == (0.32, 0, 16, 200, 100)
    np.testing.assert_allclose(
        fit.to_image([[0, 16, 64, 48], [32, 32, 48, 40]]), [[0, 0, 200, 100], [100, 50, 150, 75]]
    )
    np.testing.assert_array_equal(fit.to_image([[-9, -9, 99, 99]]), [[0, 0, 200, 100]])  # clipped
    assert fit.to_image(np.zeros((0, 4))).shape == (0, 4)


def test_letterbox_content():
    pixels, fit = letterbox(np.full((10, 40, 3), (255, 0, 7), np.uint8), 64)  # 64 x 16
    assert (pixels[:24] == 114).all() and (pixels[40:] == 114).all()
    assert (pixels[24:40] == (255, 0, 7)).all()
    odd, fit = letterbox(np.zeros((31, 64, 3), np.uint8), 64)  # 33 grey rows: 16 above, 17 below
    assert fit.pad_y == 16 and (odd[16:47] == 0).all() and (odd[47:] == 114).all()


def test_resize_against_the_formula():
    """Bilinear with half-pixel centres, in float64 with plain loops."""
    image = RNG.integers(0, 256, (9, 6, 3), dtype=np.uint8)
    for height, width in [(4, 13), (20, 3), (9, 7), (1, 1)]:
        expected = np.zeros((height, width, 3))
        for y in range(height):
            for x in range(width):
                v = np.clip((y + 0.5) * 9 / height - 0.5, 0, 8)
                u = np.clip((x + 0.5) * 6 / width - 0.5, 0, 5)
                for j in range(9):
                    for i in range(6):
                        expected[y, x] += max(0, 1 - abs(v - j)) * max(0, 1 - abs(u - i)) * image[j, i]
        assert np.abs(resize_bilinear(image, height, width) - expected).max() <= 1
