"""Open images from any source as upright RGB.

Needs numpy and Pillow; it does not import torch, so code that runs without torch can use it. Tensors are recognised by
their methods. Images are RGB everywhere, and arrays are taken as RGB: convert OpenCV's BGR arrays with
`array[..., ::-1]` first.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from nanochat.errors import UserError
from nanochat.vision.mending import mended

MAX_PIXELS = 100_000_000  # larger than any camera image; a small file can declare more (a decompression bomb)
MAX_BYTES = 1_000_000_000  # more than MAX_PIXELS of uncompressed 16-bit RGB; also stops endless files such as /dev/zero
MIN_SIDE = 2  # pixels
STRIP_PIXELS = 2**20  # that are converted at once
# Image formats that are accepted. Pillow knows more, and opens some of them by running a program (Ghostscript, for EPS).
FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "QOI"}
# EXIF orientation -> how to turn an image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

HUNGRY = {
    "WEBP",
    "AVIF",
    "JPEG2000",
}  # decoders that take three times the memory of the image: half as many pixels are read


@runtime_checkable
class TensorLike(Protocol):
    """The methods by which a torch.Tensor is recognised."""

    def detach(self) -> Any: ...
    def cpu(self) -> Any: ...
    def numpy(self) -> np.ndarray: ...


ImageSource = Image.Image | np.ndarray | TensorLike | str | Path | bytes | bytearray | memoryview | BinaryIO | dict


class ImageError(UserError):
    """An image that cannot be used. The message says what was found and what was expected."""


class DamagedImage(ImageError):
    """An image whose bytes cannot be decoded."""


def open_image(source: ImageSource) -> Image.Image:
    """Any image source -> a loaded 8-bit RGB image, rotated upright by its EXIF orientation.

    source: a path, encoded bytes, an open binary file, a PIL image, a Hugging Face {"bytes", "path"} dict, an RGB array
    (H, W, 3) or (1, H, W, 3), a grey array (H, W), or a tensor (3, H, W) or (1, 3, H, W). Arrays and tensors are uint8,
    or floats in 0..1. Transparent pixels become white; 16-bit grey is scaled to 8 bits. An upright RGB image in memory,
    such as this function's own result, is returned as it is, without a copy.

    Raises ImageError for a source of another type and for an image that is missing, empty, damaged, animated, smaller
    than 2 x 2 pixels or larger than 100 million pixels (50 million for WebP, AVIF and JPEG 2000).
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        with image_errors("the image"):
            return to_upright_rgb(source, "the image")
    if isinstance(source, (np.ndarray, TensorLike)):
        return to_upright_rgb(Image.fromarray(as_uint8(source)), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(bytes(source), "the image bytes")
    if isinstance(source, (str, os.PathLike)):
        return decode(file_bytes(source), str(source))
    if hasattr(source, "read"):
        return decode(stream_bytes(source), "the open file")
    raise ImageError(
        f"cannot open {type(source).__name__} as an image: pass a path, bytes, a PIL image, an array or a tensor"
    )


def is_batch(images: ImageSource | Sequence[ImageSource]) -> TypeGuard[Sequence[ImageSource]]:
    """Whether `images` is several images: a list, a tuple, or an array or tensor with a batch axis other than 1."""
    if isinstance(images, (list, tuple)):
        return True
    return isinstance(images, (np.ndarray, TensorLike)) and images.ndim == 4 and len(images) != 1


def as_list(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """One image or several -> a list. Raises ValueError for an empty one."""
    if not is_batch(images):
        return [images]
    if len(images) == 0:
        raise UserError("there are no images: the list is empty, expected at least one")
    return list(images)


def file_bytes(path: str | Path) -> bytes:
    """The content of an image file. Raises ImageError for a path that cannot be read."""
    if str(path) == "":
        raise ImageError("the image path is empty")
    shown = str(path) if len(str(path)) < 300 else f"{str(path)[:40]}... ({len(str(path))} characters)"
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"there is no file {shown}") from None
    except IsADirectoryError:
        raise ImageError(f"{shown} is a folder, expected an image file") from None
    except OSError as error:
        raise ImageError(f"{shown} cannot be read: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a null byte in the name, or ~ with an unknown user
        raise ImageError(f"{shown!r} is not a valid path: {error}") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{shown} is larger than {MAX_BYTES:,} bytes: scale the image down first")
    return data


def stream_bytes(file: BinaryIO) -> bytes:
    """The whole content of an open file, from its start. Raises ImageError for a file that is not binary."""
    with image_errors("the open file"):
        with suppress(AttributeError, OSError):  # a pipe cannot be rewound
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"the open file returned {type(data).__name__}, expected bytes: open it with mode 'rb'")
    return data


def decode(data: bytes, name: str) -> Image.Image:
    """Encoded bytes -> 8-bit RGB. name: of the image in error messages."""
    if not data:
        raise ImageError(f"{name} is empty (0 bytes), expected an image")
    try:
        return decode_exactly(data, name)
    except DamagedImage:
        with image_errors(name):
            better = mended(data)
        if better is None:
            raise
        data, missing = better
        image = decode_exactly(data, name)
        if missing:
            warnings.warn(f"{name}: {missing}", stacklevel=2)
        return image


def decode_exactly(data: bytes, name: str) -> Image.Image:
    with image_errors(name):
        return to_upright_rgb(opened(data, name), name)  # held by one name only: it is freed when it is copied


def opened(data: bytes, name: str) -> Image.Image:
    """The image, not decoded yet."""
    image = Image.open(io.BytesIO(data))
    if image.format not in FORMATS:
        raise ImageError(f"{name} is a {image.format} file, expected an image: JPEG, PNG, WebP, BMP, TIFF, ...")
    return image


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn every exception that Pillow raises for an unusable image into one ImageError, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except (UnidentifiedImageError, ImportError):  # ImportError: from ultralytics' replacement of Image.open
        raise DamagedImage(
            f"{name} is not an image in a format that Pillow knows (JPEG, PNG, WebP, BMP, TIFF, ...)"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} is far larger than the limit of {MAX_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise DamagedImage(f"{name} is damaged or truncated: {' '.join(str(error).split()) or repr(error)}") from error


def to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB, rotated upright. Size and frames are checked from the header, before anything is decoded."""
    width, height = image.size
    limit = MAX_PIXELS if image.format not in HUNGRY else MAX_PIXELS // 2
    if width * height > limit:
        raise ImageError(f"{name} has {width} x {height} pixels, the limit is {limit:,}: scale it down first")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}")
    # an MPO file is a camera's JPEG followed by a preview or a stereo view: its first frame is the photo
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name} is animated or has pages ({frames} frames), expected one image: extract one first")
    image.load()
    in_memory = type(image) is Image.Image
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        for key in (
            "exif",
            "Raw profile type exif",
            "xmp",
            "XML:com.adobe.xmp",
        ):  # opened again, it is not turned again
            image.info.pop(key, None)
    rgb = to_rgb(image, name)
    return (
        rgb.copy() if rgb is image and not in_memory and turn is None else rgb
    )  # tied to its file, it keeps the bytes alive


def orientation(image: Image.Image) -> int:
    """The orientation in the image's EXIF data, 1..8; 1, upright, where the data is damaged, as viewers take it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a parser's: SyntaxError, struct.error, ...
        return 1
    return found if isinstance(found, int) else 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A loaded image of any mode -> 8-bit RGB."""
    if image.mode == "F":
        raise ImageError(f"{name} has float pixels of unknown range: convert it to 8 bit, or pass an array in 0..1")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        ranges = [(values.min(), values.max()) for values in (np.asarray(strip) for _, strip in strips(image))]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if low < 0 or high > 65535:
            raise ImageError(f"{name} has 32-bit pixels in {low}..{high}, expected 16 bit at most: convert it to 8 bit")
        return in_strips(image, narrowed)
    if image.has_transparency_data:
        return in_strips(image, on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """convert(image), an RGB image of the same size. Whole, the steps in between need 1.5 GB for 100 million pixels."""
    rgb = Image.new("RGB", image.size)
    for top, strip in strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top, the rows from there on), about STRIP_PIXELS at a time."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def narrowed(strip: Image.Image) -> Image.Image:
    """16-bit grey -> RGB."""
    values = np.asarray(strip).astype(np.int32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255


def on_white(strip: Image.Image) -> Image.Image:
    strip = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB")


def as_uint8(source: np.ndarray | TensorLike) -> np.ndarray:
    """Array or tensor -> (H, W, 3) or (H, W) uint8. Raises ImageError for other shapes, dtypes and value ranges."""
    array, is_tensor = source, not isinstance(source, np.ndarray)
    if is_tensor:
        array = source.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if is_tensor and (array.ndim != 3 or array.shape[0] != 3):
        raise ImageError(f"an image tensor has the shape (3, H, W) or (1, 3, H, W), got {tuple(source.shape)}")
    if is_tensor:
        array = array.transpose(1, 2, 0)
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ImageError(f"an image array has the shape (H, W, 3) or (H, W), got {source.shape}")
    if 0 in array.shape:
        raise ImageError(f"the image array is empty, shape {tuple(source.shape)}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"image values are uint8, or floats in 0..1, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ImageError("the image contains NaN or infinite values")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise ImageError(f"float images have values in 0..1, got {low:.3g}..{high:.3g}: divide by 255, or pass uint8")
    return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))


def image_digest(source: ImageSource) -> str:
    """SHA-256 of the decoded pixels and their shape: the same image in another lossless format has the same digest."""
    pixels = np.asarray(open_image(source))
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
