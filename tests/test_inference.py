"""The fast copy of an encoder: the same maps, never the weights that train, and bfloat16 only where it agrees."""

import copy

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.vision import TimmEncoder, inference
from nanochat.vision.inference import (
    embeddings,
    fast_copy,
    infer,
    inference_maps,
    merge_pairs,
    probe_picture,
    quick_dtype,
)
from nanochat.vision.pixels import to_pixels
from nanochat.vision.timm_encoder import described
from nanochat.vision.yolov9 import YOLOv9Plus

SQUARES = np.concatenate(
    [np.roll(probe_picture(64), 9 * n, 1 + n % 2) for n in range(6)]
)  # (6, 64, 64, 3), all different


def timm_encoder(name="test_efficientnet"):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return with_statistics(TimmEncoder(described(name, [0.5] * 3, [0.2] * 3, 64)), "p4")


def yolo():
    torch.manual_seed(0)
    return with_statistics(YOLOv9Plus("yolov9t.yaml", image_size=64).truncate("p3"), "p3")


def with_statistics(encoder, layer):
    """Every BatchNorm has another mean, variance, weight and bias, as after training."""
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5), torch.nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.momentum = 1.0
    encoder.train().maps(pixels(), [layer])
    return encoder.eval()


def pixels():
    return to_pixels(SQUARES, "cpu", torch.float32)


def norms_of(module):
    return [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize(("make", "layer"), [(timm_encoder, "p4"), (yolo, "p3")])
@torch.no_grad()
def test_in_float64_the_copy_differs_by_rounding_alone(make, layer):
    """In float32, rounding errors grow through a random network; what is left in float64 is a wrong formula."""
    encoder = make().to(torch.float64)
    expected = encoder.maps(to_pixels(SQUARES, "cpu", torch.float64), [layer])[layer]
    found = inference_maps(encoder, SQUARES, [layer])[layer]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize(("make", "layer"), [(timm_encoder, "p4"), (yolo, "p3")])
@torch.no_grad()
def test_the_copy_has_the_same_maps_without_batchnorm(make, layer):
    encoder = make()
    expected = encoder.maps(pixels(), [layer])[layer]
    found = inference_maps(encoder, SQUARES, [layer])[layer]  # in two parts: 4 and 2 pictures
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert norms_of(encoder) and not norms_of(fast_copy(encoder, torch.float32))


def test_the_weights_that_train_stay_and_a_step_is_seen():
    encoder = timm_encoder()
    before, names = copy.deepcopy(encoder.state_dict()), list(encoder.state_dict())
    first = embeddings(encoder, list(SQUARES), "avg", "p4")
    fast = fast_copy(encoder, torch.float32)
    assert fast_copy(encoder, torch.float32) is fast and list(encoder.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    optimizer = torch.optim.AdamW(encoder.parameters(), 0.01)
    encoder.maps(pixels(), ["p4"])["p4"].square().mean().backward()
    optimizer.step()
    after = embeddings(encoder, list(SQUARES), "avg", "p4")
    assert (after - first).abs().max() > 0.01
    torch.testing.assert_close(after, encoder.maps(pixels(), ["p4"])["p4"].detach().mean((2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["statistics", "weights", "truncate"])
def test_every_change_of_the_encoder_makes_a_new_copy(change):
    encoder = timm_encoder()
    fast = fast_copy(encoder, torch.float32)
    if change == "statistics":
        encoder.train().maps(pixels(), ["p4"])
    elif change == "weights":
        encoder.load_state_dict({name: value.clone() for name, value in encoder.state_dict().items()})
    else:
        encoder.truncate("p4")
    assert fast_copy(encoder, torch.float32) is not fast


@torch.no_grad()
def test_training_mode_and_hooks():
    encoder = timm_encoder().train()
    mean = norms_of(encoder)[0].running_mean.clone()
    inference_maps(encoder, SQUARES, ["p4"])
    calls = []
    handle = encoder.net.conv_stem.register_forward_hook(lambda module, *rest: calls.append(module.training))
    inference_maps(encoder, SQUARES, ["p4"])  # a hook is on the encoder's own modules, so these run
    handle.remove()
    inference_maps(encoder, SQUARES, ["p4"])
    assert calls == [False] and encoder.training and torch.equal(norms_of(encoder)[0].running_mean, mean)


def test_inference_mode():
    with torch.inference_mode():
        encoder = timm_encoder()
        expected = encoder.maps(pixels(), ["p4"])["p4"]
        assert fast_copy(encoder, torch.float32) is None  # its tensors do not count what is written to them
        torch.testing.assert_close(inference_maps(encoder, SQUARES, ["p4"])["p4"], expected)
    encoder = timm_encoder()
    with torch.inference_mode():
        inside = inference_maps(encoder, SQUARES, ["p4"])["p4"]
    torch.testing.assert_close(inference_maps(encoder, SQUARES, ["p4"])["p4"], inside.clone())


class Crossed(torch.nn.Module):
    """Its BatchNorm stands behind the convolution, and does not read what this one gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

    def forward_features(self, x):
        return self.conv(x) + self.norm(x)


def test_a_wrong_guess_is_found():
    encoder = timm_encoder()
    encoder.net = Crossed().eval()
    torch.nn.init.constant_(encoder.net.norm.running_var, 4.0)
    merged = copy.deepcopy(encoder.net)
    merge_pairs(merged)
    assert not norms_of(merged)  # the guess alone would have changed the maps
    encoder.net.num_features = 3
    encoder.merge_norms()
    assert norms_of(encoder)


@torch.no_grad()
def test_activations_of_the_copy_alone_write_over_their_input():
    encoder = with_statistics(YOLOv9Plus("yolov9t.yaml", image_size=64), "p5")
    fast = fast_copy(encoder, torch.float32)
    plain = copy.deepcopy(fast)
    before, after, copied = (
        [part for part in net.modules() if type(part) is torch.nn.SiLU] for net in (encoder, fast, plain)
    )
    assert not any(part.inplace for part in before) and sum(part.inplace for part in after) > 150
    for part in copied:
        part.inplace = False
    layers = ["2", "p3", "p4", "p5", "head"]
    found, expected = (net.maps(pixels(), layers) for net in (fast, plain))
    assert all(torch.equal(found[layer], expected[layer]) for layer in layers)


def test_bfloat16_where_the_processor_has_it_and_it_agrees(monkeypatch):
    encoder = timm_encoder()
    monkeypatch.setattr(inference, "computes_bfloat16", lambda device: False)
    assert quick_dtype(encoder, "p4") == torch.float32
    monkeypatch.setattr(inference, "computes_bfloat16", lambda device: True)
    assert quick_dtype(encoder, "p4") == torch.bfloat16
    quick = embeddings(encoder, list(SQUARES), "avg", "p4", torch.bfloat16)
    exact = embeddings(encoder, list(SQUARES), "avg", "p4")
    assert quick.dtype == torch.float32 and torch.cosine_similarity(quick, exact).min() > 0.998
    monkeypatch.setattr(inference, "AGREEMENT", 1.1)
    assert quick_dtype(encoder, "p4") == torch.float32
    assert quick_dtype(encoder.to(torch.float64), "p4") == torch.float64


def test_errors_pass_through():
    encoder = timm_encoder()
    with pytest.raises(UserError, match="no layer 'head'"):
        infer(encoder, SQUARES, lambda fast, pixels: fast.maps(pixels, ["head"]))
    with pytest.raises(UserError, match="pool must be"):
        embeddings(encoder, list(SQUARES), "sum", "p4")
