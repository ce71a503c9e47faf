"""The encoder protocol, the resolver of encoder names, and the path from images to pixels."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanochat.vision
from nanochat.vision import YOLOv9Plus
from nanochat.vision.encoder import Encoder, encoder_from_architecture, open_encoder
from nanochat.vision.images import ImageError, as_list
from nanochat.vision.letterbox import letterbox, square
from nanochat.vision.pixels import evaluating, read_pixels, to_pixels
from nanochat.vision.weights import WeightsError
from tests.test_yolov9 import NAMES, PICTURES, assert_distinct, calibrate, save_detector

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    opened = open_encoder("yolov9t.yaml", image_size=64)
    calibrate(opened.net, read_pixels(opened, PICTURES)[0])
    return opened


# ---- protocol


def test_yolov9_implements_the_protocol(encoder):
    assert isinstance(encoder, YOLOv9Plus) and isinstance(encoder, Encoder)
    assert not isinstance(torch.nn.Linear(2, 2), Encoder)
    for name, method in inspect.getmembers(Encoder, inspect.isfunction):
        if name in ("channels", "maps", "truncate"):  # isinstance compares names only
            own = inspect.signature(getattr(YOLOv9Plus, name))
            assert list(own.parameters) == list(inspect.signature(method).parameters)


def test_maps_of_several_layers_from_one_pass(encoder):
    pixels, _ = read_pixels(encoder, PICTURES)
    calls = []
    handle = encoder.net.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        maps = encoder.maps(pixels, ["p4", "head", 2, "p3+p5"])
    handle.remove()
    assert len(calls) == 1 and list(maps) == ["p4", "head", 2, "p3+p5"]
    for layer, found in maps.items():
        assert found.shape[:2] == (4, encoder.channels(layer))
        assert_distinct(found)
        torch.testing.assert_close(
            found, encoder.extract_features(PICTURES, layer), rtol=0.0, atol=0.05
        )  # merged BatchNorm


def test_maps_are_differentiable(encoder):
    pixels = read_pixels(encoder, PICTURES[0])[0].requires_grad_()
    encoder.maps(pixels, ["p4"])["p4"].square().mean().backward()
    assert pixels.grad.abs().sum() > 0


def test_truncate_keeps_the_layer(encoder):
    small = encoder_from_architecture(encoder.architecture)
    small.load_state_dict(encoder.state_dict())
    assert small.truncate("p4") is small
    torch.testing.assert_close(small.extract_features(PICTURES, "p4"), encoder.extract_features(PICTURES, "p4"))
    assert len(small.state_dict()) < len(encoder.state_dict())
    with pytest.raises(ValueError, match="truncated after layer 18"):
        small.channels("head")


def test_image_size_is_checked_when_set(encoder):
    other = encoder_from_architecture(encoder.architecture)
    other.image_size = 96
    assert other.architecture["image_size"] == 96 and read_pixels(other, PICTURES[0])[0].shape == (1, 3, 96, 96)
    for wrong in (100, 0, 64.0, None):
        with pytest.raises(ValueError, match="multiple of 32"):
            other.image_size = wrong
    assert other.image_size == 96


# ---- names


def test_open_encoder_opens_what_it_documents(tmp_path, monkeypatch):
    path = save_detector(tmp_path / "random.pt")
    for name in (path, str(path)):
        opened = open_encoder(name, image_size=96)
        assert opened.names == NAMES and opened.image_size == 96 and opened.has_head
    path.rename(tmp_path / "weights.pth")  # an existing file may have any name
    assert open_encoder(tmp_path / "weights.pth").names == NAMES
    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", str(tmp_path / "weights.pth"))
    assert open_encoder().names == open_encoder("").names == NAMES and open_encoder().image_size == 640
    assert open_encoder("yolov9t.yaml").channels() == 84


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet50", {}, FileNotFoundError, r"no encoder 'resnet50': expected an official YOLOv9 name \(yolov9t.pt, "),
        ("yolov9t", {}, FileNotFoundError, "no encoder 'yolov9t'.*yolov9t.pt.*yolov9t.yaml"),
        ("nowhere.pt", {}, FileNotFoundError, "there is no file nowhere.pt"),
        ("nowhere.yaml", {}, FileNotFoundError, "no model description nowhere.yaml"),
        (ROOT, {}, FileNotFoundError, "is a folder, expected an encoder file"),
        ("yolov9t.yaml", {"image_size": 65}, ValueError, "multiple of 32, got 65"),
        ("yolov9t.yaml", {"device": "cuda:99"}, ValueError, "device cuda:99 cannot be used"),
        ("yolov9t.yaml", {"device": "abacus"}, ValueError, "device abacus cannot be used"),
    ],
)
def test_open_encoder_refuses(name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        open_encoder(name, **options)
    assert "\n" not in str(caught.value)


def test_trust_pickle_is_passed_on(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2), "extra": NotADetector()}, tmp_path / "extra.pt")
    with pytest.raises(WeightsError, match="trust_pickle=True"):
        open_encoder(tmp_path / "extra.pt")
    with pytest.raises(WeightsError, match="is not an ultralytics detector"):
        open_encoder(tmp_path / "extra.pt", trust_pickle=True)


class NotADetector:
    """A class that no detector's file needs."""


# ---- architecture


@pytest.mark.parametrize("kind", ["yolov9", None])
def test_architecture_round_trip(encoder, kind):
    described = json.loads(json.dumps(encoder.architecture))
    assert described["kind"] == "yolov9"
    if kind is None:  # as in the checkpoints of the first release
        del described["kind"]
    rebuilt = encoder_from_architecture(described)
    assert isinstance(rebuilt, YOLOv9Plus) and rebuilt.architecture == encoder.architecture
    rebuilt.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(rebuilt.extract_features(PICTURES, "p5"), encoder.extract_features(PICTURES, "p5"))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"kind": "vit"}, "unknown encoder kind 'vit', expected yolov9"),
        ({"kind": ["yolov9"]}, "unknown encoder kind"),
        ({"kind": "yolov9"}, "expected the keys yaml, names, image_size and n_layers"),
        ({}, "expected the keys yaml, names, image_size and n_layers"),
        (None, "must be a mapping, got NoneType"),
        ([1], "must be a mapping, got list"),
    ],
)
def test_other_architectures_are_refused(architecture, message):
    with pytest.raises(ValueError, match=message):
        encoder_from_architecture(architecture)


# ---- pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_pixels_is_the_plain_formula(dtype):
    squares = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    squares[0, 0, 0], squares[0, 0, 1] = 0, 255
    pixels = to_pixels(squares, "cpu", dtype)
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == dtype and pixels.is_contiguous()
    assert pixels[0, :, 0, 0].tolist() == [0, 0, 0] and pixels[0, :, 0, 1].tolist() == [1, 1, 1]
    expected = torch.from_numpy(squares.astype(np.float64).transpose(0, 3, 1, 2) / 255)
    torch.testing.assert_close(pixels.double(), expected, rtol=torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize(
    "squares",
    [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.float32)],
)
def test_to_pixels_refuses_other_arrays(squares):
    with pytest.raises(ValueError, match=r"must be \(B, H, W, 3\) uint8, got \("):
        to_pixels(squares, "cpu", torch.float32)


def test_pixels_are_divided_by_255_in_one_place():
    """Two divisions, or a missing one, would give training and serving different pixels."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "nanochat").rglob("*.py")}
    # "127 / 255" is a number, "pixels / 255" is a division of pixels
    dividing = [
        name.name for name, text in sources.items() if re.search(r"(?<!\d) / 255", text) and "import torch" in text
    ]
    assert dividing == ["pixels.py"]


def test_read_pixels_is_square_and_to_pixels(encoder):
    pixels, fits = read_pixels(encoder, PICTURES)
    for picture, row, fit in zip(PICTURES, pixels, fits, strict=True):
        expected, expected_fit = letterbox(picture, 64)
        found, found_fit = square(picture, 64)
        assert np.array_equal(found, expected) and found_fit == expected_fit == fit
        torch.testing.assert_close(row, to_pixels(expected[None], "cpu", torch.float32)[0], rtol=0.0, atol=0.0)


def test_looking_has_no_gradient_and_leaves_the_mode(encoder):
    other = encoder_from_architecture(encoder.architecture)
    other.load_state_dict(encoder.state_dict())
    other.train()
    frozen = [m.eval() for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d)][:3]
    modes = [m.training for m in other.modules()]
    found = other.extract_features(PICTURES, "p4")
    assert len(found) == 4 and not found.requires_grad and not found.is_inference()
    torch.testing.assert_close(found, encoder.extract_features(PICTURES, "p4"))
    assert [m.training for m in other.modules()] == modes and frozen


def test_evaluating_restores_modes_after_an_error(encoder):
    encoder.train()
    with pytest.raises(RuntimeError), evaluating(encoder):
        assert not encoder.training
        raise RuntimeError
    assert all(m.training for m in encoder.modules())
    encoder.eval()


def test_one_image_or_many():
    array, tensor = np.zeros((3, 4, 4, 3), np.uint8), torch.zeros(3, 3, 4, 4)
    assert [len(as_list(images)) for images in (array, tensor, list(array), tuple(array), ["a", "b"])] == [
        3,
        3,
        3,
        3,
        2,
    ]
    for one in ("a.png", b"bytes", array[0], array[:1], tensor[0], tensor[:1], {"path": "a.png"}, Path("a.png")):
        assert len(as_list(one)) == 1 and as_list(one)[0] is one
    for none in ([], (), array[:0], tensor[:0]):
        with pytest.raises(ValueError, match="the list is empty"):
            as_list(none)


def test_an_image_that_cannot_be_opened_is_named(encoder, tmp_path):
    with pytest.raises(ImageError, match="there is no file .*nowhere.png"):
        read_pixels(encoder, [PICTURES[0], tmp_path / "nowhere.png"])


# ---- imports


def test_names_of_the_package():
    assert {"Detection", "Encoded", "ImageError", "YOLOv9Plus", "open_encoder"} <= set(dir(nanochat.vision))
    for name in nanochat.vision.__all__:
        assert getattr(nanochat.vision, name).__name__ == name
    assert nanochat.vision.YOLOv9Plus is YOLOv9Plus and nanochat.vision.ImageError is ImageError
    with pytest.raises(AttributeError, match="'nanochat.vision' has no attribute 'TimmEncoders'"):
        nanochat.vision.TimmEncoders  # noqa: B018
    with pytest.raises(ImportError):
        from nanochat.vision import TimmEncoders  # noqa: F401


def test_images_and_detections_work_without_torch(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    code = f"""
import sys
sys.modules["torch"] = None
import nanochat.vision
from nanochat.vision import Detection, ImageError
from nanochat.vision.detections import draw_detections
from nanochat.vision.images import as_list, image_digest, open_image
from nanochat.vision.letterbox import square
pixels, fit = square({str(tmp_path / "red.png")!r}, 32)
assert pixels.shape == (32, 32, 3) and (pixels[16, 16] == (255, 0, 0)).all() and fit.pad_y == 8
assert image_digest(pixels) and len(as_list([pixels, pixels])) == 2
drawn = draw_detections(pixels, [Detection((2.0, 2.0, 30.0, 30.0), 0.5, 0, "cat")])
assert drawn.getpixel((2, 29)) != (255, 0, 0)
try:
    open_image(object())
except ImageError as error:
    assert "cannot open object" in str(error)
try:
    from nanochat.vision import YOLOv9Plus
except ImportError:
    print("torch is blocked")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "torch is blocked\n", done.stderr
