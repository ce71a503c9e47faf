"""YOLOv9Plus compared with ultralytics' own predictor and with forward hooks registered by hand."""

import copy
import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.vision import Detection, YOLOv9Plus
from nanochat.vision.detections import draw_detections
from nanochat.vision.letterbox import letterbox
from nanochat.vision.pixels import read_pixels
from nanochat.vision.yolov9_weights import import_ultralytics
from tests.conftest import REAL_DATA, REAL_WEIGHTS, needs_data, needs_weights

NAMES = {0: "cat", 1: "dog", 2: "traffic light"}
PICTURE = Image.effect_mandelbrot((90, 60), (-2, -1.2, 1, 1.2), 60).convert("RGB")
PICTURES = [PICTURE, PICTURE.rotate(90), Image.new("RGB", (30, 70), "green"), Image.new("RGB", (64, 64), "red")]
# Another batch size sums in another order, as do merged convolutions, and rounding errors grow through a random network. PICTURES
# differ by 0.3 and more.
ANOTHER_BATCH = dict(rtol=0.0, atol=0.05)


def calibrate(net, pixels):
    """Set BatchNorm statistics from real images, and class scores away from zero, in a network with random weights.
    Otherwise every map is 0.0 to the seventh digit, and equal to every other within any tolerance."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # statistics of the next batch alone
    net.train()(pixels)
    for norm in norms:
        norm.momentum = 0.03
    for head in net.model[-1].cv3:
        torch.nn.init.normal_(head[-1].weight, 0.0, 0.05)
        torch.nn.init.normal_(head[-1].bias, -1.6, 0.2)
    return net.eval()


def detector(names):
    """ultralytics' own model with random weights that finds objects in PICTURES."""
    model = import_ultralytics().nn.tasks.DetectionModel("yolov9t.yaml", nc=len(names), verbose=False)
    model.names = names
    squares = [letterbox(PICTURE.resize(size), 320)[0] for size in ((320, 200), (160, 90), (90, 60))]
    return calibrate(model, torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255)


def save_detector(path):
    """A .pt file of a detector with random weights and high scores, so that there are boxes to compare."""
    torch.manual_seed(4)
    torch.save({"model": detector(NAMES).half(), "ema": None, "train_args": {"imgsz": 640}}, path)
    return path


def assert_distinct(maps):
    """maps (B, ...) of different images are far from zero, and differ by more than every tolerance in this file."""
    assert maps.abs().mean() > 0.1
    assert all((a - b).abs().max() > 0.3 for a, b in itertools.combinations(maps.float(), 2))


@pytest.fixture(scope="module")
def yolo():
    torch.manual_seed(0)
    encoder = YOLOv9Plus("yolov9t.yaml", image_size=64)
    calibrate(encoder.net, read_pixels(encoder, PICTURES)[0])
    return encoder


@pytest.fixture(scope="module")
def image():
    return PICTURE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("weights") / "random.pt")


def test_shapes_of_the_spec(yolo, image):
    assert yolo.channels() == 84
    features = yolo.extract_features(image)
    assert features.shape == (1, 84, 2, 2)
    torch.testing.assert_close(yolo.get_image_embeddings(image, pool="avg"), features.mean((2, 3)))
    torch.testing.assert_close(yolo.get_image_embeddings(image, pool="max"), features.amax((2, 3)))
    assert yolo.get_image_embeddings(image, pool="flatten").shape == (1, 84 * 4)
    assert features[:, 4:].min() >= 0 and features[:, 4:].max() <= 1  # class scores


@pytest.mark.parametrize("layer", ["head", "p3", "p4", "p5", 2, 9])
def test_different_images_have_different_maps(yolo, layer):
    assert_distinct(yolo.extract_features(PICTURES, layer))


def test_head_map_is_the_coarsest_level_of_the_decoded_predictions(yolo):
    x, _ = read_pixels(yolo, PICTURES)
    with torch.no_grad():
        decoded = yolo.net(x)[0]  # (4, 84, 8*8 + 4*4 + 2*2)
    grid = yolo.extract_features(PICTURES)
    assert_distinct(grid)
    for cell in range(4):
        column = decoded[:, :, 64 + 16 + cell]
        expected = torch.cat([column[:, :4] / 64, column[:, 4:]], 1)
        torch.testing.assert_close(grid[:, :, cell // 2, cell % 2], expected, **ANOTHER_BATCH)


@pytest.mark.parametrize("layer", ["p3", "p4", "p5", 2, -2, "9"])
def test_features_equal_those_of_a_manual_hook(yolo, layer):
    index = {"p3": 15, "p4": 18, "p5": 21}.get(layer, int(layer) if str(layer).lstrip("-").isdigit() else None)
    seen = []
    handle = yolo.net.model[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        yolo.net(read_pixels(yolo, PICTURES)[0])
    handle.remove()
    assert_distinct(seen[0])
    torch.testing.assert_close(yolo.extract_features(PICTURES, layer=layer), seen[0], **ANOTHER_BATCH)
    assert yolo.channels(layer) == seen[0].size(1)


def test_joined_layers_lie_on_the_grid_of_the_first(yolo):
    p3, p4, p5 = (yolo.extract_features(PICTURES, layer) for layer in ("p3", "p4", "p5"))
    assert_distinct(p4.flatten(2).permute(2, 0, 1)[[1, 4, 9]])  # cells differ too
    joined = yolo.extract_features(PICTURES, "p3+p4+p5")
    assert joined.shape == (4, 64 + 96 + 128, 8, 8)
    torch.testing.assert_close(joined[:, :64], p3)
    torch.testing.assert_close(joined[:, 64:160, 5, 2], p4[:, :, 2, 1])
    torch.testing.assert_close(joined[:, 160:, 5, 2], p5[:, :, 1, 0])
    down = yolo.extract_features(PICTURES, "p5+p3")
    torch.testing.assert_close(down[:, 128:], torch.nn.functional.avg_pool2d(p3, 4))
    torch.testing.assert_close(down[:, :128], p5)


def test_a_list_is_one_forward_pass_and_equals_single_images(yolo):
    calls = []
    handle = yolo.net.register_forward_hook(lambda *a: calls.append(1))
    batch = yolo.get_image_embeddings(PICTURES, layer="p4")
    handle.remove()
    assert len(calls) == 1
    single = torch.cat([yolo.get_image_embeddings(i, layer="p4") for i in PICTURES])
    assert_distinct(single)
    torch.testing.assert_close(batch, single, **ANOTHER_BATCH)


def test_maps_and_detections_come_from_one_forward(yolo):
    calls = []
    handle = yolo.net.register_forward_hook(lambda *a: calls.append(1))
    out = yolo.encode(PICTURES, layers=["p3", "head"], detect=True, conf=0.2)
    handle.remove()
    out = yolo.encode(PICTURES, layers=["p3", "head"], detect=True, conf=0.2)  # by the fast copy, which has no hooks
    assert len(calls) == 1 and set(out.maps) == {"p3", "head"}
    for layer, maps in out.maps.items():
        assert_distinct(maps)
        torch.testing.assert_close(maps, yolo.extract_features(PICTURES, layer), **ANOTHER_BATCH)
    assert out.detections[3] == yolo.detect(PICTURES, conf=0.2)[3]  # a square: the others get smaller borders there
    assert all(out.detections) and out.detections[0] != out.detections[1]


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


def test_modules_after_the_layer_do_not_run(yolo, image):
    assert with_failure(yolo, 16, lambda: yolo.extract_features(image, "p3")).shape == (1, 64, 8, 8)
    assert with_failure(yolo, 3, lambda: yolo.extract_features(image, 2)).shape[2:] == (16, 16)
    with pytest.raises(RuntimeError, match="fails"):
        with_failure(yolo, 15, lambda: yolo.extract_features(image, "p3"))


def test_threads_do_not_mix_their_images(yolo):
    """Threads run through the same modules, and so call each other's hooks. Here each thread waits, with its map stored and its
    hooks registered, until all four have finished the pass."""
    expected = [yolo.extract_features(i, "p4") for i in PICTURES]
    assert_distinct(torch.stack(expected))
    together = threading.Barrier(4, timeout=60)

    def wait(*args):
        together.wait()

    handle = yolo.net.register_forward_hook(wait)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: yolo.extract_features(i, "p4"), PICTURES))
    handle.remove()
    for found, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(found, alone, **ANOTHER_BATCH)


def test_batches_of_arrays_and_tensors(yolo):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    expected = yolo.extract_features(list(arrays))
    assert expected.shape[0] == 3
    assert_distinct(expected)
    torch.testing.assert_close(yolo.extract_features(arrays), expected)
    torch.testing.assert_close(yolo.extract_features(torch.from_numpy(arrays).permute(0, 3, 1, 2)), expected)
    torch.testing.assert_close(yolo.extract_features(arrays[:1]), expected[:1], **ANOTHER_BATCH)
    torch.testing.assert_close(yolo.extract_features(arrays[0]), expected[:1], **ANOTHER_BATCH)


def test_images_are_letterboxed(yolo):
    x, (fit,) = read_pixels(yolo, np.full((30, 60, 3), 255, np.uint8))
    assert x.shape == (1, 3, 64, 64) and x.dtype == torch.float32
    assert (fit.width, fit.height, fit.pad_x, fit.pad_y) == (60, 30, 0, 16)
    assert (x[:, :, 16:48] == 1).all() and torch.allclose(x[:, :, :16], torch.tensor(114 / 255))


def test_channel_order_is_rgb(yolo, weights):
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    seen = []
    handle = yolo.net.model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for source in (red, np.asarray(red), torch.from_numpy(np.asarray(red).copy()).permute(2, 0, 1)):
        yolo.extract_features(source)
    handle.remove()
    for x in seen:
        assert x[0].mean((1, 2)).tolist() == [1.0, 0.0, 0.0]
    # the input of the network in ultralytics' own predictor is the same
    from ultralytics import YOLO

    theirs = YOLO(weights)
    inside = []
    theirs.model.model[0].register_forward_pre_hook(lambda module, inputs: inside.append(inputs[0]))
    theirs.predict(red, imgsz=64, rect=False, verbose=False)
    torch.testing.assert_close(inside[-1].float(), seen[0])


def compare_with_ultralytics(path, image, size, conf):
    """`detect` with their predictor as it is, and what one pass over a square finds with the same on squares."""
    from ultralytics import YOLO

    yolo, theirs = YOLOv9Plus(path, image_size=size), YOLO(path)
    squares = yolo.encode([image], [], detect=True, conf=conf).detections[0]
    for rect, ours in ((True, yolo.detect(image, conf=conf)), (False, squares)):
        found = theirs.predict(image, imgsz=size, rect=rect, conf=conf, iou=0.7, verbose=False)[0].boxes
        compare_boxes(ours, found)


def compare_boxes(ours, theirs):
    assert len(ours) == len(theirs) > 0
    rows = zip(theirs.xyxy.tolist(), theirs.conf.tolist(), theirs.cls.int().tolist(), strict=True)
    rows = [(np.array(box), score, class_id) for box, score, class_id in rows]
    for d in ours:  # the order of equal scores is undefined
        assert any(
            c == d.class_id and abs(score - d.score) < 1e-3 and np.abs(box - d.box).max() < 1 for box, score, c in rows
        ), d


def test_detections_equal_ultralytics_own(weights, image):
    compare_with_ultralytics(weights, image.resize((300, 200)), 320, 0.3)
    compare_with_ultralytics(weights, image, 64, 0.3)
    compare_with_ultralytics(weights, image.resize((32, 64)), 64, 0.25)


def test_detections_of_a_list_equal_those_of_single_images(weights, image):
    yolo = YOLOv9Plus(weights, image_size=64)
    assert yolo.names == NAMES and yolo.channels() == 7
    images = [image.resize((300, 200)), image.resize((32, 64)), image]
    batch = yolo.detect(images, conf=0.2)
    for found, alone in zip(batch, [yolo.detect(i, conf=0.2) for i in images], strict=True):
        assert [(d.class_id, d.class_name) for d in found] == [(d.class_id, d.class_name) for d in alone] != []
        np.testing.assert_allclose([d.box for d in found], [d.box for d in alone], atol=0.1)
    assert yolo.detect(image, conf=1.0) == []
    assert len(yolo.detect(image, conf=0.2, iou=0.99)) > len(yolo.detect(image, conf=0.2, iou=0.1))


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (30, 64)])
def test_embeddings_of_rectangles_equal_ultralytics_own(weights, image, size):
    from ultralytics import YOLO

    image = image.resize(size)
    ours = YOLOv9Plus(weights, image_size=64).get_image_embeddings([image], layer="p5", rectangles=True)
    p5 = YOLO(weights).model.model[-1].f[-1]
    theirs = YOLO(weights).embed(image, imgsz=64, embed=[p5], verbose=False)[0]
    assert theirs.abs().mean() > 0.01
    torch.testing.assert_close(ours[0], theirs, rtol=1e-3, atol=1e-3)


def test_rectangles_of_several_shapes_keep_their_order(yolo, image):
    images = [image, image.resize((32, 64)), image.rotate(180), image.resize((64, 32))]
    together = yolo.get_image_embeddings(images, layer="p4", rectangles=True)
    alone = torch.cat([yolo.get_image_embeddings(i, layer="p4", rectangles=True) for i in images])
    torch.testing.assert_close(together, alone, **ANOTHER_BATCH)
    squares = yolo.get_image_embeddings(images, layer="p4")
    assert (together - squares)[1].abs().max() > 0.2  # other borders
    square = image.resize((64, 64))
    torch.testing.assert_close(
        yolo.get_image_embeddings(square, rectangles=True), yolo.get_image_embeddings(square), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match='"avg" or "max"'):
        yolo.get_image_embeddings(images, pool="flatten", rectangles=True)


@needs_weights
@needs_data
def test_detections_of_real_weights_equal_ultralytics_own():
    photos, yolo = REAL_DATA / "flickr8k/images", YOLOv9Plus(REAL_WEIGHTS, image_size=320)
    paths = [photos / name for name in sorted(os.listdir(photos))[:400:100]]
    compared = [path for path in paths if yolo.detect(path)]
    assert compared, "no detections in any photo, so nothing would be compared"
    for path in compared:
        compare_with_ultralytics(REAL_WEIGHTS, Image.open(path), 320, 0.25)


def test_detections_are_inside_the_picture_and_drawn(weights, image):
    yolo = YOLOv9Plus(weights, image_size=64)
    found = yolo.detect(image, conf=0.2)
    assert found and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    for d in found:
        x1, y1, x2, y2 = d.box
        assert 0 <= x1 <= x2 <= image.width and 0 <= y1 <= y2 <= image.height and d.class_name == yolo.names[d.class_id]
    drawn = draw_detections(image, found)
    assert drawn.size == image.size and np.asarray(drawn).tolist() != np.asarray(image).tolist()
    assert isinstance(yolo.detect([image]), list) and isinstance(yolo.detect([image])[0], list)


def test_drawing():
    image = Image.new("RGB", (200, 100), "white")
    assert np.array_equal(draw_detections(image, []), image)
    first = Detection((60.0, 40.0, 180.0, 90.0), 0.9, 0, "cat")
    drawn = draw_detections(image, [first])
    colour = drawn.getpixel((120, 90))  # the lower edge, far from the label
    assert colour != (255, 255, 255) and drawn.getpixel((60, 70)) == drawn.getpixel((180, 70)) == colour
    assert drawn.getpixel((120, 70)) == (255, 255, 255)  # nothing inside the box
    above = np.asarray(drawn)[20:39, 60:100].reshape(-1, 3)
    assert (above == colour).all(1).sum() > 100  # the label stands above the box
    other = draw_detections(image, [Detection(first.box, 0.9, 1, "dog")])
    assert other.getpixel((120, 90)) != colour
    corner = draw_detections(image, [Detection((0.0, 0.0, 200.0, 100.0), 0.5, 2, "a very long name of a class" * 3)])
    assert corner.size == image.size
    assert image.getpixel((60, 70)) == (255, 255, 255)  # the given image is not changed


def test_the_encoder_is_a_module_that_can_be_trained(yolo, image):
    names = set(yolo.state_dict())
    assert any(name.startswith("net.model.0.") for name in names)
    torch.manual_seed(0)
    trained = YOLOv9Plus("yolov9t.yaml", image_size=64).train()
    x, _ = read_pixels(trained, [image, image.rotate(180)])
    trained(x, "p3").square().mean().backward()
    assert trained.net.model[0].conv.weight.grad.abs().sum() > 0
    before = trained.net.model[0].bn.running_mean.clone()
    trained.extract_features(image)  # must not update the statistics
    torch.testing.assert_close(trained.net.model[0].bn.running_mean, before)
    assert trained.training and all(m.training for m in trained.modules())


def test_training_mode(image):
    torch.manual_seed(0)
    encoder = YOLOv9Plus("yolov9t.yaml", image_size=64)
    assert not encoder.training  # evaluation mode by default
    x, _ = read_pixels(encoder, [image, image.rotate(90)])
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
    # frozen BatchNorm stays frozen after channels() and detect()
    encoder.train()
    frozen = [m.eval() for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    encoder.channels("p3"), encoder.detect(image)
    assert not any(m.training for m in frozen) and encoder.net.model[0].conv.training


def test_features_can_train_what_comes_after(yolo, image):
    projector = torch.nn.Linear(84, 3)
    projector(yolo.get_image_embeddings(image)).sum().backward()
    assert projector.weight.grad is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
def test_dtype_and_copies(yolo, dtype, tolerance):
    moved = copy.deepcopy(yolo).to(dtype)
    # an early layer: in a random network rounding errors grow with depth, and bfloat16's exceed the differences in later layers
    features, expected = (encoder.extract_features(PICTURES, 2) for encoder in (moved, yolo))
    assert features.dtype == dtype
    assert_distinct(expected)
    torch.testing.assert_close(features.float(), expected, rtol=0.0, atol=tolerance)
    assert moved.extract_features(PICTURES).dtype == dtype


@pytest.mark.parametrize("cut", [None, "p4", "2"])
def test_architecture_round_trip(yolo, cut):
    original = copy.deepcopy(yolo)
    expected = original.extract_features(PICTURES, layer=cut or "p5")
    assert_distinct(expected)
    if cut:
        original.truncate(cut)
    described = json.loads(json.dumps(original.architecture))
    assert described == original.architecture and "/" not in json.dumps(described)  # no path of this machine
    rebuilt = YOLOv9Plus.from_architecture(described)
    rebuilt.load_state_dict(original.state_dict())
    torch.testing.assert_close(rebuilt.extract_features(PICTURES, layer=cut or "p5"), expected)
    old, new = original.state_dict(), rebuilt.state_dict()
    assert rebuilt.architecture == described and new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert rebuilt.channels(-1 if cut else "p5") == expected.size(1)
    if cut:
        with pytest.raises(ValueError, match="no detection head"):
            rebuilt.detect(PICTURE)


def test_architecture_of_weights_from_a_file(weights, image, tmp_path):
    original = YOLOv9Plus(weights, image_size=96)
    rebuilt = YOLOv9Plus.from_architecture(json.loads(json.dumps(original.architecture)))
    rebuilt.load_state_dict(original.state_dict())
    assert rebuilt.names == NAMES and rebuilt.image_size == 96
    assert rebuilt.detect(image, conf=0.2) == original.detect(image, conf=0.2) != []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, i: YOLOv9Plus("yolov9t.yaml", image_size=100), "multiple of 32"),
        (lambda y, i: y.extract_features(i, layer="p6"), "unknown layer"),
        (lambda y, i: y.extract_features(i, layer=99), "modules 0..22"),
        (lambda y, i: y.extract_features(i, layer=-24), "modules 0..22"),
        (lambda y, i: y.extract_features(i, layer="p3+"), "unknown layer ''"),
        (lambda y, i: y.extract_features(i, layer=None), "unknown layer 'None'"),
        (lambda y, i: y.extract_features(i, layer=-1), "is not a map"),
        (lambda y, i: y.channels("p7"), "unknown layer"),
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
