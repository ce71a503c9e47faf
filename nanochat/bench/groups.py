"""Which contestants race against which. The first of a race is ours, and the others' times are told as multiples of its time."""

from nanochat.bench.ours import QUESTION, SHAPES
from nanochat.bench.runner import Contestant, Race

PROMPT = 16  # tokens before those that are timed
TOKENS = {"2.1 M": 128, "10 M": 64, "134 M": 16}  # that a call generates
RESNET = "ResNet-18 of torchvision alone, ready pixels"


def on_onnx(name: str, make: str, arguments: dict) -> tuple[Contestant, ...]:
    """The same on ONNX Runtime, in float32 and with 8-bit weights and products."""
    return tuple(
        Contestant(f"{name}, ONNX Runtime, {label}", make, arguments | {"runtime": runtime}, only="cpu")
        for label, runtime in (("float32", "onnx"), ("int8", "int8"))
    )


def embed_rows(arguments: dict) -> tuple[Contestant, ...]:
    """ultralytics' embed takes rectangles by default, ours squares; both can do both."""
    rows = (
        ("nanochat embed --rectangles, bfloat16", "ours:embed", {"rectangles": True}),
        ("nanochat embed --rectangles, float32", "ours:embed", {"rectangles": True, "dtype": "float32"}),
        ("nanochat embed, bfloat16", "ours:embed", {}),
        ("nanochat embed, float32", "ours:embed", {"dtype": "float32"}),
        ("ultralytics embed", "peers:embed", {}),
        ("ultralytics embed, squares", "peers:embed", {"rectangles": False}),
    )
    half = Contestant("ultralytics embed, float16", "peers:embed", arguments | {"half": True}, only="cuda")
    return (*(Contestant(label, make, arguments | given) for label, make, given in rows), half)


def embed_onnx_rows(arguments: dict) -> tuple[Contestant, ...]:
    return tuple(
        Contestant(
            f"nanochat embed of an export{flag}, {dtype}",
            "ours:embed_onnx",
            arguments | {"int8": dtype == "int8", "rectangles": bool(flag)},
            only="cpu",
        )
        for flag in (" --rectangles", "")
        for dtype in ("int8", "float32")
    )


def embed(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    sixteen, one = {"weights": weights, "n": 16}, {"weights": weights, "n": 1}
    return [
        Race(
            "16 pictures of 480 x 640 to vectors of layer p5, per picture",
            (*embed_rows(sixteen), *embed_onnx_rows(sixteen)),
            times=16,
        ),
        Race(
            "one picture to a vector of layer p5",
            (*embed_rows(one), *embed_onnx_rows(one)),
        ),
        Race(
            "one picture to boxes",
            (
                Contestant("nanochat detect", "ours:detect", {"weights": weights}),
                Contestant("ultralytics predict", "peers:detect", {"weights": weights}),
            ),
        ),
    ]


def ask(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    shown = {"checkpoint": checkpoint, "picture": picture}
    question = shown | {"question": QUESTION}
    return [
        Race(
            "a picture's file to its caption",
            (
                Contestant(checkpoint, "ours:ask", shown),
                Contestant(f"{checkpoint}, its encoder's part", "ours:look", shown),
                *on_onnx(checkpoint, "ours:ask", shown),
                Contestant(RESNET, "peers:resnet18", {"size": 224}),
            ),
        ),
        Race(
            "a picture's file and a question to the answer",
            (
                Contestant(checkpoint, "ours:ask", question),
                *on_onnx(checkpoint, "ours:ask", question),
                Contestant(RESNET, "peers:resnet18", {"size": 224}),
            ),
        ),
        Race(
            "a new process to the answer to a question: imports, loading, the answer (memory: without that process)",
            (
                Contestant(
                    f"{checkpoint}, ONNX Runtime, int8", "ours:cold", question | {"runtime": "int8"}, only="cpu"
                ),
                Contestant(
                    f"{checkpoint}, ONNX Runtime, float32", "ours:cold", question | {"runtime": "onnx"}, only="cpu"
                ),
                Contestant(checkpoint, "ours:cold", question),
            ),
            rounds=7,
        ),
        Race(
            "a picture and a question to the first token",
            (
                Contestant(checkpoint, "ours:ask", question | {"n_tokens": 1}),
                *on_onnx(checkpoint, "ours:ask", question | {"n_tokens": 1}),
                Contestant("SmolVLM, 256 M, one tile of 512 x 512", "peers:smolvlm", {"tiles": 1, "n_text": 20}),
            ),
            rounds=5,
        ),
    ]


def decode(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    races = []
    for shape in SHAPES:
        work = {"shape": shape, "n_prompt": PROMPT, "n_tokens": TOKENS[shape]}
        contestants = [
            Contestant("nanochat, torch", "ours:decode", work),
            Contestant(
                "nanochat, torch, fixed shapes, CUDA graph", "fixed:decode", work | {"compiled": False}, only="cuda"
            ),
            Contestant("nanochat, torch, fixed shapes, torch.compile", "fixed:decode", work | {"compiled": True}),
            Contestant("nanochat, ONNX Runtime, float32", "ours:decode_onnx", work | {"int8": False}, only="cpu"),
            Contestant("nanochat, ONNX Runtime, int8", "ours:decode_onnx", work | {"int8": True}, only="cpu"),
            Contestant("transformers NanoChat", "peers:decode", work | {"kind": "NanoChat"}),
            Contestant("transformers Llama", "peers:decode", work | {"kind": "Llama"}),
            Contestant("transformers Llama, static cache", "peers:decode", work | {"kind": "Llama", "cache": "static"}),
        ]
        if shape != "134 M":
            contestants.append(Contestant("nanochat, torch, without a cache", "ours:decode_uncached", work))
        rounds = 5 if shape == "134 M" else 1000
        races.append(Race(f"a token of {shape} parameters, batch 1", tuple(contestants), TOKENS[shape], rounds=rounds))
    return races


def act(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    one = {"checkpoint": policy, "cameras": 1, "height": 128, "width": 128}
    two = one | {"cameras": 2, "height": 480, "width": 640}
    return [
        Race(
            "one camera of 128 x 128 to a chunk of actions",
            (
                Contestant(policy, "ours:act", one),
                *on_onnx(policy, "ours:act", one),
                Contestant(f"{RESNET} of 128 x 128", "peers:resnet18", {"size": 128}),
                Contestant(f"{RESNET} of 224 x 224", "peers:resnet18", {"size": 224}),
            ),
        ),
        Race(
            "two cameras of 480 x 640 to a chunk of actions, making them small included",
            (
                Contestant(f"the shape of {policy}", "ours:act", two),
                *on_onnx(f"the shape of {policy}", "ours:act", two),
                Contestant(f"{RESNET} of 224 x 224, once", "peers:resnet18", {"size": 224}),
            ),
        ),
    ]


def train(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    races = []
    for shape, rows in (("2.1 M", 32), ("10 M", 16)):
        work = {"shape": shape, "rows": rows, "length": 128}
        races.append(
            Race(
                f"forward and backward of {rows} rows of 128 tokens, {shape} parameters",
                (
                    Contestant("nanochat", "ours:train", work),
                    Contestant("transformers NanoChat", "peers:train", work | {"kind": "NanoChat"}),
                    Contestant("transformers Llama", "peers:train", work | {"kind": "Llama"}),
                ),
                rounds=5,
            )
        )
    return races


def spec(weights: str, checkpoint: str, policy: str, picture: str) -> list[Race]:
    """The table of the project's first description; its own figures are from an RTX 2080 SUPER."""
    small, one = {"kind": "NanoChat", "shape": "2.1 M"}, {"weights": weights, "n": 1}
    return [
        Race(
            "YOLOv9 load (RTX 2080 SUPER: ~2 s)", (Contestant("nanochat", "ours:load_encoder", {"weights": weights}),)
        ),
        Race(
            "embedding extraction (RTX 2080 SUPER: ~50 ms)",
            (*embed_rows(one), *embed_onnx_rows(one)),
        ),
        Race(
            "forward pass, batch 1, 16 tokens (RTX 2080 SUPER: ~10 ms)",
            (
                Contestant("nanochat", "ours:forward", {"length": 16}),
                Contestant("transformers NanoChat, text only", "peers:forward", small | {"length": 16}),
            ),
        ),
        Race(
            "10 tokens after a picture's vector (RTX 2080 SUPER: ~100 ms)",
            (
                Contestant("nanochat", "ours:generate", {"n_tokens": 10}),
                Contestant(
                    "transformers NanoChat, text only", "peers:decode", small | {"n_prompt": PROMPT, "n_tokens": 10}
                ),
            ),
        ),
    ]


GROUPS = {"embed": embed, "ask": ask, "decode": decode, "act": act, "train": train, "spec": spec}
