"""The encoder against ultralytics' own predictor and hand-registered hooks."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.vision import YOLOv9Plus
from nanochat.vision.weights import check_architecture

REAL = Path(__file__).parents[2] / "shared/weights/yolov9t_person_vehicle_animal_relu.pt"
PHOTOS = Path(__file__).parents[2] / "shared/data/flickr8k/images"


@pytest.fixture(scope="module")
def yolo():
    torch.manual_seed(0)
    return YOLOv9Plus("yolov9t.yaml", image_size=64)


@pytest.fixture(scope="module")
def image():
    return Image.effect_mandelbrot((90, 60), (-2, -1.2, 1, 1.2), 60).convert("RGB")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A .pt file of a detector with random weights that is sure of what it sees, so that there are boxes to compare."""
    from nanochat.vision.yolov9 import import_ultralytics

    import_ultralytics()
    from ultralytics import YOLO

    torch.manual_seed(1)
    model = YOLO("yolov9t.yaml", verbose=False)
    for head in model.model.model[-1].cv3:
        torch.nn.init.normal_(head[-1].bias, -4.0, 2.5)
        torch.nn.init.normal_(head[-1].weight, 0.0, 0.5)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save({"model": model.model, "train_args": {}}, path)
    return path


def test_shapes_of_the_spec(yolo, image):
    assert yolo.embedding_dim() == 84
    features = yolo.extract_features(image)
    assert features.shape == (1, 84, 2, 2)
    torch.testing.assert_close(yolo.get_image_embeddings(image, pool="avg"), features.mean((2, 3)))
    torch.testing.assert_close(yolo.get_image_embeddings(image, pool="max"), features.amax((2, 3)))
    assert yolo.get_image_embeddings(image, pool="flatten").shape == (1, 84 * 4)
    assert features[:, 4:].min() >= 0 and features[:, 4:].max() <= 1  # class scores


def test_head_map_is_the_coarsest_level_of_the_decoded_predictions(yolo, image):
    x, _ = yolo.pixels(image)
    with torch.no_grad():
        decoded = yolo.net(x)[0]  # (1, 84, 8*8 + 4*4 + 2*2)
    grid = yolo.extract_features(image)
    for cell in range(4):
        column = decoded[0, :, 64 + 16 + cell]
        expected = torch.cat([column[:4] / 64, column[4:]])
        torch.testing.assert_close(grid[0, :, cell // 2, cell % 2], expected)


@pytest.mark.parametrize("layer", ["p3", "p4", "p5", 2, -2, "9"])
def test_features_are_those_of_a_hand_registered_hook(yolo, image, layer):
    index = {"p3": 15, "p4": 18, "p5": 21}.get(layer, int(layer) if str(layer).lstrip("-").isdigit() else None)
    seen = []
    handle = yolo.net.model[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        yolo.net(yolo.pixels(image)[0])
    handle.remove()
    torch.testing.assert_close(yolo.extract_features(image, layer=layer), seen[0])
    assert yolo.embedding_dim(layer) == seen[0].size(1)


def test_joined_layers_lie_on_the_grid_of_the_first(yolo, image):
    p3, p4, p5 = (yolo.extract_features(image, layer) for layer in ("p3", "p4", "p5"))
    joined = yolo.extract_features(image, "p3+p4+p5")
    assert joined.shape == (1, 64 + 96 + 128, 8, 8)
    torch.testing.assert_close(joined[:, :64], p3)
    torch.testing.assert_close(joined[0, 64:160, 5, 2], p4[0, :, 2, 1])
    down = yolo.extract_features(image, "p5+p3")
    torch.testing.assert_close(down[:, 128:], torch.nn.functional.avg_pool2d(p3, 4))
    torch.testing.assert_close(down[:, :128], p5)


def test_a_list_is_one_forward_and_equals_single_pictures(yolo, image):
    images = [image, image.rotate(90), Image.new("RGB", (30, 70), "green")]
    calls = []
    handle = yolo.net.register_forward_hook(lambda *a: calls.append(1))
    batch = yolo.get_image_embeddings(images, layer="p4")
    handle.remove()
    assert len(calls) == 1
    single = torch.cat([yolo.get_image_embeddings(i, layer="p4") for i in images])
    torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-4)


def test_maps_and_detections_come_from_one_forward(yolo, image):
    calls = []
    handle = yolo.net.register_forward_hook(lambda *a: calls.append(1))
    out = yolo.encode([image, image], layers=["p3", "head"], detect=True, conf=0.0)
    handle.remove()
    assert len(calls) == 1 and set(out.maps) == {"p3", "head"}
    assert out.maps["p3"].shape == (2, 64, 8, 8) and len(out.detections) == 2


def test_hooks_are_removed_even_when_the_forward_raises(yolo, image):
    def count():
        return sum(len(m._forward_hooks) for m in yolo.net.modules())

    before = count()
    yolo.extract_features(image, "p3")
    assert count() == before
    with pytest.raises(RuntimeError):
        yolo.run(torch.zeros(1, 5, 64, 64), ["p3"])
    assert count() == before


def test_red_is_red_to_the_network(yolo, weights):
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    seen = []
    handle = yolo.net.model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for source in (red, np.asarray(red), torch.from_numpy(np.asarray(red).copy()).permute(2, 0, 1)):
        yolo.extract_features(source)
    handle.remove()
    for x in seen:
        assert x[0].mean((1, 2)).tolist() == [1.0, 0.0, 0.0]
    # ultralytics' own predictor gives its network the same
    from ultralytics import YOLO

    theirs = YOLO(weights)
    inside = []
    theirs.model.model[0].register_forward_pre_hook(lambda module, inputs: inside.append(inputs[0]))
    theirs.predict(red, imgsz=64, rect=False, verbose=False)
    torch.testing.assert_close(inside[-1].float(), seen[0])


def compare_with_ultralytics(path, image, size, conf):
    from ultralytics import YOLO

    ours = YOLOv9Plus(path, image_size=size).detect(image, conf=conf)
    theirs = YOLO(path).predict(image, imgsz=size, rect=False, conf=conf, iou=0.7, verbose=False)[0].boxes
    assert len(ours) == len(theirs) > 0
    key = [(d.class_id, *np.round(d.box, 0)) for d in ours]
    assert len(set(key)) > 0
    np.testing.assert_allclose([d.score for d in ours], theirs.conf.numpy(), atol=1e-3)
    np.testing.assert_allclose([d.box for d in ours], theirs.xyxy.numpy(), atol=1.0)
    assert [d.class_id for d in ours] == theirs.cls.int().tolist()


def test_detections_equal_ultralytics_own(weights, image):
    compare_with_ultralytics(weights, image.resize((300, 200)), 320, 0.3)


@pytest.mark.skipif(not (REAL.exists() and PHOTOS.exists()), reason="needs the optional real weights and photographs")
def test_detections_of_real_weights_equal_ultralytics_own():
    for name in sorted(os.listdir(PHOTOS))[:400:100]:
        path = PHOTOS / name
        if YOLOv9Plus(REAL, image_size=320).detect(path):
            compare_with_ultralytics(REAL, Image.open(path), 320, 0.25)


def test_detections_are_inside_the_picture_and_drawn(weights, image):
    yolo = YOLOv9Plus(weights, image_size=64)
    found = yolo.detect(image, conf=0.2)
    assert found and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    for d in found:
        x1, y1, x2, y2 = d.box
        assert 0 <= x1 <= x2 <= image.width and 0 <= y1 <= y2 <= image.height and d.class_name == yolo.names[d.class_id]
    drawn = yolo.draw(image, found)
    assert drawn.size == image.size and np.asarray(drawn).tolist() != np.asarray(image).tolist()
    assert isinstance(yolo.detect([image]), list) and isinstance(yolo.detect([image])[0], list)


def test_the_encoder_is_a_module_that_can_be_trained(yolo, image):
    names = set(yolo.state_dict())
    assert any(name.startswith("net.model.0.") for name in names)
    torch.manual_seed(0)
    trained = YOLOv9Plus("yolov9t.yaml", image_size=64).train()
    x, _ = trained.pixels([image, image.rotate(180)])
    trained(x, "p3").square().mean().backward()
    assert trained.net.model[0].conv.weight.grad.abs().sum() > 0
    before = trained.net.model[0].bn.running_mean.clone()
    trained.extract_features(image)  # a look is no training step
    torch.testing.assert_close(trained.net.model[0].bn.running_mean, before)
    assert trained.training


@pytest.mark.parametrize("cut", [None, "p4", "2"])
def test_architecture_round_trip(yolo, image, cut):
    torch.manual_seed(3)
    original = YOLOv9Plus("yolov9t.yaml", image_size=64)
    expected = original.extract_features(image, layer=cut or "p5")
    if cut:
        original.truncate(cut)
    described = json.loads(json.dumps(original.architecture))
    rebuilt = YOLOv9Plus.from_architecture(described)
    rebuilt.load_state_dict(original.state_dict())
    torch.testing.assert_close(rebuilt.extract_features(image, layer=cut or "p5"), expected)
    if cut:
        with pytest.raises(ValueError, match="no detection head"):
            rebuilt.detect(image)


def test_another_activation_stays_in_its_own_model(tmp_path):
    source = Path(sys.modules["ultralytics"].__file__).parent / "cfg/models/v9/yolov9t.yaml"
    (tmp_path / "yolov9t-relu.yaml").write_text("activation: torch.nn.ReLU()\n" + source.read_text())
    relu = YOLOv9Plus(tmp_path / "yolov9t-relu.yaml", image_size=64)
    silu = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert isinstance(relu.net.model[0].act, torch.nn.ReLU) and isinstance(silu.net.model[0].act, torch.nn.SiLU)
    again = YOLOv9Plus.from_architecture(relu.architecture)
    assert isinstance(again.net.model[0].act, torch.nn.ReLU)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "__import__('os').system('true')"},
        {"backbone": [[-1, 1, "os.system", ["true"]]]},
        {"backbone": [[-1, 1, "Conv", ["__import__('os')", 3, 2]]]},
        {"backbone": ["Conv"]},
    ],
)
def test_hostile_architectures_are_refused(yolo, change):
    with pytest.raises(ValueError, match="refused encoder architecture"):
        check_architecture(yolo.yaml | change)
    with pytest.raises(ValueError, match="refused encoder architecture"):
        YOLOv9Plus.from_architecture(yolo.architecture | {"yaml": yolo.yaml | change})


def test_a_pickle_that_wants_more_than_modules_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="trust_pickle"):
        YOLOv9Plus(tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        YOLOv9Plus(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_files_that_are_no_detector_are_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    if content is None:
        torch.save({"model": {"a": torch.zeros(3)}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt"):
        YOLOv9Plus(path)


def test_missing_weights_name_the_ways_out(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file.*NANOCHAT_YOLO_WEIGHTS.*yaml"):
        YOLOv9Plus(tmp_path / "none.pt")
    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", "yolov9t.yaml")
    assert YOLOv9Plus(image_size=64).embedding_dim() == 84
    with pytest.raises(FileNotFoundError, match="no model description"):
        YOLOv9Plus("nothing_like_it.yaml")


def test_official_weights_offline_are_one_quick_error(monkeypatch, tmp_path):
    import socket

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_YOLO_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="yolov9t.pt is not here and could not be downloaded.*Ways out"):
        YOLOv9Plus()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=100), "multiple of 32"),
        (lambda y, i: y.extract_features(i, layer="p6"), "unknown layer"),
        (lambda y, i: y.extract_features(i, layer=99), "modules 0..22"),
        (lambda y, i: y.get_image_embeddings(i, pool="sum"), "pool must be"),
        (lambda y, i: y.extract_features([]), "list is empty"),
        (lambda y, i: y.detect(i, conf=2), "conf"),
    ],
)
def test_wrong_requests_are_refused(yolo, image, call, message):
    with pytest.raises(ValueError, match=message):
        call(yolo, image)


def test_import_and_build_touch_neither_home_nor_network_nor_stdout(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network!')\n"
        "socket.socket.connect = refuse\n"
        "import nanochat.cli, nanochat.vision, sys\n"
        "assert 'ultralytics' not in sys.modules\n"
        "nanochat.vision.YOLOv9Plus('yolov9t.yaml', image_size=64)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "HOME", "MPLCONFIG"))}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.rglob("*")) == []
