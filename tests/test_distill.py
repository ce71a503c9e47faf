"""Feature distillation: the teacher sees what its student sees, views show parts of their pictures, and a run learns, resumes and
leaves an encoder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanochat.agent import Agent
from nanochat.checkpoint import encoder_of, load_checkpoint, load_resume
from nanochat.errors import UserError
from nanochat.training import distill
from nanochat.training.distill import pictures_of_step
from nanochat.training.recipes import Distill, Folder
from nanochat.training.run import Run
from nanochat.training.teacher import Teacher, mixed, principal_components, random_views
from nanochat.vision.timm_encoder import TimmEncoder, described
from tests.test_train import interrupt_at

SIZE, SIDE = 64, 2  # a picture of 2 x 2 cells
SMALL = dict(
    image_size=SIZE, vision_tokens=SIDE**2, layer="4", components=8, images_per_step=8, steps=4, eval_every=4, warmup_steps=2,
    dtype="float32", val_images=4,
)  # fmt: skip


class ColourTeacher(torch.nn.Module):
    """An encoder whose map is the mean colour of each cell."""

    architecture = {"kind": "colours"}
    antialias = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def maps(self, pixels, layers):
        return {layer: F.avg_pool2d(pixels, 32) for layer in layers}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """The name of a small network of timm with random weights."""
    torch.manual_seed(0)
    encoder = TimmEncoder(described("test_byobnet", [0.5] * 3, [0.5] * 3, SIZE))
    file = tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.save(encoder.net.state_dict(), file)
    return f"timm:test_byobnet={file}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 pictures of smooth colours, with a caption each."""
    folder, rng, lines = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["file,caption"]
    for i in range(20):
        small = Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8))
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(f"{i}.png,a picture")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(pictures, teacher_file, tmp_path_factory):
    """The checkpoint folder of a short run."""
    changes = dict(steps=40, eval_every=40, encoder_lr=5e-3, out=str(tmp_path_factory.mktemp("trained") / "run"))
    return Run(Distill(**SMALL | changes, data=str(pictures), teacher=teacher_file)).train()


@pytest.fixture
def recipe(pictures, teacher_file, tmp_path):
    return Distill(**SMALL, data=str(pictures), teacher=teacher_file, out=str(tmp_path / "run"), cache=str(tmp_path))


# ---- views and targets


def coordinates(n):
    """(n, 3, 64, 64): red and green are the column and the row of a pixel, in -1 .. 1; blue is the number of the picture."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    red, green = axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
    return torch.stack([torch.stack([red, green, torch.full((SIZE, SIZE), float(i))]) for i in range(n)])


@pytest.mark.parametrize("size", [32, 64, 96])
def test_views_are_squares_of_their_pictures_and_half_of_them_mirrored(size):
    n = 200
    views = random_views(coordinates(n), np.random.default_rng(0), 0.5, size)
    assert views.shape == (n, 3, size, size)
    columns, rows, number = views.unbind(1)
    assert torch.allclose(number, torch.arange(float(n))[:, None, None].expand_as(number))
    width, height = (columns[:, 0, -1] - columns[:, 0, 0]) / 2, (rows[:, -1, 0] - rows[:, 0, 0]) / 2
    seen = 1 - 1 / size  # from the middle of the first pixel to that of the last one
    assert torch.allclose(width.abs(), height, atol=0.03)
    assert 0.45 * seen < height.min() < 0.55 and 0.95 * seen < height.max() <= 1
    assert 70 < (width < 0).sum() < 130
    assert columns.min() < -0.95 and columns.max() > 0.95 and rows.min() < -0.95 and rows.max() > 0.95


def test_the_smallest_view_of_all_is_the_picture_itself_or_its_mirror_image():
    pixels = torch.rand(20, 3, SIZE, SIZE)
    for view, picture in zip(random_views(pixels, np.random.default_rng(0), 1.0, SIZE), pixels, strict=True):
        assert torch.allclose(view, picture, atol=1e-5) or torch.allclose(view, picture.flip(-1), atol=1e-5)


def test_a_share_of_the_pictures_has_another_one_over_it():
    pixels = torch.eye(100)[:, :, None, None].expand(100, 100, 2, 2)  # picture i is 1 in channel i alone
    own = mixed(pixels, np.random.default_rng(0), 0.4)[range(100), range(100), 0, 0]
    assert 25 < (own < 1).sum() < 55 and own.min() >= 0.5
    assert torch.allclose(mixed(pixels, np.random.default_rng(0), 1.0).sum(1), torch.ones(100, 2, 2))
    assert torch.equal(mixed(pixels, np.random.default_rng(0), 0.0), pixels)


def test_the_loss_compares_the_students_cells_with_the_teachers_of_the_same_pixels(recipe):
    task, encoder = Run(recipe).task, encoder_of(recipe.teacher)
    pixels = task.pictures.pixels([0, 7])
    with torch.no_grad():
        cells = encoder(pixels).permute(0, 2, 3, 1).flatten(1, 2)  # (2, 4, C)
    assert torch.allclose(task.teacher.cells(pixels), cells, atol=1e-4)
    head = task.auxiliary
    wanted = (cells - head.components.mean) @ head.components.basis
    vectors = task.see(pixels)
    expected = 1 - F.cosine_similarity(head.linear(vectors), wanted, dim=-1)
    assert torch.allclose(head.loss(vectors, cells), expected.mean(1).sum(), atol=1e-5)


def test_the_teacher_looks_at_the_very_pixels_of_the_student(recipe):
    task, seen = Run(replace(recipe, mixed=1.0)).task, {}
    see, cells = task.see, task.teacher.cells
    task.see = lambda pixels: see(seen.setdefault("student", pixels))
    task.teacher.cells = lambda pixels: cells(seen.setdefault("teacher", pixels))
    task.model.train()
    task.backward(0)
    assert torch.equal(seen["student"], seen["teacher"])


def test_principal_components_keep_the_most_variance():
    cells = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.1, 0.2, 2]) + 7
    mean, basis, variance = principal_components(cells, 3)
    _, sizes, expected = np.linalg.svd((cells - cells.mean(0)).numpy(), full_matrices=False)
    assert variance.item() == pytest.approx((sizes[:3] ** 2).sum() / 500, rel=1e-4)
    assert torch.allclose(mean, cells.mean(0), atol=1e-5)
    assert np.allclose(np.abs(expected[:3] @ basis.numpy()), np.eye(3), atol=1e-4)
    with pytest.raises(UserError, match="at most the 6 channels of the teacher, got 7"):
        principal_components(cells, 7)


# ---- runs


def test_every_epoch_shows_every_picture_once_whatever_the_step():
    steps = [pictures_of_step(10, step, 4, seed=3) for step in range(5)]
    flat = [number for step in steps for number in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_the_student_learns_to_see_as_its_teacher(trained):
    checks = [line for line in load_checkpoint(trained)[2]["history"] if "aligned" in line]
    assert checks[0]["aligned"] > 0.9  # random weights
    assert checks[-1]["aligned"] < 0.75 * checks[0]["aligned"]
    assert checks[-1]["aligned"] < checks[-1]["shuffled"] - 0.1


def test_small_views_first_then_whole_ones_and_only_the_encoder_moves(recipe):
    run, seen = Run(recipe), []
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    see = run.task.see
    run.task.see = lambda pixels: seen.append(pixels.shape[-1]) or see(pixels)
    for _ in range(4):
        run.take_step()
    assert seen == [32, 32, SIZE, SIZE]
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("vision_encoder.")}


def test_a_resumed_run_equals_an_unbroken_one(recipe, tmp_path):
    whole = Run(replace(recipe, out=str(tmp_path / "whole"))).train()
    run = Run(recipe)
    interrupt_at(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = Run(replace(recipe, resume=True)).train()
    for load in (lambda folder: load_checkpoint(folder)[0].state_dict(), load_resume):
        expected, found = load(whole), load(resumed)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_encoder_is_read_by_other_recipes_and_the_model_says_that_it_learnt_nothing(trained, pictures, tmp_path):
    training = json.loads((trained / "training.json").read_text())
    assert training["learnt"] == {"questions": False, "captions": False, "actions": False}
    with pytest.raises(UserError, match="has learnt nothing yet"):
        Agent.load(str(trained)).check_learnt("what is this?")
    reader = Folder(
        data=str(pictures), encoder=str(trained), layer="4", image_size=SIZE, vision_tokens=4, steps=1, train_encoder=False,
        word_loss=0, vocab_size=300, n_layer=1, n_embd=16, n_head=1, out=str(tmp_path / "reader"),
    )  # fmt: skip
    found = Run(reader).model.vision_encoder.state_dict()
    expected = load_checkpoint(trained)[0].vision_encoder.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_further_data_are_trained_on_and_not_validated_on(recipe, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (SIZE, SIZE), "red").save(other / "red.png")
    Image.new("RGB", (SIZE, SIZE), "blue").save(other / "blue.png")
    (other / "captions.csv").write_text("file,caption\nred.png,red\nblue.png,blue\n")
    alone, both = (
        distill.DistillTask(recipe),
        distill.DistillTask(replace(recipe, also=(str(other),), train_split="all")),
    )
    assert len(both.images) == 22 and both.val_images == alone.val_images


# ---- what cannot be trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "no_such_encoder"}, "no_such_encoder"),
        ({"teacher": "timm:no_such_network"}, "timm has no network 'no_such_network'"),
        ({"vision_tokens": 9}, "has 2 x 2 cells at 64 pixels, but the student gives 9 vectors: use --vision-tokens 4"),
        ({"components": 10000}, "components must be at most the 256 channels of the teacher, got 10000"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"start_from": "shapes"}, "use --encoder shapes to begin with the encoder in it"),
        ({"train_split": "nothing"}, "there is no split 'nothing'"),
    ],
)
def test_settings_that_cannot_be_used_are_explained(recipe, changes, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        Run(replace(recipe, **changes))


def test_a_missing_wheel_names_the_command_that_installs_it(recipe, monkeypatch):
    monkeypatch.setattr("nanochat.vision.timm_encoder.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        Run(replace(recipe, teacher="efficientnet_lite0"))


def test_a_teacher_of_another_stride_is_refused():
    class Coarse(ColourTeacher):
        def maps(self, pixels, layers):
            return {layer: F.avg_pool2d(pixels, 64) for layer in layers}

    with pytest.raises(UserError, match="has 2 x 2 cells at 128 pixels, expected one in 32 pixels"):
        Teacher(Coarse(), 128, torch.float32, torch.device("cpu"))


def test_a_share_that_is_none_is_refused(recipe):
    with pytest.raises(UserError, match="--mixed is a share and must lie in 0..1, got 1.5"):
        Run(replace(recipe, mixed=1.5))
