"""Checkpoints from strangers: refused before they cost memory or time, whatever their files say."""

import copy
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import SHIPPED, CheckpointError, load_checkpoint, load_resume
from nanochat.errors import UserError
from nanochat.meta import on_meta
from nanochat.verify import sha256
from nanochat.vision import YOLOv9Plus

ROOT = Path(__file__).parents[1]


def copied(folder, name="shapes"):
    shutil.copytree(SHIPPED[name], folder, dirs_exist_ok=True)
    return folder


def sign(folder):
    """Make the manifest agree with the files, as a stranger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def with_config(folder, change, name="shapes"):
    config = json.loads((copied(folder, name) / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return sign(folder)


def many_tensors(folder):
    """A million tensors without a single number."""
    text = b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    (copied(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return sign(folder)


def row(config, i):
    return config["encoder"]["yaml"]["backbone"][i]


def set_row(i, new):
    return lambda config: config["encoder"]["yaml"]["backbone"].__setitem__(i, new)


HOSTILE = {
    "layers": lambda c: c["config"].update(n_layer=10**6),
    "all layers that are allowed": lambda c: c["config"].update(n_layer=512),
    "width": lambda c: c["config"].update(n_embd=32768),
    "vocabulary": lambda c: c["config"].update(vocab_size=2**20),
    "context": lambda c: c["config"].update(sequence_len=2**40),
    "a huge number": lambda c: c["config"].update(n_head=10**400),
    "vision tokens": lambda c: c["config"].update(vision_tokens_per_image=10**10),
    "vision width": lambda c: c["config"].update(vision_embedding_dim=60_000),
    "picture": lambda c: (c["config"].update(vision_image_size=32 * 10**6), c["encoder"].update(image_size=32 * 10**6)),
    "a repeated row": lambda c: row(c, 0).__setitem__(1, 10**6),
    "a row repeated inside": lambda c: row(c, 4)[3].__setitem__(3, 10**6),
    "all repeats that are allowed": lambda c: [r.__setitem__(1, 100) for r in c["encoder"]["yaml"]["backbone"]],
    "rows": lambda c: c["encoder"]["yaml"].update(backbone=[row(c, 0)] * 10**5),
    "channels": lambda c: row(c, 0)[3].__setitem__(0, 16_000),
    "kernel": lambda c: row(c, 0)[3].__setitem__(1, 10**5),
    "padding": lambda c: row(c, 0)[3].append(10_000),
    "an enlarged map": set_row(0, [-1, 1, "nn.Upsample", ["None", 10_000, "nearest"]]),
    "a padded map": set_row(0, [-1, 1, "nn.ZeroPad2d", [16_000]]),
    "identities": set_row(0, [-1, 100, "nn.Identity", []]),
    "classes": lambda c: c["encoder"].update(names={str(i): "x" for i in range(10**5)}, n_layers=23),
    "depth": lambda c: c["encoder"]["yaml"].update(depth_multiple=1e9),
    "another depth": lambda c: c["encoder"]["yaml"].update(scales={"n": [1e9, 1.0, 512]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_that_would_cost_too_much_is_refused_at_once(tmp_path, case):
    folder = with_config(tmp_path / "m", HOSTILE[case])
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(folder)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_a_million_empty_tensors_are_refused_by_the_length_of_their_list(tmp_path):
    folder = many_tensors(tmp_path / "m")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="list of tensors has 5[0-9],[0-9]{3},[0-9]{3} bytes"):
        load_checkpoint(folder)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, struct.pack("<Q", 2**60), struct.pack("<Q", 4) + b"[[[[", struct.pack("<Q", 2) + b"[]",
                struct.pack("<Q", 8) + b'{"a":{}}', struct.pack("<Q", 40_000) + b"[" * 40_000]
)  # fmt: skip
def test_a_damaged_list_of_tensors_is_named(tmp_path, content):
    (copied(tmp_path / "m") / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        load_checkpoint(sign(tmp_path / "m"))


@pytest.mark.parametrize("name", ["../../../../../../etc/passwd", "/etc/passwd", "notes.txt", "", "."])
def test_only_known_files_are_looked_at(tmp_path, name):
    manifest = json.loads((copied(tmp_path / "m") / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": ""}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json lists .*expected model.safetensors") as caught:
        load_checkpoint(tmp_path / "m")
    assert "bytes" not in str(caught.value)  # nothing is told about that file


@pytest.mark.parametrize("name", ["config.json", "training.json", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[]", "", "\ud800", '{"a": 1'], ids=range(7)
)
def test_files_that_hold_no_object_are_named(tmp_path, name, text):
    (copied(tmp_path / "m") / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=name) as caught:
        load_checkpoint(sign(tmp_path / "m") if name != "manifest.json" else tmp_path / "m")
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_a_large_json_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.verify.MAX_JSON", 1000)
    with pytest.raises(CheckpointError, match="the limit for a JSON file is 1,000"):
        load_checkpoint(copied(tmp_path / "m"))


def test_an_optimiser_of_a_million_tensors_is_refused(tmp_path):
    shutil.copy(many_tensors(tmp_path / "n") / "model.safetensors", copied(tmp_path / "m") / "resume.safetensors")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    manifest["files"]["resume.safetensors"] = {}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="list of tensors"):
        load_resume(sign(tmp_path / "m"))


def test_a_damaged_optimiser_is_named(tmp_path):
    text = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,99]}}'
    (copied(tmp_path / "m") / "resume.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    manifest["files"]["resume.safetensors"] = {}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="resume.safetensors is damaged"):
        load_resume(sign(tmp_path / "m"))


@pytest.mark.parametrize("name", ["a\nb", "x" * 9999])
def test_odd_names_are_quoted_on_one_line(tmp_path, name):
    text = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (copied(tmp_path / "m") / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    field = with_config(tmp_path / "n", lambda c: c["config"].update({name: 1}))
    for folder in (sign(tmp_path / "m"), field):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_the_budget_counts_only_its_own_block():
    import torch

    with pytest.raises(UserError, match="more than 20,000 modules"), on_meta():
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))
    assert len(torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))) == 20_001
    with on_meta():
        assert torch.zeros(2).is_meta and torch.tensor([1.0, 2.0]).tolist() == [1, 2]
    assert not torch.zeros(2).is_meta


@pytest.mark.parametrize("layer", ["head", "4"])
def test_shapes_without_memory_are_those_of_the_real_encoder(layer):
    encoder = YOLOv9Plus("yolov9t.yaml", image_size=64).truncate(layer)
    shapes = YOLOv9Plus.from_architecture(encoder.architecture, shapes_only=True).state_dict()
    real = YOLOv9Plus.from_architecture(encoder.architecture).state_dict()
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    for found in (shapes, real):
        assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert all(tensor.is_meta or tensor.dim() == 0 for tensor in shapes.values())


# importing ultralytics on the meta device would leave its class attributes there, for every later encoder
def test_the_first_encoder_of_a_process_may_come_from_a_checkpoint():
    code = (
        "from nanochat.checkpoint import load_checkpoint\n"
        "from nanochat.vision import YOLOv9Plus\n"
        "load_checkpoint('shapes')\n"
        "YOLOv9Plus('yolov9t.yaml', image_size=32).to('cpu')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- any JSON in any field

NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([10**6, -(10**6), 2**31, 2**63, 10**400]), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


def places(value, path=()):
    """The paths of all values inside JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return {name: copied(tmp_path_factory.mktemp("stranger") / name, name) for name in SHIPPED}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("model", SHIPPED)
@pytest.mark.parametrize("file", ["config.json", "manifest.json", "training.json", "tokenizer.json"])
def test_any_json_in_any_field_is_read_or_refused(stranger, model, file, data):
    folder, original = stranger[model], json.loads((SHIPPED[model] / file).read_text())
    paths = [path for path in places(original) if len(path) < 6]
    changed = replaced(original, data.draw(st.sampled_from(paths)), data.draw(VALUES))
    (folder / file).write_text(json.dumps(changed))
    try:
        if file != "manifest.json":
            sign(folder)
        start = time.process_time()
        try:
            load_checkpoint(folder)
        except UserError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000
        assert time.process_time() - start < 2
    finally:
        shutil.copytree(SHIPPED[model], folder, dirs_exist_ok=True)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    shutil.copy(SHIPPED["robot"] / "tokenizer.json", copied(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="tokenizer.json has 1160 tokens, the model's vocab_size is 320"):
        load_checkpoint(sign(tmp_path / "m"))
