"""Checkpoints: what is saved comes back, and nothing in between is ever seen."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint
from nanochat.checkpoint import CheckpointError, encoder_of, load_checkpoint, load_resume, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.packing import push_checkpoint
from nanochat.vision import YOLOv9Plus
from tests.conftest import make_model as make_any_model
from tests.test_tokenizer import TOKENIZER

TRAINING = {"recipe_name": "test", "step": 3}


def make_model(**changes):
    return make_any_model(vocab_size=TOKENIZER.vocab_size, **changes)


def saved(folder, seed=0, **options):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.add_(seed)
    save_checkpoint(folder, model, TOKENIZER, TRAINING | {"seed": seed}, **options)
    return model


def seed_of(folder):
    return load_checkpoint(folder)[2]["seed"]


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=0, atol=0)


def test_round_trip(tmp_path):
    model = saved(tmp_path / "m", resume={"0.1.step": torch.tensor(5.0)}, extra={"metrics.jsonl": b"{}\n"})
    loaded, tokenizer, training = load_checkpoint(tmp_path / "m")
    same(model, loaded)
    assert loaded.config == model.config and not loaded.training
    assert tokenizer.to_json() == TOKENIZER.to_json() and training["step"] == 3
    assert load_resume(tmp_path / "m")["0.1.step"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert (tmp_path / "m" / "metrics.jsonl").read_bytes() == b"{}\n"
    idx = torch.randint(0, 90, (1, 8))
    torch.testing.assert_close(loaded(idx), model(idx))


def test_the_encoder_travels_with_the_model(tmp_path):
    model = make_model(vision_embedding_dim=32, vision_layer="2", vision_image_size=32)
    model.attach_encoder(YOLOv9Plus("yolov9t.yaml", image_size=32).truncate(2))
    save_checkpoint(tmp_path / "m", model, TOKENIZER, TRAINING)
    loaded, _, _ = load_checkpoint(tmp_path / "m")
    same(model, loaded)
    picture = torch.rand(3, 40, 40)
    torch.testing.assert_close(loaded.look(picture), model.look(picture))
    maps = model.vision_encoder.extract_features(picture, 2)
    torch.testing.assert_close(encoder_of(tmp_path / "m").extract_features(picture, 2), maps)
    saved(tmp_path / "blind")
    with pytest.raises(CheckpointError, match="blind has no encoder"):
        encoder_of(tmp_path / "blind")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_are_as_readable_as_the_umask_has_it(tmp_path, umask):
    before = os.umask(umask)
    try:
        saved(tmp_path / "m", resume={"x": torch.zeros(1)}, extra={"metrics.jsonl": b"{}\n"})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask} and len(modes) == 7


def test_text_models_load_as_plain_gpt(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    save_checkpoint(tmp_path / "m", model, TOKENIZER, TRAINING)
    loaded, _, _ = load_checkpoint(tmp_path / "m")
    assert type(loaded) is GPT
    same(model, loaded)


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model = saved(tmp_path / "full")
    saved(tmp_path / "half", dtype=torch.float16)
    full, half = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("full", "half"))
    assert half < 0.55 * full
    loaded, _, _ = load_checkpoint(tmp_path / "half")
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_values_that_halves_cannot_hold_stay_as_they_are(tmp_path):
    model = saved(tmp_path / "m", seed=1e6, dtype=torch.float16)
    loaded, _, _ = load_checkpoint(tmp_path / "m")
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_users_own_files_stay(tmp_path, monkeypatch, hard_links):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    saved(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "plots").mkdir()
    (tmp_path / "m" / "plots" / "a.txt").write_text("also mine")
    (tmp_path / "m" / "latest").symlink_to("plots")
    if not hard_links:
        monkeypatch.setattr(checkpoint.os, "link", refuse)
    saved(tmp_path / "m", seed=1)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine" and seed_of(tmp_path / "m") == 1
    assert (tmp_path / "m" / "latest").is_symlink() and (tmp_path / "m" / "latest/a.txt").read_text() == "also mine"


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "disk")
    for seed in (1, 2, 3):
        saved(tmp_path / "m", seed=seed)
        assert seed_of(tmp_path / "disk") == seed_of(tmp_path / "m") == seed
    assert (tmp_path / "m").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "m"]


def test_the_current_folder_can_be_a_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    assert seed_of(".") == 0


def test_a_copy_without_resume_is_a_finished_model(tmp_path):
    """Uploads and downloads leave the optimiser out, but not the manifest that lists it."""
    saved(tmp_path / "m", resume={"x": torch.zeros(2)})
    (tmp_path / "m" / "resume.safetensors").unlink()
    assert seed_of(tmp_path / "m") == 0
    with pytest.raises(CheckpointError, match="finished model"):
        load_resume(tmp_path / "m")


def test_a_damaged_optimiser_is_refused(tmp_path):
    saved(tmp_path / "m", resume={"x": torch.zeros(2)})
    path = tmp_path / "m" / "resume.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for load in (load_checkpoint, load_resume):
        with pytest.raises(CheckpointError, match="resume.safetensors was altered"):
            load(tmp_path / "m")


def test_reading_between_the_two_renames_moves_nothing(tmp_path):
    """The writer may be alive and about to rename: a reader that does it first would make the writer fail."""
    saved(tmp_path / "m", seed=1, resume={"x": torch.ones(1)})
    saved(tmp_path / ".m.new", seed=2, resume={"x": torch.zeros(1)})
    os.rename(tmp_path / "m", tmp_path / ".m.old")
    assert seed_of(tmp_path / "m") == 2 and load_resume(tmp_path / "m")["x"] == 0
    (tmp_path / ".m.new" / "config.json").unlink()
    assert seed_of(tmp_path / "m") == 1 and load_resume(tmp_path / "m")["x"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.new", ".m.old"]


@pytest.mark.parametrize("when", ["verify", "build"])
def test_a_checkpoint_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch, when):
    saved(tmp_path / "m", seed=1)
    original, calls = getattr(checkpoint, when), []

    def replaced_once(folder):
        result = original(folder)
        if not calls:
            calls.append(1)
            saved(tmp_path / "m", seed=2)
        return result

    monkeypatch.setattr(checkpoint, when, replaced_once)
    model, _, training = load_checkpoint(tmp_path / "m")
    assert training["seed"] == 2
    torch.testing.assert_close(model.lm_head.weight, make_model().lm_head.weight + 2)


@pytest.mark.parametrize("entry", [3, {}, {"size": 1}])
def test_damaged_manifests_are_named(tmp_path, entry):
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", "manifest.json", lambda c: c["files"].update({"config.json": entry}))
    with pytest.raises(CheckpointError, match="manifest.json is damaged at config.json"):
        load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(model="rwkv"),
        lambda c: c.update(model=["gpt"]),
        lambda c: c.pop("model"),
        lambda c: c.pop("config"),
        lambda c: c["config"].update(n_embd="wide"),
        lambda c: c.update(encoder={"yaml": 3}),
    ],
)
def test_configs_that_describe_no_model_are_refused(tmp_path, change):
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", "config.json", change)
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(tmp_path / "m")


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        saved(tmp_path / "m")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "thesis.tex"]


@pytest.mark.parametrize("step", range(30))
def test_a_crash_at_any_step_leaves_the_old_or_the_new(tmp_path, monkeypatch, step):
    """Die at the n-th file operation, without any clean-up, as a kill does."""

    class Killed(BaseException):
        pass

    folder, calls = tmp_path / "m", iter(range(1000))
    saved(folder, seed=1)

    def dying(function):
        def wrapper(*args, **kwargs):
            if next(calls) == step:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for name in ("rename", "open", "fsync", "link"):
        monkeypatch.setattr(checkpoint.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))
    monkeypatch.setattr(checkpoint.Path, "write_bytes", dying(checkpoint.Path.write_bytes))
    with monkeypatch.context() as during:
        # a killed process cleans nothing up
        during.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
        during.setattr(checkpoint, "recover", lambda folder: None)
        try:
            saved(folder, seed=2)
            died = False
        except Killed:
            died = True
    monkeypatch.undo()
    assert seed_of(folder) in (1, 2)
    assert died or seed_of(folder) == 2
    saved(folder, seed=3)
    assert seed_of(folder) == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    "function", ["save_file", "Path.write_bytes", "Path.write_text", "sync", "keep_foreign_files", "os.rename"]
)
@pytest.mark.parametrize("resume", [None, {"x": torch.zeros(1)}], ids=["", "resume"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, function, resume):
    saved(tmp_path / "m", seed=1)
    files = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def full(*args, **kwargs):
        monkeypatch.undo()  # room again from here on: only the first write fails
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"nanochat.checkpoint.{function}", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "m", seed=2, resume=resume)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == files
    assert seed_of(tmp_path / "m") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_limit_of_the_system_is_one_line_that_names_the_folder(tmp_path):
    """The error of safetensors for a full disk is no OSError. A limit on the size of a file stands in for the full disk."""
    saved(tmp_path / "m", seed=1)
    code = (
        "import resource, sys\n"
        "from tests.test_checkpoint import saved\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "for name in ('m', 'new'):\n"
        "    try: saved(sys.argv[1] + '/' + name, seed=2)\n"
        "    except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    old, new = done.stdout.splitlines()
    assert old.startswith(f"{tmp_path}/m cannot be written, the checkpoint that was there is intact: ")
    assert new.startswith(f"{tmp_path}/new cannot be written, nothing was written: ") and "File too large" in new
    assert seed_of(tmp_path / "m") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_failure_of_the_second_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    saved(tmp_path / "m", seed=1)
    rename, calls = os.rename, []

    def second_fails(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(checkpoint.os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        saved(tmp_path / "m", seed=2)
    assert seed_of(tmp_path / "m") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "bytes,.*expected"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "altered"),
    ],
    ids=["missing", "truncated", "altered"],
)
def test_damage_is_named(tmp_path, name, damage, message):
    saved(tmp_path / "m")
    damage(tmp_path / "m" / name)
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        load_checkpoint(tmp_path / "m")


def rewrite(folder, name, change):
    """Change a JSON file and make the manifest agree."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    if name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"size": path.stat().st_size, "sha256": checkpoint.sha256(path)}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_newer_formats_and_unknown_settings_are_refused(tmp_path):
    saved(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    rewrite(tmp_path / "m", "manifest.json", lambda c: c.update(format_version=99))
    with pytest.raises(CheckpointError, match="format 99.*update the folder"):
        load_checkpoint(tmp_path / "m")
    rewrite(tmp_path / "n", "config.json", lambda c: c["config"].update(smear=True))
    with pytest.raises(CheckpointError, match="does not know: 'smear'.*update the folder"):
        load_checkpoint(tmp_path / "n")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", "config.json", lambda c: c["config"].update(n_layer=3))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_checkpoint(tmp_path / "m")


def test_what_is_no_checkpoint_says_so(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no manifest.json"):
        load_checkpoint(tmp_path / "empty")
    saved(tmp_path / "m")
    with pytest.raises(CheckpointError, match="training cannot go on"):
        load_resume(tmp_path / "m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub"):
        load_checkpoint("nobody/nothing-here")


def test_what_is_pushed_can_be_loaded_by_its_hub_name(tmp_path, monkeypatch):
    """Against a hub that is a folder: huggingface_hub's own filter decides which files travel."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    hub = tmp_path / "hub"

    def copy(source, target, allow_patterns):
        target.mkdir(exist_ok=True)
        for name in filter_repo_objects([p.name for p in source.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(source / name, target / name)
        return target

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert repo_id == "me/model" and private and exist_ok

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            return copy(folder_path, hub, allow_patterns)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: copy(hub, tmp_path / "cache", allow_patterns)
    )
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "m", seed=4, resume={"x": torch.zeros(2)}, extra={"metrics.jsonl": b"{}\n"})
    (tmp_path / "m" / "secret.txt").write_text("stays at home")
    push_checkpoint(tmp_path / "m", "me/model")
    assert sorted(p.name for p in hub.iterdir()) == sorted([*checkpoint.REQUIRED, "manifest.json"])
    assert seed_of("me/model") == 4
    (tmp_path / "m" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="bytes"):
        push_checkpoint(tmp_path / "m", "me/model")


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def create_repo(self, *args, **kwargs):
            raise RuntimeError("no\nnetwork")  # as the HTTP library's errors, no OSError

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    saved(tmp_path / "m")
    with pytest.raises(OSError, match="^me/model could not be uploaded: no network$"):
        push_checkpoint(tmp_path / "m", "me/model")


# ---- names ----


def test_one_resolver_knows_every_kind_of_name(tmp_path):
    save_checkpoint(tmp_path / "m", make_model(), TOKENIZER, {})
    assert checkpoint.locate(tmp_path / "m") == checkpoint.locate(str(tmp_path / "m")) == (tmp_path / "m").resolve()
    for name in ("shapes", "robot"):
        assert (checkpoint.locate(name) / "manifest.json").is_file()
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "not-there")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("shapes", True), ("robot", True), ("owner/name", True), ("yolov9t.pt", False), ("yolov9t.yaml", False),
     ("runs/weights.pt", False), ("./owner/name", False), ("nonsense", False)],
)  # fmt: skip
def test_which_names_mean_a_checkpoint(name, is_one):
    assert checkpoint.is_checkpoint(name) is is_one


def test_an_encoder_flag_takes_a_checkpoint_or_an_encoder(tmp_path):
    from_checkpoint = encoder_of("shapes")
    assert from_checkpoint.image_size == 64 and not from_checkpoint.training
    assert encoder_of("yolov9t.yaml").image_size == 640
    with pytest.raises(FileNotFoundError, match="nonsense"):
        encoder_of("nonsense")


def test_activations_are_bfloat16_only_where_a_gpu_runs_it(monkeypatch):
    from nanochat.gpt import default_compute_dtype

    assert load_checkpoint("shapes")[0].compute_dtype == default_compute_dtype(torch.device("cpu")) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert default_compute_dtype(torch.device("cuda")) == expected
        assert default_compute_dtype(torch.device("cpu")) == torch.float32
