"""Exported models against the torch models that they were made from, token by token, and what is wrong with a folder."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from nanochat.agent import Agent, Chat
from nanochat.attention import attention_of_words
from nanochat.beams import beam_search_all
from nanochat.checkpoint import save_checkpoint
from nanochat.config import GPTConfig, MultimodalGPTConfig
from nanochat.engine import Engine, Unread
from nanochat.errors import UserError
from nanochat.export import export
from nanochat.export.decoder import export_attention, export_decoder, export_pictures, export_policy, export_states
from nanochat.export.encoder import Eyes, export_encoder
from nanochat.export.graph import BLOCK, Weights, quantized
from nanochat.export.int8_encoder import (
    correct_biases,
    join_silu,
    quantize_encoder,
    readers_of_coarse,
    rounded,
    rounding_shares,
)
from nanochat.gpt import GPT
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.onnx.folder import write_manifest
from nanochat.onnx.model import OnnxGPT, OnnxModel, OnnxPolicy
from nanochat.robot_gpt import RobotGPT
from nanochat.runtime import load
from nanochat.sampling import Sampling
from tests.tiny_policy import make_policy, make_tokenizer, random_model

PLACE, N, D = 49, 4, 12
SHAPE = dict(sequence_len=64, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
SEES = dict(vision_embedding_dim=D, vision_tokens_per_image=N, max_images=3)


def decoders(model, folder, int8=False):
    """The same model on ONNX Runtime, without an encoder."""
    weights, robot = Weights(folder), isinstance(model, RobotGPT)
    export_decoder(model, weights, int8, folder / "decoder.onnx")
    if type(model) is GPT:
        return OnnxGPT(folder, model.config, None)
    export_pictures(model, weights, int8, folder / "pictures.onnx")
    if not robot:
        export_attention(model, weights, int8, folder / "attention.onnx")
        return OnnxModel(folder, model.config, None)
    export_states(model, weights, folder / "states.onnx")
    if model.config.action_head == "continuous":
        export_policy(model, weights, int8, folder / "policy.onnx")
    return OnnxPolicy(folder, model.config, None)


@pytest.fixture(scope="module", params=["prefix", "prefix-grouped", "prefix-narrow", "cross", "cross-narrow"])
def pair(request, tmp_path_factory):
    """narrow: heads of 8 numbers, which ONNX Runtime's attention does not take as they are."""
    fusion, _, kind = request.param.partition("-")
    heads = {"grouped": {"n_kv_head": 1}, "narrow": {"n_head": 4, "n_kv_head": 2}}.get(kind, {})
    config = MultimodalGPTConfig(**SHAPE | heads, **SEES, fusion=fusion)
    model = random_model(MultimodalGPT, config)
    return model, decoders(model, tmp_path_factory.mktemp(request.param))


def questions(model):
    """(prompts, vectors of each): rows of different lengths with none, one and two pictures."""
    shown = [PLACE] * model.config.places_per_image
    prompts = [[1, *shown, 2, 3], [4, 5], [6, *shown, 7, *shown, 8, 9, 10], [1]]
    torch.manual_seed(1)
    return prompts, [torch.randn(1, N, D), None, torch.randn(2, N, D), None]


def arrays(tensors):
    return [None if tensor is None else tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)])
def test_answers_are_the_same_token_by_token(pair, sampling):
    model, runtime = pair
    prompts, vectors = questions(model)
    expected = Engine(model).generate(prompts, 12, images=vectors, sampling=sampling)
    assert Engine(runtime).generate(prompts, 12, images=arrays(vectors), sampling=sampling) == expected


def test_logits_agree_in_a_cache_that_is_continued_and_rewound(pair):
    model, runtime = pair
    prompts, vectors = questions(model)
    caches = model.new_cache(), runtime.new_cache()
    rows = [
        (Unread(prompts[2], vectors[2].flatten(0, 1)), Unread(prompts[2], vectors[2].flatten(0, 1).numpy())),
        (Unread([3, 4, 5]),) * 2,
        (Unread([6]),) * 2,
        None,
        (Unread(prompts[0], vectors[0].flatten(0, 1)), Unread(prompts[0], vectors[0].flatten(0, 1).numpy())),
    ]
    for unread in rows:
        if unread is None:
            for cache in caches:
                cache.rewind([3 if model.config.fusion == "cross" else 9])  # between the two pictures
            continue
        one, other = (m.read([row], cache) for m, row, cache in zip(pair, unread, caches, strict=True))
        np.testing.assert_allclose(other, one, atol=1e-4)
    assert caches[0].lengths == caches[1].lengths and caches[0].n_pictures(0) == caches[1].n_pictures(0)


def test_rows_come_and_go(pair):
    model, runtime = pair
    prompts, vectors = questions(model)

    def said(model, vectors):
        engine, found = Engine(model), []
        first = engine.add(prompts[0], 9, images=vectors[0])
        for step in range(12):
            if step == 2:
                engine.add(prompts[2], 8, images=vectors[2])
                engine.add(prompts[1], 3)
            if step == 5:
                engine.drop(first)
            found.append(engine.step())
        return found

    assert said(runtime, arrays(vectors)) == said(model, vectors)


def test_beams_and_attention(pair):
    model, runtime = pair
    prompts, vectors = questions(model)
    expected = beam_search_all(model, prompts, 8, images=vectors, stop_ids=[3])
    assert beam_search_all(runtime, prompts, 8, images=arrays(vectors), stop_ids=[3]) == expected
    found = runtime.attention(prompts[2], vectors[2].numpy())
    np.testing.assert_allclose(found, model.attention(prompts[2], vectors[2]).numpy(), atol=1e-5)


def test_what_is_wrong_with_vectors_is_said_alike(pair):
    model, runtime = pair
    prompts, vectors = questions(model)
    wrong = [vectors[2], torch.zeros(1, N, D + 1), torch.full((1, N, D), torch.nan)]
    for images in wrong:
        messages = []
        for one, given in ((model, images), (runtime, images.numpy())):
            with pytest.raises(UserError) as error:
                Engine(one).add(prompts[0], 2, images=given)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_text_model(tmp_path):
    model = random_model(GPT, GPTConfig(**SHAPE))
    runtime = decoders(model, tmp_path)
    prompts = [[1, 2, 3], [4]]
    assert Engine(runtime).generate(prompts, 20) == Engine(model).generate(prompts, 20)
    with pytest.raises(UserError, match="text model"):
        Engine(runtime).add([1], 2, images=np.zeros((1, 1, 4), np.float32))


# ---- int8


def test_int8_is_near_and_a_row_does_not_depend_on_its_neighbours(tmp_path):
    model = random_model(MultimodalGPT, MultimodalGPTConfig(**SHAPE, **SEES))
    runtime = decoders(model, tmp_path, int8=True)
    prompts, vectors = questions(model)
    alone, together = [], runtime.read(
        [Unread(p, None if v is None else v.reshape(-1, D)) for p, v in zip(prompts, arrays(vectors), strict=True)],
        runtime.new_cache(4),
    )  # fmt: skip
    for prompt, images in zip(prompts, arrays(vectors), strict=True):
        row = Unread(prompt, None if images is None else images.reshape(-1, D))
        alone.append(runtime.read([row], runtime.new_cache())[0])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    rows = [Unread(p, None if v is None else v.flatten(0, 1)) for p, v in zip(prompts, vectors, strict=True)]
    exact = model.read(rows, model.new_cache(4))
    assert 1e-4 < np.abs(together - exact).max() < 0.1 * np.abs(exact).max()


def test_blocks_of_8_bit_numbers_are_the_weights():
    weight = np.random.default_rng(0).normal(size=(5, 2 * BLOCK + 7)).astype(np.float32)
    numbers, scales = quantized(weight)
    restored = (numbers.reshape(5, -1, BLOCK).astype(np.float32) - 128) * scales[..., None]
    assert np.abs(restored.reshape(5, -1)[:, : weight.shape[1]] - weight).max() <= scales.max() / 2 * 1.001
    assert not quantized(np.zeros((2, BLOCK), np.float32))[1].max() > 1e-30


# ---- policies


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["open the door", "close it"])


@pytest.fixture(scope="module")
def policies(tokenizer, tmp_path_factory):
    """(torch, ONNX) for each head; the continuous one has learnt committed actions."""
    base, found = make_policy(tokenizer), {}
    for head, more in (("continuous", {"committed": 2}), ("bins", {})):
        model = random_model(RobotGPT, replace(base.config, action_head=head, **more))
        found[head] = model, decoders(model, tmp_path_factory.mktemp(head))
    return found


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_actions_are_the_same(policies, tokenizer, head):
    model, runtime = policies[head]
    place = model.config.vision_token_id
    prompts = [[1, *[place] * 4, model.config.state_token_id, 5, 6, 7][: 9 - 2 * short] for short in (0, 1)]
    vectors, states = torch.randn(2, 4, 16), np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.5, 0.0, 1.0]])
    for committed in (None, np.full((2, 1, 4), 0.25), np.full((2, 2, 4), -0.5)):
        expected = model.act(prompts, vectors, states, committed)
        np.testing.assert_allclose(runtime.act(prompts, vectors.numpy(), states, committed), expected, atol=1e-4)
    with pytest.raises(UserError, match="state of 4 numbers, got none"):
        runtime.act(prompts, vectors.numpy(), None)


def test_the_action_head_stays_in_float32(tokenizer, tmp_path):
    """In 8 bits it would round each action of a chunk by itself, so that the arm shakes."""
    decoders(make_policy(tokenizer), tmp_path, int8=True)
    graph = onnx.load(tmp_path / "policy.onnx", load_external_data=False).graph
    readers = {name: node.op_type for node in graph.node for name in node.input}
    assert readers["action_head.T"] == "MatMul" and "MatMulNBits" in readers.values()


def test_rounded_weights_keep_the_means_of_their_channels(tokenizer, monkeypatch):
    """With weights of 3 bits the loss shows."""
    monkeypatch.setattr("nanochat.export.int8_encoder.LEVELS", 3)
    eyes = Eyes(make_policy(tokenizer)).eval()
    squares = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    convolutions = [one for one in eyes.modules() if isinstance(one, torch.nn.Conv2d)]

    def means():
        found = []
        hooks = [c.register_forward_hook(lambda _, __, maps: found.append(maps.mean((0, 2, 3)))) for c in convolutions]
        eyes(squares)
        for hook in hooks:
            hook.remove()
        return found

    with torch.no_grad():
        expected, weights = means(), [one.weight.clone() for one in convolutions]
        biases = [one.bias.clone() for one in convolutions]
        correct_biases(eyes, list(squares.numpy()))
        assert all(torch.equal(one.weight, weight) for one, weight in zip(convolutions, weights, strict=True))
        same = [torch.equal(one.bias, bias) for one, bias in zip(convolutions, biases, strict=True)]
        assert same == [True, *[False] * (len(same) - 2), True]
        for one in convolutions[1:-1]:
            one.weight.copy_(rounded(one.weight))
        found = means()
    for own, wanted in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


def test_ranges_hold_what_any_picture_shows(tokenizer, tmp_path):
    """The mean of their extremes would cut off what one of them alone has."""
    export_encoder(make_policy(tokenizer), tmp_path / "float.onnx")
    rng, scales = np.random.default_rng(0), {}
    dark, bright = (rng.integers(0, most, (64, 64, 3), np.uint8) for most in (30, 256))
    for name, squares in {"dark": [dark], "bright": [bright], "both": [dark, bright]}.items():
        path = shutil.copy(tmp_path / "float.onnx", tmp_path / f"{name}.onnx")
        quantize_encoder(path, squares, 1)
        constants = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
        nodes = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
        scales[name] = np.array([constants[node.input[1]] for node in nodes])
    assert len(scales["both"]) > 5 and (scales["bright"] > 2 * scales["dark"]).any()
    np.testing.assert_allclose(scales["both"], np.maximum(scales["dark"], scales["bright"]), rtol=0.02)


@pytest.mark.parametrize(("largest", "kept"), [(1, []), (1000, ["node_conv2d_1", "node_conv2d_2"])])
def test_readers_of_a_map_with_few_large_channels_stay_in_float32(tmp_path, largest, kept):
    """One of 16 channels is that many times as large as the others: what is left of 256 steps for these?"""
    torch.manual_seed(0)
    first, *others = torch.nn.Conv2d(3, 16, 1, bias=False), torch.nn.Conv2d(16, 4, 1), torch.nn.Conv2d(16, 4, 1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.others, self.last = first, torch.nn.ModuleList(others), torch.nn.Conv2d(16, 4, 1)

        def forward(self, x):
            seen = self.first(x)
            return self.others[0](seen) + self.others[1](seen) + self.last(torch.nn.functional.relu6(seen))

    with torch.no_grad():
        first.weight[3] *= largest
    x, path = torch.randn(1, 3, 8, 8), tmp_path / "graph.onnx"
    torch.onnx.export(Net().eval(), (x,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False)
    inputs = [{"x": np.random.default_rng(n).normal(size=(1, 3, 8, 8)).astype(np.float32)} for n in range(3)]
    assert readers_of_coarse(path, inputs) == kept
    model = onnx.load(path)
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    share = rounding_shares(model, outputs[:1], inputs)[outputs[0]]
    maps = np.stack([first(torch.from_numpy(given["x"])).detach().numpy() for given in inputs])  # (3, 1, 16, 8, 8)
    step, rng = (maps.max() - maps.min()) / 255, np.random.default_rng(0)
    rounding = np.round(maps / step + rng.random()) * step - maps
    lost = rounding.std() ** 2 / np.median(maps.swapaxes(0, 2).reshape(16, -1).var(1))
    assert lost / 2 < share < 2 * lost


class Activations(torch.nn.Module):
    """Of both orders of the factors, and products that are no SiLU."""

    def forward(self, x):  # (B, 4)
        return torch.sigmoid(x) * x + x * torch.sigmoid(x + 1) + (x + 2) * torch.sigmoid(x + 2)


def test_silu_becomes_one_operator_and_stays_the_same(tmp_path):
    x, path = torch.linspace(-20, 20, 64).view(16, 4), tmp_path / "graph.onnx"
    torch.onnx.export(
        Activations().eval(), (x,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False
    )
    join_silu(path)
    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (found["QuickGelu"], found["Sigmoid"]) == (2, 1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], Activations()(x), atol=1e-5)


# ---- folders


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(a checkpoint's folder, that of its export): a policy with an encoder of two layers."""
    folder = tmp_path_factory.mktemp("export")
    save_checkpoint(
        folder / "policy", make_policy(tokenizer), tokenizer, {"learnt": {"actions": True, "questions": True}}
    )
    report = export(str(folder / "policy"), folder / "onnx")
    assert report.logits < 1e-4 and report.agreement == 1 and report.actions < 1e-4
    assert not [path for path in folder.iterdir() if path.name not in ("policy", "onnx")]
    return folder / "policy", folder / "onnx"


def test_an_agent_is_the_same_on_both_runtimes(exported):
    one, other = (Agent.load(str(folder)) for folder in exported)
    assert type(other.model) is OnnxPolicy and other.metadata == one.metadata and other.learnt == one.learnt
    images = [Image.effect_noise((80, 60), 60 + i).convert("RGB") for i in range(5)]
    np.testing.assert_allclose(other.look(images), one.look(images).numpy(), atol=1e-4)
    assert "".join(other.ask("what is it?", other.look(images[0]))) == "".join(
        one.ask("what is it?", one.look(images[0]))
    )
    states, texts = np.full((3, 4), 0.5), ["open the door", "close", "open it now"]
    shown = [images[0], None, images[2]]
    np.testing.assert_allclose(other.act(shown, states, texts), one.act(shown, states, texts), atol=1e-4)
    turns = [
        ["".join(chat.say(q)) for q in ("what?", "and now?")]
        for chat in (Chat(a, a.look(images[0])) for a in (one, other))
    ]
    assert turns[0] == turns[1]
    with pytest.raises(UserError, match="reads the whole picture"):
        attention_of_words(other.model, other.tokenizer, [1], "a", other.look(images[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "decoder.onnx").unlink(), "decoder.onnx is missing"),
        (lambda f: (f / "weights.bin").write_bytes(b"x" * (f / "weights.bin").stat().st_size), "altered"),
        (lambda f: edit(f, format_version=99), "format 99"),
        (lambda f: edit(f, files={}), "does not list config.json"),
        (lambda f: ((f / "policy.onnx").unlink(), write_again(f)), "no policy.onnx"),
        (lambda f: ((f / "encoder.onnx").write_bytes(b"no graph"), write_again(f)), "cannot run .*encoder.onnx"),
    ],
)
def test_a_broken_folder_is_one_error(exported, tmp_path, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load(str(folder)).look(Image.new("RGB", (64, 64)))
    assert "\n" not in str(error.value)


def edit(folder, **fields):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_again(folder):
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_what_cannot_be_exported_is_said_before_anything_is_written(exported, tokenizer, tmp_path):
    checkpoint, folder = map(str, exported)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    text = random_model(GPT, GPTConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size}))
    save_checkpoint(tmp_path / "begun", text, tokenizer, {"step": 3, "steps": 9})
    for arguments, message in [
        ((checkpoint, taken), "is no exported model"),
        ((checkpoint, tmp_path / "x", True), "--calibrate"),
        ((checkpoint, tmp_path / "x", True, tmp_path / "empty"), "no pictures"),
        ((tmp_path / "begun", tmp_path / "x"), "step 3 of 9"),
        ((folder, tmp_path / "x"), "checkpoint"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            export(*arguments)
    assert not (tmp_path / "x").exists() and (taken / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="no exported model"):
        load(checkpoint)
    with pytest.raises(UserError, match="was exported for ONNX Runtime"):
        Agent.load(folder, runtime="torch")


WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "ultralytics", "timm", "safetensors", "onnx", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import numpy as np
from nanochat.runtime import load
agent = load(sys.argv[1])
seen = agent.look(np.zeros((48, 64, 3), np.uint8))
print(repr("".join(agent.ask("what is it?", seen))))
print(agent.act([np.zeros((48, 64, 3), np.uint8)], [[0.5] * 4], ["open"]).shape)
from nanochat.cli.main import main
sys.argv = ["nanochat", "ask", sys.argv[2], "what is it?", "--checkpoint", sys.argv[1]]
main()
sys.argv[-1] = "shapes"
main()
"""


def test_an_exported_model_runs_without_torch(exported, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "p.png")
    words = [sys.executable, "-c", WITHOUT_TORCH, exported[1], tmp_path / "p.png"]
    done = subprocess.run(words, capture_output=True, text=True)
    answer = "".join(
        Agent.load(str(exported[0])).ask("what is it?", Agent.load(str(exported[0])).look(Image.new("RGB", (64, 48))))
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == [repr(answer), "(1, 3, 4)"] and answer.strip() in done.stdout.split("\n", 2)[2], done.stderr
    assert done.returncode == 2 and "this command needs torch" in done.stderr.splitlines()[-1]
