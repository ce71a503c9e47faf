"""The code blocks of the description that the project grew from, run as written: paths, devices and weights aside."""

import pytest
import torch
from PIL import Image

from nanochat.vision import YOLOv9Plus

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

BASIC = """
import torch
from PIL import Image
from nanochat.vision import YOLOv9Plus
from nanochat.multimodal_gpt import create_multimodal_gpt, MultimodalGPTConfig

yolo = YOLOv9Plus(device='{encoder_device}')
image = Image.open('robot_scene.jpg')
vision_emb = yolo.get_image_embeddings(image, pool='avg')
assert vision_emb.shape == (1, 84)

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
{smaller}
model = create_multimodal_gpt(config, device='cpu')
model.init_weights()
model.to(device='{model_device}', dtype={dtype})

prompt_tokens = [1, 2, 3, 4, 5]
vision_token_id = 50256

tokens = torch.tensor([[vision_token_id] + prompt_tokens], device='{model_device}')
vision_mask = torch.zeros_like(tokens, dtype=torch.bool)
vision_mask[0, 0] = True

logits = model(tokens, vision_emb.unsqueeze(0), vision_mask)
assert logits.shape == (1, 6, 50257)

generated = model.generate_with_image(
    prompt_tokens=prompt_tokens,
    image=image,
    max_new_tokens=50,
    temperature=0.8
)
assert isinstance(generated, list) and len(generated) == 50
assert all(isinstance(token, int) and 0 <= token < 50257 for token in generated)
"""

EXTRACTION = """
from nanochat.vision import YOLOv9Plus

yolo = YOLOv9Plus(device='{encoder_device}')
avg_emb = yolo.get_image_embeddings(image, pool='avg')
max_emb = yolo.get_image_embeddings(image, pool='max')
flat_emb = yolo.get_image_embeddings(image, pool='flatten')
features = yolo.extract_features(image)

_, C, H, W = features.shape
assert avg_emb.shape == max_emb.shape == (1, 84) and C == 84
assert flat_emb.shape == (1, C*H*W)
"""

TRAINING = """
batch_tokens = torch.randint(0, vocab_size, (batch_size, seq_len))
batch_images = [image] * batch_size

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
assert 0 < loss.item() < 20
"""

CONFIG = """
from dataclasses import fields
from nanochat.gpt import GPTConfig
from nanochat.multimodal_gpt import MultimodalGPTConfig
assert issubclass(MultimodalGPTConfig, GPTConfig)
defaults = {{f.name: f.default for f in fields(MultimodalGPTConfig)}}
assert defaults['vision_embedding_dim'] == 84
assert defaults['use_vision_projection'] is True
assert defaults['vision_tokens_per_image'] == 1
"""

DTYPES = """
x = model.transformer.wte(batch_tokens)
projected_vision = model.vision_projector(vision_embeddings)
projected_vision = projected_vision.to(dtype=x.dtype)
assert projected_vision.shape == (batch_size, 64)
model.to(device='{model_device}', dtype=torch.float32)
"""

OOM = """
yolo = YOLOv9Plus(device='cpu')
config = MultimodalGPTConfig(n_layer=2, n_embd=256, n_head=4, n_kv_head=4, vocab_size=1000)
create_multimodal_gpt(config, device='{model_device}').init_weights()
"""

SMALLER = "config = MultimodalGPTConfig(**vars(config) | dict(n_layer=1, n_embd=64))  # quick enough for a test"


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


def training_scope(scene, model_device):
    from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt

    config = MultimodalGPTConfig(sequence_len=32, vocab_size=100, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
    model = create_multimodal_gpt(config, device=model_device)
    model.init_weights()
    return {
        "torch": torch, "yolo": YOLOv9Plus(image_size=64), "image": scene, "model": model, "vocab_size": 100,
        "batch_size": 3, "seq_len": 10, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("model_device", DEVICES)
@pytest.mark.parametrize("encoder_device", DEVICES)
def test_basic_example(scene, encoder_device, model_device, dtype):
    code = BASIC.format(encoder_device=encoder_device, model_device=model_device, dtype=dtype, smaller=SMALLER)
    exec(code, {})


@pytest.mark.parametrize("encoder_device", DEVICES)
def test_embedding_extraction(scene, encoder_device):
    exec(EXTRACTION.format(encoder_device=encoder_device), {"image": scene})


def test_training(scene):
    scope = training_scope(scene, "cpu")
    exec(TRAINING, scope)
    assert all(p.grad is not None for p in scope["model"].vision_projector.parameters())
    exec(DTYPES.format(model_device="cpu"), scope)


@pytest.mark.parametrize("snippet", [CONFIG, OOM], ids=["config", "oom"])
def test_configuration(snippet):
    from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt

    scope = {"YOLOv9Plus": YOLOv9Plus, "MultimodalGPTConfig": MultimodalGPTConfig}
    exec(snippet.format(model_device="cpu"), scope | {"create_multimodal_gpt": create_multimodal_gpt})
