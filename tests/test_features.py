"""The cache holds what the model's encoder gives, computes nothing twice, and survives a killed process."""

import json
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

from nanochat.files import DataError
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.training import features as module
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


def model_with(encoder, layer="p5", n=1):
    config = MultimodalGPTConfig(
        sequence_len=64, vocab_size=97, n_layer=1, n_head=2, n_kv_head=2, n_embd=32, vision_layer=layer,
        vision_embedding_dim=encoder.channels(layer), vision_tokens_per_image=n, vision_image_size=64,
    )  # fmt: skip
    model = MultimodalGPT(config)
    model.attach_encoder(encoder)
    return model.eval()


@pytest.fixture
def model(encoder):
    """Reads one token of p5."""
    return model_with(encoder)


@pytest.fixture
def encoded(encoder):
    """The number of images in each forward pass of the encoder."""
    calls = []
    encoder.net.model[0].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
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
    cached_features(model_with(shared_encoder), seven_images(folder), folder / "cache")
    return folder / "cache"


@pytest.fixture
def cache(filled, tmp_path):
    """A cache that holds all images, as `model` sees them."""
    return shutil.copytree(filled, tmp_path / "cache")


def direct(model, images):
    return torch.cat([model.look(image) for image in images]).numpy()


def assert_close(found, expected):
    """Relative to the largest number of each image: vectors of random weights are tiny."""
    largest = np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert (largest > 0).all()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)


@pytest.mark.parametrize("layer,n", [("p3", 4), ("p5", 1), ("head", 4)])
def test_equal_to_direct_computation(encoder, images, tmp_path, layer, n):
    model = model_with(encoder, layer, n)
    features = cached_features(model, images, tmp_path / "cache", batch_size=3)
    assert features.shape == (7, n, encoder.channels(layer)) and len(features) == 7
    assert_close(features[:], direct(model, images))


def test_indexing(encoder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_IMAGES", 3)  # the seven images are in three parts
    features = cached_features(model_with(encoder, n=4), images, tmp_path / "cache")
    everything = features[:]
    assert everything.dtype == features.dtype == np.float32
    assert features[2].shape == (4, encoder.channels("p5"))
    for index in (3, -1, [0, 2, 2, 6], np.array([5, 1]), slice(1, 4), torch.tensor([4, 4])):
        assert np.array_equal(features[index], everything[index])
    assert torch.from_numpy(features[[1, 2]]).shape == (2, 4, encoder.channels("p5"))  # writable memory: no warning


def test_the_second_call_computes_nothing(model, images, tmp_path, encoded):
    progress = []

    def note(done, total):
        progress.append((done, total))

    first = cached_features(model, images, tmp_path / "cache", batch_size=3, progress=note)[:]
    assert encoded == [3, 3, 1] and progress == [(3, 7), (6, 7), (7, 7)]
    second = cached_features(model, images[::-1], tmp_path / "cache", progress=note)[:]
    assert encoded == [3, 3, 1] and len(progress) == 3
    assert np.array_equal(first[::-1], second)


def test_images_are_known_by_their_bytes(model, images, tmp_path, encoded):
    data = [path.read_bytes() for path in images]
    features = cached_features(model, [images[0], images[0], data[0], images[1]], tmp_path / "cache")
    assert encoded == [2]
    assert np.array_equal(features[0], features[2]) and not np.array_equal(features[0], features[3])
    images[0].rename(tmp_path / "moved.png")
    again = [tmp_path / "moved.png", {"bytes": data[1], "path": None}, str(images[2])]
    moved = cached_features(model, again, tmp_path / "cache")
    assert encoded == [2, 1] and np.array_equal(moved[:2], features[[0, 3]])
    images[2].write_bytes(data[3])  # another picture under the old name
    cached_features(model, again, tmp_path / "cache")
    assert encoded == [2, 1, 1]


def test_pixels_without_a_file(model, tmp_path, encoded):
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    features = cached_features(model, [black, white, Image.fromarray(black)], tmp_path / "cache")
    assert encoded == [2] and np.array_equal(features[0], features[2])


def test_what_changes_features_misses_the_cache(encoder, images, tmp_path, encoded):
    def compute(layer="p5", n=4, dtype=torch.float32):
        model = model_with(encoder, layer, n)
        model.set_compute_dtype(dtype)
        encoded.clear()
        cached_features(model, images, tmp_path / "cache")
        return bool(encoded)

    assert compute() and not compute()
    assert compute(layer="p4") and compute(n=1) and compute(dtype=torch.bfloat16) and not compute()
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
    keys = [cache_key(model_with(found)) for found in (encoder, same, larger)]
    assert keys[0] == keys[1] != keys[2]


def test_training_mode_changes_nothing_and_is_kept(encoder, model, images, tmp_path):
    expected = direct(model, images)
    encoder.train()
    features = cached_features(model, images, tmp_path / "cache")
    assert all(layer.training for layer in encoder.modules())
    assert_close(features[:], expected)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_an_unreadable_image_keeps_what_was_done(model, images, tmp_path, encoded):
    images[5].write_bytes(b"no picture")
    with pytest.raises(ImageError):
        cached_features(model, images, tmp_path / "cache", batch_size=2)
    del images[5], encoded[:]
    cached_features(model, images, tmp_path / "cache", batch_size=2)
    assert encoded == [2]  # 0 to 3 were there


def test_a_missing_image_and_no_images(model, images, tmp_path):
    with pytest.raises(ImageError, match="gone.png"):
        cached_features(model, [*images, tmp_path / "gone.png"], tmp_path / "cache")
    with pytest.raises(ValueError, match="no images"):
        cached_features(model, [], tmp_path / "cache")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_features_that_are_not_finite_are_refused(model, images, tmp_path, value):
    last = [p for name, p in model.vision_encoder.named_parameters() if name.endswith("bn.bias")]
    with torch.no_grad():
        for bias in last:
            bias.fill_(value)
    with pytest.raises(ValueError, match="layer 'p5' gives NaN or infinite features"):
        cached_features(model, images, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


# ---- killed, concurrent and damaged


def parts(cache):
    """The (.npy, .json) of each part."""
    (place,) = cache.iterdir()
    return [(path.with_suffix(".npy"), path) for path in sorted(place.glob("*.json"))]


@pytest.mark.parametrize("content", [None, b"", b"half a part"])
def test_an_npy_without_its_json_is_ignored(model, images, tmp_path, encoded, content):
    """What a kill leaves between the two files of a part. The cache is filled with the hook of `encoded` in place, since an
    encoder with hooks runs itself and not its fast copy, and names of parts depend on every bit."""
    cache = tmp_path / "cache"
    cached_features(model, images, cache)
    encoded.clear()
    expected = cached_features(model, images, cache)[:]
    assert encoded == []
    ((vectors, index),) = parts(cache)
    index.unlink()
    if content is not None:
        vectors.write_bytes(content)
    assert_close(cached_features(model, images, cache)[:], expected)
    assert encoded == [7] and parts(cache) == [(vectors, index)]
    cached_features(model, images, cache)
    assert len(encoded) == 1


def test_a_killed_process_loses_a_part_at_most(encoder, model, images, tmp_path, encoded):
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    script = f"""
        import os, signal
        import torch
        torch.set_num_threads(1)
        from nanochat.training import features
        from nanochat.vision import YOLOv9Plus
        from tests.test_features import model_with

        features.PART_IMAGES = 2
        encoder = YOLOv9Plus("yolov9t.yaml", image_size=64)
        encoder.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}, weights_only=True))

        def kill(done, total):
            if done >= 5:
                os.kill(os.getpid(), signal.SIGKILL)

        images = {[str(path) for path in images]!r}
        features.cached_features(model_with(encoder), images, {str(tmp_path / "cache")!r}, 1, kill)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[1], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    features = cached_features(model, images, tmp_path / "cache")
    assert encoded == [3]  # 0 to 3 are two parts, the fifth image was lost
    assert_close(features[:], direct(model, images))


def test_two_processes_only_do_double_work(model, images, tmp_path, encoded, monkeypatch):
    """Another process fills the cache while this one encodes."""
    look, expected = module.look, direct(model, images)

    def look_and_be_overtaken(*args):
        monkeypatch.setattr(module, "look", look)
        cached_features(model, images[:4], tmp_path / "cache")
        return look(*args)

    monkeypatch.setattr(module, "look", look_and_be_overtaken)
    assert_close(cached_features(model, images, tmp_path / "cache")[:], expected)
    encoded.clear()
    assert_close(cached_features(model, images[::-1], tmp_path / "cache")[:], expected[::-1])
    assert encoded == []


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def fewer_images(index):
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"images": content["images"][:-1]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vectors, index: vectors.unlink(), r"npy is missing: delete .*json"),
        (lambda vectors, index: os.truncate(vectors, 100), r"npy is damaged, .*delete both files"),
        (lambda vectors, index: flip(vectors, 300), r"npy is damaged, .*delete both files"),
        (lambda vectors, index: fewer_images(index), r"npy is damaged, .*delete both files"),
        (lambda vectors, index: index.write_bytes(b"x" * 80), r"json is damaged, delete it"),
        (lambda vectors, index: index.write_bytes(b"[]"), r"json is damaged, delete it"),
        (lambda vectors, index: index.write_bytes(b'{"images": [7]}'), r"json is damaged, .*delete it"),
    ],
    ids=["no npy", "short npy", "altered npy", "other images", "no JSON", "no object", "no digests"],
)
def test_damage_is_an_error_that_says_what_to_delete(model, images, cache, damage, message):
    (part,) = parts(cache)
    damage(*part)
    with pytest.raises(DataError, match=message):
        cached_features(model, images, cache)


def test_source_digest(images):
    data = images[0].read_bytes()
    same = [images[0], str(images[0]), data, {"bytes": data, "path": "x"}, {"bytes": None, "path": str(images[0])}]
    assert len({source_digest(source) for source in same}) == 1
    assert source_digest(images[0]) != source_digest(images[1])
