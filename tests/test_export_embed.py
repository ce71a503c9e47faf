"""`nanochat embed` of an exported model: the vectors of torch, on squares and rectangles, without torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from nanochat.checkpoint import save_checkpoint
from nanochat.config import GPTConfig, MultimodalGPTConfig
from nanochat.errors import UserError
from nanochat.export import export
from nanochat.gpt import GPT
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.runtime import load
from nanochat.tokenizer import Tokenizer
from nanochat.vision.encoder import open_encoder
from nanochat.vision.inference import embeddings
from nanochat.vision.timm_encoder import TimmEncoder, described
from tests.test_torch_free import COMMAND

ROOT = Path(__file__).parents[1]
SHAPE = dict(sequence_len=128, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


def checkpoint(folder, weights, layer, tokens=1):
    """An encoder whose norms have seen pictures, so that its maps are of ordinary size."""
    torch.manual_seed(0)
    encoder = open_encoder(weights) if isinstance(weights, str) else weights
    encoder, tokenizer = encoder.truncate(layer), Tokenizer.train(["a few words"], 300)
    encoder.image_size = 128
    vision = dict(vision_embedding_dim=encoder.channels(layer), vision_layer=layer, vision_image_size=128)
    vision |= dict(vision_token_id=tokenizer.special("<|image|>"), vision_tokens_per_image=tokens)
    model = MultimodalGPT(MultimodalGPTConfig(**SHAPE, **vision))
    model.init_weights()
    model.attach_encoder(encoder)
    encoder.train()
    for _ in range(10):
        encoder.maps(torch.rand(4, 3, 64, 64), [layer])
    save_checkpoint(folder, model.eval(), tokenizer, {})
    return encoder.eval()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(encoder, the folder of its export): a picture is one vector."""
    folder = tmp_path_factory.mktemp("one")
    encoder = checkpoint(folder / "torch", "yolov9t.yaml", "p4")
    export(str(folder / "torch"), folder / "onnx")
    return encoder, folder / "onnx"


@pytest.fixture(scope="module")
def images():
    """Of three shapes; one has no border as a rectangle either way, one is smaller than the encoder's input."""
    sizes = ((160, 120), (120, 160), (160, 160), (50, 31), (160, 120), (300, 40))
    return [Image.effect_noise(size, 80).convert("RGB") for size in sizes]


@pytest.mark.parametrize("rectangles", [False, True])
def test_vectors_are_those_of_torch(one, images, rectangles):
    encoder, folder = one
    expected = embeddings(encoder, images, "avg", "p4", torch.float32, rectangles).numpy()
    found = load(str(folder)).model.embed(images, rectangles)
    assert found.dtype == np.float32 and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_an_export_names_no_file_of_this_machine(one):
    for path in one[1].iterdir():
        found = path.read_bytes()
        assert b"stack_trace" not in found and str(ROOT).encode() not in found, path.name


def test_rectangles_differ_from_squares(one, images):
    model = load(str(one[1])).model
    square, rectangle = model.embed(images), model.embed(images, rectangles=True)
    changes = np.abs(square - rectangle).max(1) > 1e-3 * np.abs(square).max()
    assert changes.tolist() == [image.width != image.height for image in images]


def test_networks_of_timm_take_rectangles_too(tmp_path, images):
    encoder = checkpoint(
        tmp_path / "torch",
        TimmEncoder(described("tf_mobilenetv3_small_minimal_100", [0.5] * 3, [0.5] * 3, 128)),
        "p4",
    )
    export(str(tmp_path / "torch"), tmp_path / "onnx")
    for rectangles in (False, True):
        expected = embeddings(encoder, images, "avg", "p4", torch.float32, rectangles).numpy()
        found = load(str(tmp_path / "onnx")).model.embed(images, rectangles)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    operators = {node.op_type for node in onnx.load(tmp_path / "onnx" / "encoder.onnx").graph.node}
    assert "Pad" not in operators  # by formulas of the sides, which took the exporter a minute


def test_the_command_needs_no_torch(one, images, tmp_path):
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    words = ["embed", tmp_path, "-o", tmp_path / "e.npz", "--weights", one[1], "--rectangles"]
    done = subprocess.run([sys.executable, "-c", COMMAND, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and "6 x " in done.stdout, done.stderr
    np.testing.assert_array_equal(
        np.load(tmp_path / "e.npz")["embeddings"], load(str(one[1])).model.embed(images, True)
    )


@pytest.mark.parametrize(
    "words", [["--layer", "p3"], ["--pool", "max"], ["--dtype", "float32"], ["--image-size", "320"]]
)
def test_what_an_export_fixes_cannot_be_chosen(nanochat, one, tmp_path, images, words):
    images[0].save(tmp_path / "p.png")
    words = ["embed", tmp_path / "p.png", "-o", tmp_path / "e.npz", "--weights", one[1], *words]
    error = nanochat(*words, code=2).err
    assert f"{words[-2]} cannot be chosen" in error and error.count("\n") == 1
    assert not (tmp_path / "e.npz").exists()


def test_several_tokens_take_squares_only(tmp_path, images):
    encoder = checkpoint(tmp_path / "torch", "yolov9t.yaml", "p4", tokens=64)
    export(str(tmp_path / "torch"), tmp_path / "onnx")
    model = load(str(tmp_path / "onnx")).model
    expected = embeddings(encoder, images, "avg", "p4", torch.float32).numpy()
    np.testing.assert_allclose(model.embed(images), expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(UserError, match="takes squares only.*leave out --rectangles"):
        model.embed(images, rectangles=True)


@pytest.mark.parametrize("words", [["detect", "p.png", "-o", "out.png", "--weights"], ["pack", "-o", "out"]])
def test_what_needs_the_checkpoint_says_so(nanochat, one, tmp_path, images, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images[0].save("p.png")
    error = nanochat(*words, one[1], code=2).err
    assert "was exported for ONNX Runtime: name the checkpoint" in error and error.count("\n") == 1


def test_a_text_model_embeds_nothing(nanochat, tmp_path, images):
    images[0].save(tmp_path / "p.png")
    model = GPT(GPTConfig(**SHAPE))
    model.init_weights()
    save_checkpoint(tmp_path / "torch", model, Tokenizer.train(["a few words"], 300), {})
    export(str(tmp_path / "torch"), tmp_path / "onnx")
    words = ["embed", tmp_path / "p.png", "-o", tmp_path / "e.npz", "--weights", tmp_path / "onnx"]
    assert "it is a text model" in nanochat(*words, code=2).err
