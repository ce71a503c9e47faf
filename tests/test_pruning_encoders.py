"""Encoders with fewer hidden channels: what is removed changes no map; what is left loads, trains, exports, and is recovered."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.config import MultimodalGPTConfig
from nanochat.errors import UserError
from nanochat.export import export
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.pruning import importance_of_channels, prune_checkpoint, pruned_encoder
from nanochat.tokenizer import Tokenizer
from nanochat.training.recipes import Distill
from nanochat.training.run import Run
from nanochat.vision.encoder import encoder_from_architecture
from nanochat.vision.hidden import Hidden, hidden_channels, narrow
from nanochat.vision.inference import make_copy
from nanochat.vision.timm_encoder import TimmEncoder, described
from nanochat.vision.weights import WeightsError
from nanochat.vision.yolov9 import YOLOv9Plus
from tests.tiny_policy import random_model

pytest.importorskip("timm")
SIZE = 64
PLAIN, EXCITED = "mobilenetv2_050", "mobilenetv3_small_050"  # the second with squeeze-and-excitation


def pixels(n: int) -> torch.Tensor:
    coarse = torch.rand((n, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)


def random_encoder(name: str):
    """Random scales and shifts in its norms, and the statistics of some pictures."""
    torch.manual_seed(0)
    if name.endswith(".yaml"):
        encoder = YOLOv9Plus(name, image_size=SIZE).truncate("9")
    else:
        encoder = TimmEncoder(described(name, [0.5] * 3, [0.25] * 3, SIZE))
    for norm in encoder.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, 0, 0.3)
            norm.momentum = 1.0
    with torch.no_grad():
        encoder.train()(pixels(4), last_layer(encoder))
    return encoder.eval()


def last_layer(encoder) -> str:
    return "features" if isinstance(encoder, TimmEncoder) else "9"


@pytest.fixture(scope="module", params=[EXCITED, "yolov9t.yaml"])
def encoder(request):
    return random_encoder(request.param)


@pytest.fixture(scope="module")
def small(encoder):
    return pruned_encoder(encoder, 0.5)


def widths(encoder) -> dict[str, int]:
    return {name: hidden.width for name, hidden in hidden_channels(encoder.net).items()}


def maps(encoder, *layers: str) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [found.flatten() for found in encoder.maps(pixels(2), layers or [last_layer(encoder)]).values()]
        )


# ---- what is removed


def test_half_of_the_channels_of_every_block_are_gone_and_the_encoder_is_as_it_was(encoder, small):
    before, after = widths(encoder), widths(small)
    assert before.keys() == after.keys() == small.hidden.keys() and len(before) >= 7
    assert all(abs(after[name] - before[name] / 2) <= 8 for name in before) and not encoder.hidden
    assert "hidden" not in encoder.architecture
    channels = [each.channels(last_layer(each)) for each in (encoder, small)]
    assert channels[0] == channels[1] and maps(small).shape == maps(encoder).shape
    sizes = [sum(p.numel() for p in each.parameters()) for each in (encoder, small)]
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("silent", ["norms", "readers"])
def test_channels_that_add_nothing_go_first_and_their_absence_changes_no_map(encoder, small, silent):
    own = encoder_from_architecture(encoder.architecture)
    own.load_state_dict(encoder.state_dict())
    for number, (name, hidden) in enumerate(hidden_channels(own.net).items()):
        order = torch.randperm(hidden.width, generator=torch.Generator().manual_seed(number))
        dead = order[: hidden.width - small.hidden[name]]
        with torch.no_grad():
            for reader in hidden.readers if silent == "readers" else ():
                reader.weight[:, dead] = 0
            for norm in hidden.norms if silent == "norms" else ():
                norm.weight[dead] = norm.bias[dead] = 0
    left = pruned_encoder(own, 0.5)
    assert widths(left) == widths(small)
    assert (maps(own) - maps(encoder)).abs().max() > 0.1
    torch.testing.assert_close(maps(left), maps(own), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps(make_copy(left, torch.float32)), maps(own), rtol=1e-3, atol=1e-3)  # norms merged


def test_importance_is_the_scale_of_a_channel_times_the_weights_that_read_it():
    norms, reader = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)], torch.nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        norms[0].weight.copy_(torch.tensor([-3.0, 3.0, 0.0]))
        norms[1].weight.copy_(torch.tensor([4.0, 4.0, 0.0]))  # two parallel convolutions, as of RepConv
        reader.weight[:, 0, 0, 0] = torch.tensor([5.0, -12.0])
        reader.weight[:, 1] = 0
    found = importance_of_channels(Hidden([], norms, torch.nn.ReLU(), [reader], norms[0]))
    torch.testing.assert_close(found.detach(), torch.tensor([5.0 * 13.0, 0.0, 0.0]))


# ---- in a checkpoint


def test_an_architecture_says_how_many_are_left(encoder, small):
    described_as = json.loads(json.dumps(small.architecture))
    assert described_as["hidden"] == widths(small)
    rebuilt = encoder_from_architecture(described_as)
    rebuilt.load_state_dict(small.state_dict())
    torch.testing.assert_close(maps(rebuilt), maps(small), rtol=0, atol=0)
    shapes = encoder_from_architecture(described_as, shapes_only=True).state_dict()
    assert {name: t.shape for name, t in shapes.items()} == {name: t.shape for name, t in small.state_dict().items()}
    again = pruned_encoder(small, 0.3)
    assert all(0 < again.hidden[name] <= width for name, width in small.hidden.items()) and again.hidden != small.hidden


def test_a_truncated_one_says_it_of_the_blocks_it_has(encoder, small):
    layer = "p4" if isinstance(encoder, TimmEncoder) else "6"
    whole, cut = maps(small, layer), pruned_encoder(encoder, 0.5).truncate(layer)
    assert 0 < len(cut.architecture["hidden"]) < len(small.hidden)
    rebuilt = encoder_from_architecture(json.loads(json.dumps(cut.architecture)))
    rebuilt.load_state_dict(cut.state_dict())
    torch.testing.assert_close(maps(rebuilt, layer), whole)


@pytest.mark.parametrize(
    "hidden", [[], "all", 3, {"blocks.9.9": 8}, {"": 8}, {"x" * 9999: 8}, {"FIRST": 0}, {"FIRST": -1}, {"FIRST": 10**9},
               {"FIRST": True}, {"FIRST": "8"}, {"FIRST": None}, {"FIRST": 8.0}, {"FIRST": float("nan")}]
)  # fmt: skip
def test_other_channels_are_refused_in_one_line(encoder, small, hidden):
    if isinstance(hidden, dict):
        hidden = {name.replace("FIRST", next(iter(small.hidden))): width for name, width in hidden.items()}
    with pytest.raises(WeightsError, match="wrong encoder architecture: .*, expected") as caught:
        narrow(encoder.net, hidden)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_architecture_from_a_stranger_is_refused(encoder):
    with pytest.raises(WeightsError, match="wrong encoder architecture: .net. is no block, expected "):
        encoder_from_architecture(encoder.architecture | {"hidden": {"net": 8}}, shapes_only=True)


# ---- a whole model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a few words"], 300)


def model_with(encoder, layer: str, tokenizer) -> MultimodalGPT:
    config = MultimodalGPTConfig(
        sequence_len=32, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=32, vision_layer=layer,
        vision_embedding_dim=encoder.channels(layer), vision_tokens_per_image=4, vision_image_size=SIZE,
        vision_token_id=tokenizer.special("<|image|>"),
    )  # fmt: skip
    model = random_model(MultimodalGPT, config)
    model.attach_encoder(encoder)
    return model


def test_a_pruned_model_is_saved_and_exported(tokenizer, tmp_path):
    model = model_with(random_encoder(PLAIN).truncate("p2"), "p2", tokenizer)
    save_checkpoint(tmp_path / "whole", model, tokenizer, {"learnt": {"captions": True}, "step": 3, "steps": 3})
    report = prune_checkpoint(str(tmp_path / "whole"), tmp_path / "small", 0.3)
    assert report.channels == (96, 64) and report.hidden == (128, 96)
    small = load_checkpoint(tmp_path / "small")[0]
    assert small.vision_encoder.architecture["hidden"] == {"blocks.1.1": 64}
    assert report.parameters == (model.num_parameters(), small.num_parameters())
    assert export(str(tmp_path / "small"), tmp_path / "onnx").logits < 1e-4


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """The folder of a model whose encoder can teach: all of a network."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    model = model_with(random_encoder(PLAIN), "features", tokenizer)
    save_checkpoint(folder, model, tokenizer, {"learnt": {"captions": True}, "step": 3, "steps": 3})
    return folder


@pytest.fixture
def recipe(whole, tmp_path):
    """Of an encoder that learns the maps of `whole`."""
    rng = np.random.default_rng(0)
    for i in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    lines = ["file,caption", *(f"{i}.png,a picture" for i in range(20))]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return Distill(
        data=str(tmp_path), teacher=str(whole), components=64, images_per_step=8, steps=8, eval_every=8, warmup_steps=2,
        dtype="float32", val_images=4, out=str(tmp_path / "run"), cache=str(tmp_path / "cache"),
    )  # fmt: skip


def test_the_encoder_of_a_pruned_model_learns_the_maps_that_its_decoder_knows(whole, recipe, tmp_path):
    prune_checkpoint(str(whole), tmp_path / "small", 0.3)
    model, _, training = load_checkpoint(Run(replace(recipe, start_from=str(tmp_path / "small"))).train())
    checks = [line["aligned"] for line in training["history"] if "aligned" in line]
    assert checks[1] < 0.97 * checks[0] and training["learnt"]["captions"]
    before, after = load_checkpoint(tmp_path / "small")[0].state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("vision_encoder.") for name in moved)


def test_an_encoder_that_gives_its_teachers_maps_has_no_error(whole, recipe):
    run = Run(replace(recipe, start_from=str(whole), batchnorm="frozen"))
    found = run.validate()
    assert found["aligned"] < 1e-6 and found["shuffled"] > 0.1


def test_a_decoder_that_reads_other_maps_than_the_teachers_is_refused(recipe):
    wanted = replace(recipe, start_from="shapes", vision_tokens=16)
    with pytest.raises(UserError, match="reads maps of 64 channels, those of .* have 1280: use --encoder shapes"):
        Run(wanted)
