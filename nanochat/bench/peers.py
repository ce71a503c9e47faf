"""What else one would take, at equal shapes, with random weights: the time does not depend on them."""

from nanochat.bench.ours import CONTEXT, SHAPES, pictures, prompt
from nanochat.vision.yolov9_weights import import_ultralytics

SMOLVLM = dict(  # SmolVLM-256M
    text=dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49280,
    ),
    vision=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
    ),
)  # fmt: skip


def yolo(weights: str):
    import_ultralytics()
    from ultralytics import YOLO

    return YOLO(weights)


def embed(weights: str, n: int, rectangles: bool = True, half: bool = False, device: str = "cpu"):
    """ultralytics' embed: the input of the detection head at stride 32. half: in float16."""
    model = yolo(weights)
    shown = [picture[..., ::-1] for picture in pictures(n)]  # BGR
    options = dict(rect=rectangles, half=half, device=device, verbose=False)
    return lambda: model.embed(shown, **options), {"ultralytics": import_ultralytics().__version__}


def detect(weights: str, device: str = "cpu"):
    model = yolo(weights)
    shown = pictures(1)[0][..., ::-1]
    return lambda: model.predict(shown, device=device, verbose=False), {}


def resnet18(size: int, device: str = "cpu"):
    """torchvision's ResNet-18, the encoder of ACT and Diffusion Policy, on pixels that are ready: it says nothing yet."""
    import torch
    import torchvision

    model, pixels = torchvision.models.resnet18().eval().to(device), torch.rand(1, 3, size, size, device=device)
    return lambda: model(pixels), {}


def causal_lm(kind: str, shape: str, device: str):
    import transformers

    width, layers, heads, vocab = SHAPES[shape]
    config = dict(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    # Llama's MLP has three matrices instead of two: two thirds of the width make the same number of weights
    inner = 4 * width if kind == "NanoChat" else 8 * width // 3
    config = getattr(transformers, f"{kind}Config")(**config, intermediate_size=inner, eos_token_id=None)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(device)


def decode(kind: str, shape: str, n_prompt: int, n_tokens: int, cache: str = "dynamic", device: str = "cpu"):
    import torch

    model = causal_lm(kind, shape, device)
    ids = torch.tensor([prompt(n_prompt, model.config.vocab_size)], device=device)
    fixed = dict(do_sample=False, min_new_tokens=n_tokens, max_new_tokens=n_tokens, pad_token_id=0)
    if cache == "static":
        fixed |= dict(cache_implementation="static", disable_compile=True)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **fixed), about(model)


def about(model) -> dict:
    import transformers

    return {"parameters": sum(p.numel() for p in model.parameters()), "transformers": transformers.__version__}


def train(kind: str, shape: str, rows: int, length: int, device: str = "cpu"):
    import torch

    model = causal_lm(kind, shape, device).train()
    ids = torch.tensor([prompt(length, model.config.vocab_size)] * rows, device=device)

    @torch.enable_grad()
    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step, about(model)


def forward(kind: str, shape: str, length: int, device: str = "cpu"):
    import torch

    model = causal_lm(kind, shape, device)
    ids = torch.tensor([prompt(length, model.config.vocab_size)], device=device)
    return lambda: model(ids), about(model)


def smolvlm(tiles: int, n_text: int, device: str = "cpu"):
    """SmolVLM of 256 M parameters: pixels of so many tiles of 512 x 512, ready, and a question to the first token. In bfloat16 on
    a GPU, as ours."""
    import torch
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config=SMOLVLM["text"], vision_config=SMOLVLM["vision"], scale_factor=4, image_token_id=49190
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = SmolVLMForConditionalGeneration(config).eval().to(device, dtype)
    places = tiles * (512 // 16 // 4) ** 2
    ids = torch.tensor([[config.image_token_id] * places + prompt(n_text, 40000)], device=device)
    pixels = torch.rand(1, tiles, 3, 512, 512, device=device, dtype=dtype)
    return lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1), about(model) | {"tokens": ids.numel()}
