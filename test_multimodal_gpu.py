"""The four things that the whole stack must do, on CUDA where there is one and on the CPU otherwise:

1. the encoder turns a picture into embeddings,  2. a multimodal GPT is made,
3. it runs forwards (and backwards) with vision,  4. it generates text about a picture.

Run it with `python test_multimodal_gpu.py` or `uv run python test_multimodal_gpu.py`; any failure exits non-zero. The encoder is
$NANOCHAT_YOLO_WEIGHTS if set, else the official YOLOv9-t shape with random weights, so nothing is downloaded. The language model
looks at its map "p5": the head's, which the first part checks, is detections and says little about colours.
"""

import os
import resource
import sys

import torch
from PIL import Image, ImageDraw

from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt
from nanochat.training.optimizers import make_optimizers
from nanochat.training.recipes import Recipe
from nanochat.vision import YOLOv9Plus
from nanochat.vision.pixels import read_pixels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER = "p5"
COLOURS = ("red", "blue")


def check(condition: bool, message: str) -> None:
    # not `assert`: python -O must not turn this file into a no-op
    if not condition:
        raise SystemExit(f"✗ FAILED: {message}")


def scene(colour: str) -> Image.Image:
    image = Image.new("RGB", (320, 240), colour)
    ImageDraw.Draw(image).ellipse((130, 90, 190, 150), fill="white")
    return image


def encoder() -> YOLOv9Plus:
    weights = os.environ.get("NANOCHAT_YOLO_WEIGHTS") or "yolov9t.yaml"
    try:
        yolo = YOLOv9Plus(weights, device=DEVICE, image_size=320)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"✗ FAILED: {error}") from error
    if weights.endswith((".yaml", ".yml")):
        wake(yolo)
    return yolo


@torch.no_grad()
def wake(yolo: YOLOv9Plus) -> None:
    """Random layers let next to nothing through until BatchNorm has seen pictures, and a new head is sure of seeing no object:
    one pass sets the statistics, noise the scores."""
    for module in yolo.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    yolo.net.train()(read_pixels(yolo, [scene(colour) for colour in COLOURS])[0])
    yolo.eval()
    for scores in yolo.net.model[-1].cv3:
        torch.nn.init.normal_(scores[-1].weight, 0.0, 0.05)
        torch.nn.init.normal_(scores[-1].bias, -1.6, 0.2)


def embeds(yolo: YOLOv9Plus) -> None:
    width = yolo.channels()
    average, largest = (yolo.get_image_embeddings(scene("red"), pool=pool) for pool in ("avg", "max"))
    features = yolo.extract_features(scene("red"))
    flat = yolo.get_image_embeddings(scene("red"), pool="flatten")
    check(average.shape == largest.shape == (1, width), f"pooled embeddings are (1, {width}), got {average.shape}")
    check(features.shape == (1, width, 10, 10), f"the 320-pixel head map is 10 x 10, got {features.shape}")
    check(flat.shape == (1, width * 100), f"flattened embeddings, got {flat.shape}")
    check(torch.allclose(average, features.mean((2, 3)), atol=1e-5), "avg is the mean of the map")
    check(torch.allclose(largest, features.amax((2, 3)), atol=1e-5), "max is the maximum of the map")
    check(torch.equal(flat, features.flatten(1)), "flatten is the map, cell by cell")
    check(average.device.type == DEVICE, f"embeddings are on {DEVICE}")
    for layer in ("head", LAYER):
        red, blue = (yolo.get_image_embeddings(scene(colour), layer=layer) for colour in COLOURS)
        apart = (red - blue).abs().max().item()
        check(apart > 0.01, f"another picture, another embedding: {layer} differs by {apart:.2g}")


def new_model(yolo: YOLOv9Plus):
    config = MultimodalGPTConfig(
        sequence_len=256, vocab_size=1000, n_layer=2, n_head=4, n_kv_head=4, n_embd=256,
        vision_embedding_dim=yolo.channels(LAYER), vision_layer=LAYER, vision_image_size=320,
    )  # fmt: skip
    model = create_multimodal_gpt(config, device="cpu")
    decoder = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vision_projector"))
    check(decoder == 2 * 12 * 256**2 + 2 * 1000 * 256, f"the small model has 2,084,864 parameters, got {decoder:,}")
    model.init_weights()
    model.to(device=DEVICE, dtype=torch.float32)
    model.attach_encoder(yolo.requires_grad_(False))
    return model


def learns_from_vision(model) -> None:
    """A few dozen steps must tell two pictures apart: the loss falls, and only with the right picture."""
    seen = model.look([scene(colour) for colour in COLOURS])  # (2, 1, D)
    tokens = torch.tensor([[999, 5, 6, 10], [999, 5, 6, 20]], device=DEVICE)
    targets = torch.full_like(tokens, -1)
    targets[:, 2] = tokens[:, 3]  # after [picture, 5, 6]: 10 for red, 20 for blue
    vision_mask = torch.zeros_like(tokens, dtype=torch.bool)
    vision_mask[:, 0] = True
    logits = model(tokens, seen, vision_mask)
    check(logits.shape == (2, 4, 1000) and bool(torch.isfinite(logits).all()), "finite logits (2, 4, 1000)")
    first = model(tokens, seen, vision_mask, targets=targets).item()
    optimizers = make_optimizers(model, Recipe())  # as `nanochat train` does
    for _ in range(100):
        loss = model(tokens, seen, vision_mask, targets=targets, loss_reduction="mean")
        if loss.item() < 0.01:
            break
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    swapped = model(tokens, seen.flip(0), vision_mask, targets=targets).item()
    check(loss.item() < 0.01 < first, f"the loss falls, {first:.3f} -> {loss.item():.3f}")
    check(swapped > 1.0, f"the swapped pictures give wrong answers, loss {swapped:.3f}")


def generates(model) -> None:
    model.eval()
    for colour, answer in zip(COLOURS, (10, 20), strict=True):
        said = model.generate_with_image(prompt_tokens=[5, 6], image=scene(colour), max_new_tokens=10, temperature=0.0)
        check(len(said) == 10 and said[0] == answer, f"asked about the {colour} picture it says {answer}, got {said}")
    sampled = model.generate_with_image(prompt_tokens=[5, 6], image=scene("red"), max_new_tokens=10, temperature=0.8)
    check(len(sampled) == 10 and all(0 <= token < 1000 for token in sampled), f"sampled tokens, got {sampled}")


def main() -> None:
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"on {name}")
    yolo = encoder()
    embeds(yolo)
    print("✓ 1. the encoder gives embeddings")
    model = new_model(yolo)
    print("✓ 2. a multimodal GPT is made")
    learns_from_vision(model)
    print("✓ 3. forward and backward passes with vision")
    generates(model)
    print("✓ 4. text about a picture")
    print("✓ ALL TESTS PASSED!")
    if DEVICE == "cuda":
        print(f"Final GPU memory: {torch.cuda.memory_allocated(0) / 1e9:.2f} GB")
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(f"Final GPU memory: 0.00 GB (no GPU; peak process memory {peak / 1e9:.2f} GB)")


if __name__ == "__main__":
    main()
