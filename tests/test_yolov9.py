"""The encoder against ultralytics' own predictor and hand-registered hooks; and what it refuses."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.vision import Detection, YOLOv9Plus
from nanochat.vision.images import letterbox
from nanochat.vision.weights import StandIn, WeightsError, read_pt
from nanochat.vision.yolov9 import import_ultralytics

REAL = Path(__file__).parents[2] / "shared/weights/yolov9t_person_vehicle_animal_relu.pt"
PHOTOS = Path(__file__).parents[2] / "shared/data/flickr8k/images"


NAMES = {0: "cat", 1: "dog", 2: "traffic light"}


PICTURE = Image.effect_mandelbrot((90, 60), (-2, -1.2, 1, 1.2), 60).convert("RGB")


def detector(names):
    """ultralytics' own model with random weights, which sees a picture through all its layers and finds things in it."""
    model = import_ultralytics().nn.tasks.DetectionModel("yolov9t.yaml", nc=len(names), verbose=False)
    model.names = names
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # statistics of the next batch: without them, random layers let nothing through
    squares = [letterbox(PICTURE.resize(size), 320)[0] for size in ((320, 200), (160, 90), (90, 60))]
    model.train()(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255)
    for norm in norms:
        norm.momentum = 0.03
    for head in model.model[-1].cv3:
        torch.nn.init.normal_(head[-1].weight, 0.0, 0.05)
        torch.nn.init.normal_(head[-1].bias, -1.6, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def yolo():
    torch.manual_seed(0)
    return YOLOv9Plus("yolov9t.yaml", image_size=64)


@pytest.fixture(scope="module")
def image():
    return PICTURE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A .pt file of a detector with random weights that is sure of what it sees, so that there are boxes to compare."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save({"model": detector(NAMES).half(), "ema": None, "train_args": {"imgsz": 640}}, path)
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
        with_failure(yolo, 10, lambda: yolo.extract_features(image, "p3+2+head"))
    assert count() == before


def with_failure(yolo, index, call):
    """Runs `call` while one module of the network fails."""

    def fail(module, inputs):
        raise RuntimeError("a module that fails")

    handle = yolo.net.model[index].register_forward_pre_hook(fail)
    try:
        return call()
    finally:
        handle.remove()


def test_modules_behind_the_layer_do_not_run(yolo, image):
    assert with_failure(yolo, 16, lambda: yolo.extract_features(image, "p3")).shape == (1, 64, 8, 8)
    assert with_failure(yolo, 3, lambda: yolo.extract_features(image, 2)).shape[2:] == (16, 16)
    with pytest.raises(RuntimeError, match="fails"):
        with_failure(yolo, 15, lambda: yolo.extract_features(image, "p3"))


def test_threads_do_not_mix_their_pictures(yolo, image):
    """They run through the same modules, and so through each other's hooks."""
    images = [image, image.rotate(90), Image.new("RGB", (64, 64), "green"), Image.new("RGB", (64, 64), "red")]
    expected = [yolo.extract_features(i, "p4") for i in images]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda i: yolo.extract_features(images[i], "p4"), [0, 1, 2, 3] * 6)
        for i, found in enumerate(results):
            torch.testing.assert_close(found, expected[i % 4])


def test_batches_of_arrays_and_tensors(yolo):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    expected = yolo.extract_features(list(arrays))
    assert expected.shape[0] == 3
    torch.testing.assert_close(yolo.extract_features(arrays), expected)
    torch.testing.assert_close(yolo.extract_features(torch.from_numpy(arrays).permute(0, 3, 1, 2)), expected)
    torch.testing.assert_close(yolo.extract_features(arrays[:1]), yolo.extract_features(arrays[0]))


def test_pictures_are_letterboxed_into_the_square(yolo):
    x, (fit,) = yolo.pixels(np.full((30, 60, 3), 255, np.uint8))
    assert x.shape == (1, 3, 64, 64) and x.dtype == torch.float32
    assert (fit.width, fit.height, fit.pad_x, fit.pad_y) == (60, 30, 0, 16)
    assert (x[:, :, 16:48] == 1).all() and torch.allclose(x[:, :, :16], torch.tensor(114 / 255))


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
    rows = zip(theirs.xyxy.tolist(), theirs.conf.tolist(), theirs.cls.int().tolist(), strict=True)
    rows = [(np.array(box), score, class_id) for box, score, class_id in rows]
    for d in ours:  # equal scores may come in any order
        assert any(
            c == d.class_id and abs(score - d.score) < 1e-3 and np.abs(box - d.box).max() < 1 for box, score, c in rows
        ), d


def test_detections_equal_ultralytics_own(weights, image):
    compare_with_ultralytics(weights, image.resize((300, 200)), 320, 0.3)
    compare_with_ultralytics(weights, image, 64, 0.3)
    compare_with_ultralytics(weights, image.resize((32, 64)), 64, 0.25)


def test_detections_of_a_list_are_those_of_its_pictures(weights, image):
    yolo = YOLOv9Plus(weights, image_size=64)
    assert yolo.names == NAMES and yolo.embedding_dim() == 7
    images = [image.resize((300, 200)), image.resize((32, 64)), image]
    batch = yolo.detect(images, conf=0.2)
    for found, alone in zip(batch, [yolo.detect(i, conf=0.2) for i in images], strict=True):
        assert [(d.class_id, d.class_name) for d in found] == [(d.class_id, d.class_name) for d in alone] != []
        np.testing.assert_allclose([d.box for d in found], [d.box for d in alone], atol=0.1)
    assert yolo.detect(image, conf=1.0) == []
    assert len(yolo.detect(image, conf=0.2, iou=0.99)) > len(yolo.detect(image, conf=0.2, iou=0.1))


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


def test_drawing():
    image = Image.new("RGB", (200, 100), "white")
    assert np.array_equal(YOLOv9Plus.draw(image, []), image)
    first = Detection((60.0, 40.0, 180.0, 90.0), 0.9, 0, "cat")
    drawn = YOLOv9Plus.draw(image, [first])
    colour = drawn.getpixel((120, 90))  # the lower edge, far from the label
    assert colour != (255, 255, 255) and drawn.getpixel((60, 70)) == drawn.getpixel((180, 70)) == colour
    assert drawn.getpixel((120, 70)) == (255, 255, 255)  # inside, nothing
    above = np.asarray(drawn)[20:39, 60:100].reshape(-1, 3)
    assert (above == colour).all(1).sum() > 100  # the label stands above the box
    other = YOLOv9Plus.draw(image, [Detection(first.box, 0.9, 1, "dog")])
    assert other.getpixel((120, 90)) != colour
    corner = YOLOv9Plus.draw(image, [Detection((0.0, 0.0, 200.0, 100.0), 0.5, 2, "a very long name of a class" * 3)])
    assert corner.size == image.size
    assert image.getpixel((60, 70)) == (255, 255, 255)  # the given picture is left alone


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
    assert trained.training and all(m.training for m in trained.modules())


def test_training_mode(image):
    torch.manual_seed(0)
    encoder = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert not encoder.training  # to look with, unless told otherwise
    x, _ = encoder.pixels([image, image.rotate(90)])
    encoder.train()
    before = encoder.net.model[0].bn.running_mean.clone()
    for layer in ("p3", "p4", "p5", 3):
        assert encoder(x, layer).dim() == 4
    assert not torch.equal(encoder.net.model[0].bn.running_mean, before)  # end to end from random weights needs this
    with pytest.raises(ValueError, match="evaluation mode only"):
        encoder(x, "head")
    encoder.eval()
    encoder(x, "head").mean().backward()
    assert encoder.net.model[0].conv.weight.grad.abs().sum() > 0
    # frozen BatchNorm stays as it was set, whatever is asked in between
    encoder.train()
    frozen = [m.eval() for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    encoder.embedding_dim("p3"), encoder.detect(image)
    assert not any(m.training for m in frozen) and encoder.net.model[0].conv.training


def test_features_can_train_what_comes_after(yolo, image):
    projector = torch.nn.Linear(84, 3)
    projector(yolo.get_image_embeddings(image)).sum().backward()
    assert projector.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_copies(yolo, image, dtype):
    moved = copy.deepcopy(yolo).to(dtype)
    features = moved.extract_features(image, "p4")
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), yolo.extract_features(image, "p4"), rtol=0.1, atol=0.1)
    assert moved.extract_features(image).dtype == dtype


@pytest.mark.parametrize("cut", [None, "p4", "2"])
def test_architecture_round_trip(yolo, image, cut):
    torch.manual_seed(3)
    original = YOLOv9Plus("yolov9t.yaml", image_size=64)
    expected = original.extract_features(image, layer=cut or "p5")
    if cut:
        original.truncate(cut)
    described = json.loads(json.dumps(original.architecture))
    assert described == original.architecture and "/" not in json.dumps(described)  # no path of this machine
    rebuilt = YOLOv9Plus.from_architecture(described)
    rebuilt.load_state_dict(original.state_dict())
    torch.testing.assert_close(rebuilt.extract_features(image, layer=cut or "p5"), expected)
    assert rebuilt.architecture == described and rebuilt.state_dict().keys() == original.state_dict().keys()
    for name, tensor in rebuilt.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name
    assert rebuilt.embedding_dim(-1 if cut else "p5") == expected.size(1)
    if cut:
        with pytest.raises(ValueError, match="no detection head"):
            rebuilt.detect(image)


def test_architecture_of_weights_from_a_file(weights, image, tmp_path):
    original = YOLOv9Plus(weights, image_size=96)
    rebuilt = YOLOv9Plus.from_architecture(json.loads(json.dumps(original.architecture)))
    rebuilt.load_state_dict(original.state_dict())
    assert rebuilt.names == NAMES and rebuilt.image_size == 96
    assert rebuilt.detect(image, conf=0.2) == original.detect(image, conf=0.2) != []


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
        ({"yaml": {"nc": 3, "backbone": [], "head": []}}, "cannot build"),
        ({"yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}}, "ends in Conv"),
        ({"yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", []]], "head": []}}, "cannot build"),
    ],
)
def test_broken_architectures_are_refused(yolo, change, message):
    with pytest.raises(ValueError, match=message):
        YOLOv9Plus.from_architecture(yolo.architecture | change)
    for part in yolo.architecture:
        with pytest.raises(WeightsError, match="expected the keys"):
            YOLOv9Plus.from_architecture({k: v for k, v in yolo.architecture.items() if k != part})


def test_another_activation_stays_in_its_own_model(tmp_path):
    source = Path(sys.modules["ultralytics"].__file__).parent / "cfg/models/v9/yolov9t.yaml"
    (tmp_path / "yolov9t-relu.yaml").write_text("activation: torch.nn.ReLU()\n" + source.read_text())
    relu = YOLOv9Plus(tmp_path / "yolov9t-relu.yaml", image_size=64)
    silu = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert isinstance(relu.net.model[0].act, torch.nn.ReLU) and isinstance(silu.net.model[0].act, torch.nn.SiLU)
    again = YOLOv9Plus.from_architecture(relu.architecture)
    assert isinstance(again.net.model[0].act, torch.nn.ReLU)


# each would create the file PAYLOAD if it were run
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
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_that_wants_more_than_a_detector_is_refused(tmp_path):
    bomb = Calls(open, str(tmp_path / "ran"), "w")
    torch.save({"model": bomb}, tmp_path / "bomb.pt")
    with pytest.raises(
        WeightsError, match=r"bomb.pt is a pickle that asks for (_?io\.open|builtins\.open).*trust_pickle"
    ):
        YOLOv9Plus(tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(WeightsError, match="plain.pt"):
        YOLOv9Plus(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(WeightsError):  # the user's word: it is run, and still no detector
        YOLOv9Plus(tmp_path / "bomb.pt", trust_pickle=True)
    assert (tmp_path / "ran").exists()


def test_classes_of_the_detector_are_not_called_either(tmp_path):
    """ultralytics' own constructor evaluates the activation: an allow-list of its classes would run this."""
    tasks = import_ultralytics().nn.tasks
    payload = tmp_path / "payload"
    evil = {"nc": 1, "activation": RUN.format(path=str(payload)), "backbone": [[-1, 1, "Conv", [8]]], "head": []}
    torch.save({"model": Calls(tasks.DetectionModel, evil)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="evil.pt is no ultralytics detector"):
        YOLOv9Plus(tmp_path / "evil.pt")
    model = detector(NAMES)
    model.yaml["activation"] = evil["activation"]  # an honest pickle with a hostile description
    torch.save({"model": model}, tmp_path / "evil2.pt")
    with pytest.raises(WeightsError, match="refused encoder architecture"):
        YOLOv9Plus(tmp_path / "evil2.pt")
    assert not payload.exists()


def test_checkpoints_in_the_middle_of_training(tmp_path, image):
    """Theirs hold the loss, arguments, metrics in numpy and paths; "ema" is the model that counts."""
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
    assert not any(isinstance(module, StandIn) for module in loaded.modules())
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], tensor.float()), name
    trusted = YOLOv9Plus(tmp_path / "last.pt", image_size=64, trust_pickle=True)
    torch.testing.assert_close(trusted.extract_features(image), loaded.extract_features(image))


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
def test_files_that_are_no_detector_are_refused(tmp_path, weights, content):
    path = tmp_path / "weights.pt"
    if content is None:
        torch.save({"model": {"a": torch.zeros(3)}}, path)
    elif content == "truncated":
        path.write_bytes(weights.read_bytes()[:-2000])
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
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    with pytest.raises(FileNotFoundError, match="yolov9t.pt is not here and could not be downloaded.*Ways out.*yaml"):
        YOLOv9Plus()
    assert tried and not list(Path.cwd().rglob("*.p*t*")) and not empty_cache.exists()


def test_official_weights_are_downloaded_once(monkeypatch, empty_cache, weights):
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
    assert asked == ["yolov9t.pt"] and [p.name for p in empty_cache.iterdir()] == ["yolov9t.pt"]
    with pytest.raises(FileNotFoundError, match="there is no file yolov9x.pt"):
        YOLOv9Plus("yolov9x.pt")


def test_missing_ultralytics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
    with pytest.raises(ImportError, match="pip install ultralytics. Everything else works without it"):
        YOLOv9Plus("yolov9t.yaml")


@pytest.mark.parametrize("library", ["libGL.so.1", "libgthread-2.0.so.0"])
def test_missing_system_libraries_are_named(library, tmp_path):
    """What OpenCV raises on a bare server."""
    message = f"{library}: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({message!r})")
    code = "from nanochat.vision import YOLOv9Plus; YOLOv9Plus('yolov9t.yaml')"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError") and library in last
    assert "apt-get install libgl1 libglib2.0-0" in last


def test_pillow_stays_as_it_was():
    """ultralytics replaces Image.open by one that wants to install a package for any file that is no picture."""
    code = (
        "from PIL import Image; from nanochat.vision.yolov9 import import_ultralytics\n"
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=100), "multiple of 32"),
        (lambda y, i: y.extract_features(i, layer="p6"), "unknown layer"),
        (lambda y, i: y.extract_features(i, layer=99), "modules 0..22"),
        (lambda y, i: y.extract_features(i, layer=-24), "modules 0..22"),
        (lambda y, i: y.extract_features(i, layer="p3+"), "unknown layer ''"),
        (lambda y, i: y.extract_features(i, layer=None), "unknown layer 'None'"),
        (lambda y, i: y.extract_features(i, layer=-1), "gives no map"),
        (lambda y, i: y.embedding_dim("p7"), "unknown layer"),
        (lambda y, i: y.truncate("p7"), "unknown layer"),
        (lambda y, i: y.encode(i, layers=[]), "nothing to do"),
        (lambda y, i: y(torch.zeros(1, 5, 64, 64), "p3"), r"\(B, 3, H, W\).*got \(1, 5, 64, 64\)"),
        (lambda y, i: y(torch.zeros(1, 3, 64, 50), "p3"), "multiples of 32"),
        (lambda y, i: y(torch.zeros(3, 64, 64), "p3"), r"got \(3, 64, 64\)"),
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=0), "multiple of 32"),
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=-32), "multiple of 32"),
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=64.0), "multiple of 32"),
        (lambda y, i: y.detect(i, iou=-0.1), "iou"),
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
    assert done.stdout == "" and done.stderr == "" and list(tmp_path.rglob("*")) == []
