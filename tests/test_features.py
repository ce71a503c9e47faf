"""The cache gives what the encoder gives, computes nothing twice, and survives being killed."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.data import DataError
from nanochat.multimodal_gpt import pool_to_tokens
from nanochat.training.features import cache_key, cached_features, source_digest
from nanochat.vision import YOLOv9Plus
from nanochat.vision.images import ImageError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Maps this small are slower with two, and ten times slower where another program runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared_encoder():
    torch.manual_seed(0)
    return YOLOv9Plus("yolov9t.yaml", image_size=64)


@pytest.fixture
def encoder(shared_encoder):
    return deepcopy(shared_encoder)  # a third of the time of building one


@pytest.fixture
def forwards(encoder, monkeypatch):
    """The number of images in each call of the encoder."""
    calls = []
    extract = encoder.extract_features

    def counted(images, layer):
        calls.append(len(images))
        return extract(images, layer)

    monkeypatch.setattr(encoder, "extract_features", counted)
    return calls


def seven_images(folder):
    """Random pixels in several shapes, always the same."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def images(tmp_path):
    return seven_images(tmp_path)


@pytest.fixture(scope="module")
def filled(shared_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    cached_features(shared_encoder, seven_images(folder), "p5", 1, folder / "cache")
    return folder / "cache"


@pytest.fixture
def cache(filled, tmp_path):
    """A cache with the one-token features of p5 of all images."""
    return shutil.copytree(filled, tmp_path / "cache")


def direct(encoder, images, layer, n):
    with torch.no_grad():
        return torch.cat([pool_to_tokens(encoder.extract_features([image], layer), n) for image in images]).numpy()


def assert_same_features(found, expected):
    """To float16's precision in each row, for features of any size: those of random weights are tiny."""
    largest = np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert (largest > 0).all()
    np.testing.assert_allclose(found / largest, expected / largest, atol=2e-3)


@pytest.mark.parametrize("layer,n", [("p3", 4), ("p5", 1), ("head", 4)])
def test_equal_to_direct_computation(encoder, images, tmp_path, layer, n):
    features = cached_features(encoder, images, layer, n, tmp_path / "cache", batch_size=3)
    assert features.shape == (7, n, encoder.channels(layer)) and len(features) == 7
    assert_same_features(features[:], direct(encoder, images, layer, n))


def test_indexing(encoder, images, tmp_path):
    features = cached_features(encoder, images, "p5", 4, tmp_path / "cache")
    everything = features[:]
    assert everything.dtype == features.dtype == np.float32
    assert features[2].shape == (4, encoder.channels("p5"))
    for index in (3, -1, [0, 2, 2], np.array([5, 1]), slice(1, 4), torch.tensor([4, 4])):
        assert np.array_equal(features[index], everything[index])
    assert torch.from_numpy(features[[1, 2]]).shape == (
        2,
        4,
        encoder.channels("p5"),
    )  # writable memory: no warning


def test_the_second_call_computes_nothing(encoder, images, tmp_path, forwards):
    progress = []

    def note(done, total):
        progress.append((done, total))

    first = cached_features(encoder, images, "p5", 1, tmp_path / "cache", batch_size=3, progress=note)[:]
    assert forwards == [3, 3, 1] and progress == [(3, 7), (6, 7), (7, 7)]
    second = cached_features(encoder, images[::-1], "p5", 1, tmp_path / "cache", progress=note)[:]
    assert forwards == [3, 3, 1] and len(progress) == 3
    assert np.array_equal(first[::-1], second)


def test_images_are_known_by_their_bytes(encoder, images, tmp_path, forwards):
    data = [path.read_bytes() for path in images]
    features = cached_features(encoder, [images[0], images[0], data[0], images[1]], "p5", 1, tmp_path / "cache")
    assert forwards == [2]
    assert np.array_equal(features[0], features[2]) and not np.array_equal(features[0], features[3])
    images[0].rename(tmp_path / "moved.png")
    again = [tmp_path / "moved.png", {"bytes": data[1], "path": None}, str(images[2])]
    cached_features(encoder, again, "p5", 1, tmp_path / "cache")
    assert forwards == [2, 1]
    images[2].write_bytes(data[3])  # another picture under the old name
    cached_features(encoder, again, "p5", 1, tmp_path / "cache")
    assert forwards == [2, 1, 1]


def test_pixels_without_a_file(encoder, tmp_path, forwards):
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    features = cached_features(encoder, [black, white, Image.fromarray(black)], "p5", 1, tmp_path / "cache")
    assert forwards == [2] and np.array_equal(features[0], features[2])


def test_what_changes_features_misses_the_cache(encoder, images, tmp_path, forwards):
    def compute(layer="p5", n=4):
        forwards.clear()
        cached_features(encoder, images, layer, n, tmp_path / "cache")
        return bool(forwards)

    assert compute() and not compute()
    assert compute(layer="p4") and compute(n=1) and not compute()
    with torch.no_grad():
        parameter = next(encoder.parameters())
        parameter.view(-1)[0] += 1e-3
    assert compute() and not compute()
    buffer = next(b for name, b in encoder.named_buffers() if name.endswith("running_mean"))
    buffer[0] += 1
    assert compute() and not compute()
    same, larger = (YOLOv9Plus.from_architecture(encoder.architecture | {"image_size": size}) for size in (64, 96))
    same.load_state_dict(encoder.state_dict())
    larger.load_state_dict(encoder.state_dict())
    assert cache_key(same, "p5", 4) == cache_key(encoder, "p5", 4) != cache_key(larger, "p5", 4)


def test_training_mode_changes_nothing_and_is_kept(encoder, images, tmp_path):
    expected = direct(encoder, images, "p5", 1)
    encoder.train()
    features = cached_features(encoder, images, "p5", 1, tmp_path / "cache")
    assert all(module.training for module in encoder.modules())
    assert_same_features(features[:], expected)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_an_unreadable_image_keeps_what_was_done(encoder, images, tmp_path, forwards):
    images[5].write_bytes(b"no picture")
    with pytest.raises(ImageError):
        cached_features(encoder, images, "p5", 1, tmp_path / "cache", batch_size=2)
    del images[5], forwards[:]
    cached_features(encoder, images, "p5", 1, tmp_path / "cache", batch_size=2)
    assert forwards == [2]  # 0 to 3 were there


def test_a_missing_image_and_no_images(encoder, images, tmp_path):
    with pytest.raises(ImageError, match="gone.png"):
        cached_features(encoder, [*images, tmp_path / "gone.png"], "p5", 1, tmp_path / "cache")
    with pytest.raises(ValueError, match="no images"):
        cached_features(encoder, [], "p5", 1, tmp_path / "cache")


def constant_features(encoder, monkeypatch, value):
    maps = torch.full((encoder.channels("p5"), 2, 2), value)
    monkeypatch.setattr(encoder, "extract_features", lambda images, layer: torch.stack([maps] * len(images)))


@pytest.mark.parametrize("value", [0.0, 1e-38, -3e-9, 0.1, -65504.0, 1e37])
def test_features_of_any_size_keep_their_precision(encoder, images, tmp_path, monkeypatch, value):
    constant_features(encoder, monkeypatch, value)
    features = cached_features(encoder, images, "p5", 1, tmp_path / "cache")
    np.testing.assert_allclose(features[:], np.float32(value), rtol=2**-11)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_features_that_are_no_numbers(encoder, images, tmp_path, monkeypatch, value):
    constant_features(encoder, monkeypatch, value)
    with pytest.raises(ValueError, match="layer 'p5' gives NaN or infinite features"):
        cached_features(encoder, images, "p5", 1, tmp_path / "cache")


# ---- killed and damaged ----


def files(folder):
    (place,) = folder.iterdir()
    return place / "features.f16", place / "index.txt"


@pytest.mark.parametrize("features_left,index_left", [(7, 4.5), (6.5, 4), (7, 0), (4, 4), (0.5, 0)])
def test_resumes_after_a_write_that_was_cut_off(encoder, images, cache, forwards, features_left, index_left):
    """At any moment of a kill: rows without lines, a part of a row, a part of a line."""
    expected = cached_features(encoder, images, "p5", 1, cache)[:]
    assert forwards == []
    for path, left in zip(files(cache), (features_left, index_left), strict=True):
        os.truncate(path, int(path.stat().st_size / 7 * left))
    again = cached_features(encoder, images, "p5", 1, cache)[:]
    assert forwards == [7 - int(index_left)]
    assert_same_features(again, expected)
    cached_features(encoder, images, "p5", 1, cache)
    assert len(forwards) == 1


def test_a_killed_process_is_resumed(encoder, images, tmp_path, forwards):
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    script = f"""
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from nanochat.training.features import cached_features
        from nanochat.vision import YOLOv9Plus

        encoder = YOLOv9Plus("yolov9t.yaml", image_size=64)
        encoder.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}, weights_only=True))

        def kill(done, total):
            if done >= 4:
                os.kill(os.getpid(), signal.SIGKILL)

        cached_features(encoder, {[str(path) for path in images]!r}, "p5", 1, {str(tmp_path / "cache")!r}, 2, kill)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[1], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    features = cached_features(encoder, images, "p5", 1, tmp_path / "cache", batch_size=2)
    assert forwards == [2, 1]
    assert_same_features(features[:], direct(encoder, images, "p5", 1))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda features, index: features.unlink(),
        lambda features, index: os.truncate(features, 10),
        lambda features, index: flip(features, 100),
        lambda features, index: flip(index, 90),  # in the second digest
        lambda features, index: index.write_bytes(b"x" * index.stat().st_size),
        lambda features, index: index.write_bytes(index.read_bytes()[:80] * 7),
    ],
    ids=["no features", "short features", "altered features", "altered index", "nonsense index", "repeated line"],
)
def test_damage_is_an_error_that_says_what_to_do(encoder, images, cache, damage):
    damage(*files(cache))
    with pytest.raises(DataError, match=r"is damaged: .*; delete the folder .*cache"):
        cached_features(encoder, images, "p5", 1, cache)


def test_source_digest(images):
    data = images[0].read_bytes()
    same = [images[0], str(images[0]), data, {"bytes": data, "path": "x"}, {"bytes": None, "path": str(images[0])}]
    assert len({source_digest(source) for source in same}) == 1
    assert source_digest(images[0]) != source_digest(images[1])
