"""Weights from files and downloads: what is read, what is refused, and that no code from a file is run."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.vision import YOLOv9Plus
from nanochat.vision.weights import Placeholder, WeightsError, read_pt
from nanochat.vision.yolov9_weights import import_ultralytics
from tests.test_yolov9 import NAMES, PICTURES, assert_distinct, detector, save_detector


@pytest.fixture(scope="module")
def yolo():
    return YOLOv9Plus("yolov9t.yaml", image_size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("weights") / "random.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 99}, "expected 1..23"),
        ({"n_layers": "3"}, "n_layers"),
        ({"names": []}, "class names"),
        ({"names": {"1": "a", "2": "b"}}, "class names"),
        ({"names": 7}, "class names"),
        ({"image_size": 65}, "multiple of 32"),
        ({"image_size": None}, "multiple of 32"),
        ({"yaml": []}, "backbone and head"),
        ({"yaml": {"backbone": 3, "head": []}}, "backbone and head"),
        ({"yaml": {"nc": 3, "backbone": [], "head": []}}, "0 rows, expected 1..200"),
        ({"yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}, "n_layers": 1}, "ends in Conv"),
        ({"yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", []]], "head": []}, "n_layers": 1}, "cannot build"),
    ],
)
def test_broken_architectures_are_refused(yolo, change, message):
    with pytest.raises(ValueError, match=message):
        YOLOv9Plus.from_architecture(yolo.architecture | change)
    for part in yolo.architecture.keys() - {"kind"}:  # the first release's checkpoints have no kind
        with pytest.raises(WeightsError, match="expected the keys"):
            YOLOv9Plus.from_architecture({k: v for k, v in yolo.architecture.items() if k != part})


def test_activation_of_one_model_does_not_change_others(tmp_path):
    source = Path(import_ultralytics().__file__).parent / "cfg/models/v9/yolov9t.yaml"
    (tmp_path / "yolov9t-relu.yaml").write_text("activation: torch.nn.ReLU()\n" + source.read_text())
    relu = YOLOv9Plus(tmp_path / "yolov9t-relu.yaml", image_size=64)
    silu = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert isinstance(relu.net.model[0].act, torch.nn.ReLU) and isinstance(silu.net.model[0].act, torch.nn.SiLU)
    again = YOLOv9Plus.from_architecture(relu.architecture)
    assert isinstance(again.net.model[0].act, torch.nn.ReLU)


# would create the file `payload` if it were run as code
RUN = "open({path!r}, 'w')"


@pytest.mark.parametrize(
    "change",
    [
        lambda run: {"activation": run},
        lambda run: {"activation": f"torch.nn.ReLU() if {run} else 0"},
        lambda run: {"activation": f"torch.nn.LeakyReLU({run})"},
        lambda run: {"activation": ["nn.ReLU()"]},
        lambda run: {"backbone": [[-1, 1, "os.system", ["true"]]]},
        lambda run: {"backbone": [[-1, 1, "Path", ["/tmp"]]]},
        lambda run: {"backbone": [[-1, 1, "torchvision.ops.boxes", []]]},
        lambda run: {"backbone": [[-1, 1, "nn.functional.relu", []]]},
        lambda run: {"backbone": [[-1, 1, "nn.Module.apply", []]]},
        # a layer whose own arguments are a model description: ultralytics would evaluate its activation
        lambda run: {"backbone": [[-1, 1, "DetectionModel", [{"activation": run, "backbone": [], "head": []}]]]},
        lambda run: {"backbone": [[-1, 1, "Conv", [{"activation": run}, 3, 2]]]},
        lambda run: {"backbone": [[-1, 1, "Conv", [[run], 3, 2]]]},
        lambda run: {"backbone": [[-1, 1, "Conv", ["__import__('os')", 3, 2]]]},
        lambda run: {"backbone": [[-1, 1, "Conv", ["locals", 3, 2]]]},
        lambda run: {"backbone": ["Conv"]},
        lambda run: {"head": [[-1, 1, ["Conv"], []]]},
    ],
)
def test_hostile_architectures_are_refused_and_not_run(yolo, tmp_path, change):
    payload = tmp_path / "payload"
    yaml = yolo.yaml | change(RUN.format(path=str(payload)))
    with pytest.raises(WeightsError, match="refused encoder architecture"):
        YOLOv9Plus.from_architecture(yolo.architecture | {"yaml": yaml})
    (tmp_path / "hostile.yaml").write_text(json.dumps(yaml))
    with pytest.raises(WeightsError, match="refused encoder architecture"):
        YOLOv9Plus(tmp_path / "hostile.yaml")
    assert not payload.exists()


class Calls:
    """Its pickle is a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_that_uses_other_globals_is_refused(tmp_path):
    bomb = Calls(open, str(tmp_path / "ran"), "w")
    torch.save({"model": bomb}, tmp_path / "bomb.pt")
    with pytest.raises(WeightsError, match=r"bomb.pt is a pickle that uses (_?io\.open|builtins\.open).*trust_pickle"):
        YOLOv9Plus(tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(WeightsError, match="plain.pt"):
        YOLOv9Plus(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(WeightsError):  # the user trusts it: it is run, and is still not a detector
        YOLOv9Plus(tmp_path / "bomb.pt", trust_pickle=True)
    assert (tmp_path / "ran").exists()


def test_classes_of_the_detector_are_not_called(tmp_path):
    """ultralytics' own constructor evaluates the activation: an allow-list of its classes would run this."""
    tasks = import_ultralytics().nn.tasks
    payload = tmp_path / "payload"
    evil = {"nc": 1, "activation": RUN.format(path=str(payload)), "backbone": [[-1, 1, "Conv", [8]]], "head": []}
    torch.save({"model": Calls(tasks.DetectionModel, evil)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="evil.pt is not an ultralytics detector"):
        YOLOv9Plus(tmp_path / "evil.pt")
    model = detector(NAMES)
    model.yaml["activation"] = evil["activation"]  # a harmless pickle with a hostile description
    torch.save({"model": model}, tmp_path / "evil2.pt")
    with pytest.raises(WeightsError, match="refused encoder architecture"):
        YOLOv9Plus(tmp_path / "evil2.pt")
    assert not payload.exists()


def test_ultralytics_training_checkpoints(tmp_path):
    """They contain the loss, arguments, numpy metrics and paths, too; "ema" is the model to use."""
    import_ultralytics()
    from ultralytics.utils import IterableSimpleNamespace
    from ultralytics.utils.loss import v8DetectionLoss

    torch.manual_seed(2)
    raw, averaged = detector(NAMES), detector(list(NAMES.values()))
    for model in (raw, averaged):
        model.args = IterableSimpleNamespace(box=7.5, cls=0.5, dfl=1.5, save_dir=Path("runs"))
        model.criterion = v8DetectionLoss(model)
    content = {"model": raw, "ema": averaged, "epoch": 3, "best_fitness": np.float64(0.25), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "last.pt")
    loaded = YOLOv9Plus(tmp_path / "last.pt", image_size=64)
    assert loaded.names == NAMES and type(loaded.net.model[0]).__name__ == "Conv"
    assert not any(isinstance(module, Placeholder) for module in loaded.modules())
    state = loaded.net.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in averaged.state_dict().items())
    trusted = YOLOv9Plus(tmp_path / "last.pt", image_size=64, trust_pickle=True)
    features = loaded.extract_features(PICTURES, "p4")
    assert_distinct(features)
    torch.testing.assert_close(trusted.extract_features(PICTURES, "p4"), features)


def test_half_precision_files_become_float32(weights):
    _, names, state = read_pt(weights)
    assert names == NAMES and {t.dtype for t in state.values()} == {torch.float32}
    assert {p.dtype for p in YOLOv9Plus(weights).parameters()} == {torch.float32}


def test_models_that_do_not_fit_are_refused(tmp_path, yolo):
    fused = detector(NAMES).fuse(verbose=False)
    torch.save({"model": fused}, tmp_path / "fused.pt")
    with pytest.raises(WeightsError, match="fused.pt does not fit its own architecture"):
        YOLOv9Plus(tmp_path / "fused.pt")
    segmenter = yolo.yaml | {"head": [*yolo.yaml["head"][:-1], [[15, 18, 21], 1, "Segment", ["nc", 32, 64]]]}
    two_levels = yolo.yaml | {"head": [*yolo.yaml["head"][:-1], [[15, 18], 1, "Detect", ["nc"]]]}
    for name, yaml in [("Segment", segmenter), ("Detect", two_levels)]:
        (tmp_path / "other.yaml").write_text(json.dumps(yaml))
        with pytest.raises(WeightsError, match=f"ends in {name} at strides"):
            YOLOv9Plus(tmp_path / "other.yaml")
    for text in ("just words", "[1, 2]", "a: [unclosed", "", "when: 2024-01-01"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(WeightsError):
            YOLOv9Plus(tmp_path / "bad.yaml")


@pytest.mark.parametrize("content", [b"", b"not a model", None, "truncated"])
def test_files_without_a_detector_are_refused(tmp_path, weights, content):
    path = tmp_path / "weights.pt"
    if content is None:
        torch.save({"model": {"a": torch.zeros(3)}}, path)
    elif content == "truncated":
        path.write_bytes(weights.read_bytes()[:-2000])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt"):
        YOLOv9Plus(path)


def test_missing_weights_list_the_alternatives(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file.*NANOCHAT_YOLO_WEIGHTS.*yaml"):
        YOLOv9Plus(tmp_path / "none.pt")
    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", "yolov9t.yaml")
    assert YOLOv9Plus(image_size=64).channels() == 84
    with pytest.raises(FileNotFoundError, match="no model description"):
        YOLOv9Plus("nothing_like_it.yaml")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NANOCHAT_YOLO_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/nanochat-vision"


def test_official_weights_offline_are_one_quick_error(monkeypatch, empty_cache):
    import socket
    import time

    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s before a retry"))
    with pytest.raises(
        FileNotFoundError,
        match="yolov9t.pt is not on this computer and could not be downloaded.*Use one of these.*yaml",
    ):
        YOLOv9Plus()
    assert tried and not list(Path.cwd().rglob("*.p*t*")) and not empty_cache.exists()


def test_official_weights_are_downloaded_once(monkeypatch, empty_cache, weights, capsys):
    import_ultralytics()
    import ultralytics.utils.downloads

    asked = []

    def fetch(file, **options):
        asked.append(Path(file).name)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(weights.read_bytes())

    monkeypatch.setattr(ultralytics.utils.downloads, "attempt_download_asset", fetch)
    assert YOLOv9Plus(image_size=64).names == NAMES
    assert YOLOv9Plus("yolov9t.pt", image_size=64).names == NAMES
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and notes[0].startswith(
        "note: fetching yolov9t.pt from https://github.com/ultralytics/assets"
    )
    assert str(empty_cache) in notes[0] and "Offline, " in notes[0]
    assert asked == ["yolov9t.pt"] and [p.name for p in empty_cache.iterdir()] == ["yolov9t.pt"]
    with pytest.raises(FileNotFoundError, match="there is no file yolov9x.pt"):
        YOLOv9Plus("yolov9x.pt")


def test_missing_ultralytics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
    with pytest.raises(ImportError, match="pip install ultralytics. Everything else works without it"):
        YOLOv9Plus("yolov9t.yaml")


@pytest.mark.parametrize("library", ["libGL.so.1", "libgthread-2.0.so.0"])
def test_missing_system_libraries_are_named(library, tmp_path):
    """The error of OpenCV on a minimal server."""
    message = f"{library}: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({message!r})")
    code = "from nanochat.vision import YOLOv9Plus; YOLOv9Plus('yolov9t.yaml')"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError") and library in last
    assert "apt-get install libgl1 libglib2.0-0" in last


def test_pillow_is_not_changed():
    """ultralytics replaces Image.open by a function that tries to install a package for every file that is not an image."""
    code = (
        "from PIL import Image; from nanochat.vision.yolov9_weights import import_ultralytics\n"
        "before = Image.open; import_ultralytics(); assert Image.open is before"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_settings_of_the_user_are_kept(monkeypatch):
    kept = {"YOLO_OFFLINE": "no", "YOLO_AUTOINSTALL": "yes", "YOLO_VERBOSE": "loud", "YOLO_CONFIG_DIR": "/somewhere"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    import_ultralytics()
    assert {name: os.environ[name] for name in kept} == kept


def test_import_and_build_touch_neither_home_nor_network_nor_stdout(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network!')\n"
        "socket.socket.connect = refuse\n"
        "import nanochat.cli.main, nanochat.vision, sys\n"
        "assert 'ultralytics' not in sys.modules\n"
        "nanochat.vision.YOLOv9Plus('yolov9t.yaml', image_size=64)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "HOME", "MPLCONFIG"))}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "" and list(tmp_path.rglob("*")) == []


def test_a_process_that_is_killed_leaves_no_folder(tmp_path):
    """ultralytics writes its settings to a folder while it is imported. It is gone when a later SIGKILL comes, and one that an
    earlier kill left is deleted."""
    old, young, foreign = (tmp_path / name for name in ("nanochat-yolo-old", "nanochat-yolo-young", "mine"))
    for folder in (old, young, foreign):
        folder.mkdir()
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    code = (
        "import os, signal; from nanochat.vision import YOLOv9Plus; YOLOv9Plus('yolov9t.yaml', image_size=32)\n"
        "assert 'YOLO_CONFIG_DIR' not in os.environ\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("YOLO_")}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "yolo" in path.name) == ["nanochat-yolo-young"]
    assert foreign.exists()


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_random_weights_are_said(monkeypatch, capsys, by):
    from nanochat.flags import EncoderFlags

    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", "yolov9t.yaml" if by == "environment" else "elsewhere.pt")
    EncoderFlags(weights="yolov9t.yaml" if by == "flag" else None, image_size=64, device="cpu").encoder()
    assert "note: yolov9t.yaml describes a model without weights: they are random" in capsys.readouterr().err
    EncoderFlags(weights="shapes", device="cpu").encoder()
    assert capsys.readouterr().err == ""
