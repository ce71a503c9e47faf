"""The code blocks of the description that the project grew from, run as written on every pair of devices and dtype there is.

Only what a test cannot have is put in their place: devices, the dtype, sizes, and what the blocks leave out as "...".
"""

import itertools
from dataclasses import dataclass, fields

import pytest
import torch
from PIL import Image

from nanochat.gpt import GPTConfig
from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt
from nanochat.vision import YOLOv9Plus

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = ["torch.float32", "torch.bfloat16"]

BASIC = """
import torch
from PIL import Image
from nanochat.vision import YOLOv9Plus
from nanochat.multimodal_gpt import create_multimodal_gpt, MultimodalGPTConfig

yolo = YOLOv9Plus(device='cuda')
image = Image.open('robot_scene.jpg')
vision_emb = yolo.get_image_embeddings(image, pool='avg')
print(f"Vision embedding shape: {vision_emb.shape}")

config = MultimodalGPTConfig(
    sequence_len=256,
    vocab_size=50257,
    n_layer=12,
    n_head=8,
    n_kv_head=8,
    n_embd=768,
    vision_embedding_dim=84,
    use_vision_projection=True,
)

model = create_multimodal_gpt(config, device='cpu')
model.init_weights()
model.to(device='cuda', dtype=torch.float32)

prompt_tokens = [1, 2, 3, 4, 5]
vision_token_id = 50256

tokens = torch.tensor([[vision_token_id] + prompt_tokens], device='cuda')
vision_mask = torch.zeros_like(tokens, dtype=torch.bool)
vision_mask[0, 0] = True

logits = model(tokens, vision_emb.unsqueeze(0), vision_mask)

generated = model.generate_with_image(
    prompt_tokens=prompt_tokens,
    image=image,
    max_new_tokens=50,
    temperature=0.8
)
"""

EXTRACTION = """
from nanochat.vision import YOLOv9Plus

yolo = YOLOv9Plus(device='cuda')

avg_emb = yolo.get_image_embeddings(image, pool='avg')
max_emb = yolo.get_image_embeddings(image, pool='max')
flat_emb = yolo.get_image_embeddings(image, pool='flatten')

features = yolo.extract_features(image)
"""

TRAINING = """
batch_tokens = torch.randint(0, vocab_size, (batch_size, seq_len))
batch_images = [...]

vision_embeddings = []
for img in batch_images:
    emb = yolo.get_image_embeddings(img)
    vision_embeddings.append(emb)
vision_embeddings = torch.cat(vision_embeddings, dim=0)

vision_mask = torch.zeros_like(batch_tokens, dtype=torch.bool)
vision_mask[:, 0] = True

loss = model(
    batch_tokens,
    vision_embeddings,
    vision_mask,
    targets=batch_tokens,
    loss_reduction='mean'
)

loss.backward()
optimizer.step()
"""

CONFIG = """
@dataclass
class MultimodalGPTConfig(GPTConfig):
    vision_embedding_dim: int = 84
    use_vision_projection: bool = True
    vision_tokens_per_image: int = 1
"""

DTYPE_HANDLING = """
projected_vision = self.vision_projector(vision_embeddings)

projected_vision = projected_vision.to(dtype=x.dtype)
"""

MEMORY = """
import torch

torch.cuda.empty_cache()
torch.cuda.synchronize()

allocated = torch.cuda.memory_allocated(0) / 1e9
print(f"GPU memory: {allocated:.2f} GB")
"""

OUT_OF_MEMORY = """
yolo = YOLOv9Plus(device='cpu')

config = MultimodalGPTConfig(
    n_layer=2,
    n_embd=256,
    ...
)
"""

DTYPE_MISMATCH = """
model.to(device='cuda', dtype=torch.float32)
"""


# ---- what must be true after each block; `s` holds its names ----


def check_basic(s):
    assert s["vision_emb"].shape == (1, 84)
    assert s["logits"].shape == (1, 6, 50257) and torch.isfinite(s["logits"]).all()
    assert isinstance(s["generated"], list) and len(s["generated"]) == 50
    assert all(isinstance(token, int) and 0 <= token < 50257 for token in s["generated"])


def check_extraction(s):
    _, C, H, W = s["features"].shape
    assert (C, H, W) == (84, 20, 20) and s["flat_emb"].shape == (1, C * H * W)
    torch.testing.assert_close(s["avg_emb"], s["features"].mean((2, 3)))
    torch.testing.assert_close(s["max_emb"], s["features"].amax((2, 3)))


def check_training(s):
    assert 0 < s["loss"].item() < 20
    assert all(p.grad is not None for p in s["model"].vision_projector.parameters())
    moved = [name for name, p in s["model"].named_parameters() if not torch.equal(p, s["before"][name])]
    assert "lm_head.weight" in moved  # the only one that learns in the first step: the rest lies behind zeros


def check_config(s):
    written = {f.name: (f.type, f.default) for f in fields(s["MultimodalGPTConfig"])}
    ours = {f.name: (f.type, f.default) for f in fields(MultimodalGPTConfig)}
    assert written.items() <= ours.items() and issubclass(MultimodalGPTConfig, GPTConfig)


def check_dtype_handling(s):
    model, vectors, projected = s["self"], s["vision_embeddings"], s["projected_vision"]
    assert model.vision_projector(vectors).dtype == torch.float32
    assert projected.dtype == model.transformer.wte.weight.dtype == s["dtype"]
    picture = torch.full((3, 1), model.config.vision_token_id, device=s["model_device"])
    torch.testing.assert_close(
        model.embed(model.inputs(picture, vectors))[:, 0], projected
    )  # what the model itself does


def check_memory(s):
    on_gpu = "cuda" in (s["model_device"], s["yolo"].device.type)
    assert s["allocated"] > 0 if on_gpu else s["allocated"] == 0


def check_out_of_memory(s):
    model = create_multimodal_gpt(s["config"], device=s["model_device"])
    model.init_weights()
    model.attach_encoder(s["yolo"])  # an encoder on the CPU goes with a model on any device
    said = model.generate_with_image(prompt_tokens=[1, 2], image=s["image"], max_new_tokens=2)
    assert s["yolo"].device.type == "cpu" and model.device.type == s["model_device"] and len(said) == 2


def check_dtype_mismatch(s):
    assert {p.dtype for p in s["model"].parameters()} == {s["dtype"]}
    assert s["model"].device.type == s["model_device"]
    idx = torch.tensor([[99, 1]], device=s["model_device"])
    assert torch.isfinite(s["model"](idx, s["vision_embeddings"][:1])).all()


SNIPPETS = [
    (BASIC, check_basic),
    (EXTRACTION, check_extraction),
    (TRAINING, check_training),
    (CONFIG, check_config),
    (DTYPE_HANDLING, check_dtype_handling),
    (MEMORY, check_memory),
    (OUT_OF_MEMORY, check_out_of_memory),
    (DTYPE_MISMATCH, check_dtype_mismatch),
]
SMALL = {"n_layer=12": "n_layer=1", "n_embd=768": "n_embd=64"}
LEFT_OUT = {
    "[...]": "[image] * batch_size",
    "    ...\n": "    n_head=4, n_kv_head=4, vocab_size=1000, sequence_len=64,\n",
}


def adapt(code, encoder_device, model_device, dtype, changes):
    """The block for these devices and this dtype, with `changes` {written: instead}."""
    code = code.replace("YOLOv9Plus(device='cuda')", f"YOLOv9Plus(device='{encoder_device}')")
    code = code.replace("device='cuda'", f"device='{model_device}'").replace("torch.float32", dtype)
    code = code.replace("(batch_size, seq_len))", f"(batch_size, seq_len), device='{model_device}')")
    if not torch.cuda.is_available():
        code = code.replace("torch.cuda.synchronize()\n", "")  # the only line that a machine without a GPU refuses
    for written, instead in changes.items():
        code = code.replace(written, instead)
    return code


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    """The description's code loads official weights; a random encoder of the same shape runs the same path."""
    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", "yolov9t.yaml")


@pytest.fixture
def scene(tmp_path, monkeypatch):
    image = Image.effect_mandelbrot((320, 240), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    image.save(tmp_path / "robot_scene.jpg")
    monkeypatch.chdir(tmp_path)
    return image


def names_before(scene, encoder_device, model_device, dtype):
    """What the blocks take for granted."""
    config = MultimodalGPTConfig(sequence_len=32, vocab_size=100, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
    model = create_multimodal_gpt(config, device=model_device)
    model.init_weights()
    model.transformer.wte.to(dtype=dtype)  # embeddings alone: linear layers and projector stay in float32
    yolo = YOLOv9Plus(device=encoder_device, image_size=64)
    batch_tokens = torch.randint(0, 99, (3, 10), device=model_device)
    return {
        "torch": torch, "dataclass": dataclass, "GPTConfig": GPTConfig, "MultimodalGPTConfig": MultimodalGPTConfig,
        "YOLOv9Plus": YOLOv9Plus, "yolo": yolo, "image": scene, "model": model, "self": model,
        "before": {name: p.detach().clone() for name, p in model.named_parameters()},
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "vocab_size": 99, "batch_size": 3, "seq_len": 10,
        "vision_embeddings": yolo.get_image_embeddings([scene] * 3), "x": model.embed(model.inputs(batch_tokens)),
        "model_device": model_device, "dtype": dtype,
    }  # fmt: skip


@pytest.mark.parametrize(("encoder_device", "model_device", "dtype"), list(itertools.product(DEVICES, DEVICES, DTYPES)))
@pytest.mark.parametrize(("code", "check"), SNIPPETS, ids=[check.__name__[6:] for _, check in SNIPPETS])
def test_block_runs_as_written(scene, code, check, encoder_device, model_device, dtype):
    scope = names_before(scene, encoder_device, model_device, getattr(torch, dtype.removeprefix("torch.")))
    exec(adapt(code, encoder_device, model_device, dtype, SMALL | LEFT_OUT), scope)
    check(scope)


def test_the_basic_example_at_full_size(scene):
    """12 layers of 768, 162 M parameters, nothing changed but the devices: about 6 s on one core."""
    scope, device = {}, DEVICES[-1]
    exec(adapt(BASIC, device, device, "torch.float32", {}), scope)
    check_basic(scope)
    assert len(scope["model"].transformer.h) == 12 and scope["model"].config.n_embd == 768


def test_the_encoder_is_loaded_on_first_use_of_an_image(scene):
    config = MultimodalGPTConfig(sequence_len=32, vocab_size=100, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
    model = create_multimodal_gpt(config)
    model.init_weights()
    model(torch.tensor([[99, 1]]), torch.randn(1, 84))
    model.generate_with_image(prompt_tokens=[1], vision_embeddings=torch.randn(1, 1, 84), max_new_tokens=2)
    assert model.vision_encoder is None
    assert model.look(scene).shape == (1, 1, 84)
    assert isinstance(model.vision_encoder, YOLOv9Plus)
    assert any(name.startswith("vision_encoder.net.") for name in model.state_dict())
    loaded = model.vision_encoder
    model.generate_with_image(prompt_tokens=[1], image=scene, max_new_tokens=2)
    assert model.vision_encoder is loaded  # once
