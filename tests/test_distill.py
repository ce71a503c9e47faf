"""Feature distillation: the targets are the teacher's own maps, a view and its target show the same part of the picture, and a
run learns, resumes and leaves an encoder."""

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
from nanochat.training.teacher import Teacher, cells_of, draw_views, pixels_of, principal_components
from nanochat.vision.pixels import to_pixels
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


@pytest.mark.parametrize("windows", [False, True])
def test_a_view_and_its_target_show_the_same_part_of_the_picture(windows):
    side, rng = 4, np.random.default_rng(0)
    teacher = Teacher(ColourTeacher(), 32 * side, torch.float32, torch.device("cpu"))
    teacher.mean, teacher.basis = torch.zeros(3), torch.eye(3)
    square = rng.integers(0, 256, (32 * side, 32 * side, 3), np.uint8)
    picture = to_pixels(square[None], "cpu", torch.float32)[0]
    targets = teacher.look([square], mirrored=True)[0].reshape(2, side, side, 3)
    views = set(draw_views(rng, 200, side, windows))
    for view in views:
        seen = F.avg_pool2d(pixels_of(picture, view), 32)  # (3, H, W), what a perfect student would say
        assert torch.allclose(seen.flatten(1).T, torch.from_numpy(cells_of(targets, view)), atol=1e-6)
    assert len(views) == (2 * 3 * 3 if windows else 2)
    assert {view.side for view in views} == {2 if windows else 4}


def test_targets_are_principal_components_of_the_teachers_own_maps(recipe):
    run = Run(recipe)
    task, encoder = run.task, encoder_of(recipe.teacher)
    pixels = task.pictures.pixels([0, 7])
    with torch.no_grad():
        cells = (
            torch.stack([encoder(pixels), encoder(pixels.flip(-1))], 1).permute(0, 1, 3, 4, 2).flatten(1, 3)
        )  # (2, 8, C)
    expected = (cells - task.teacher.mean) @ task.teacher.basis
    assert torch.allclose(torch.from_numpy(task.targets[[0, 7]]), expected, atol=1e-5)
    with torch.no_grad():
        cells = encoder(task.val_pictures.pixels([1])).permute(0, 2, 3, 1).flatten(1, 2)
    expected = (cells - task.teacher.mean) @ task.teacher.basis
    assert torch.allclose(torch.from_numpy(task.val_targets[[1]]), expected, atol=1e-5)


def test_principal_components_keep_the_most_variance():
    cells = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.1, 0.2, 2]) + 7
    mean, basis = principal_components(cells, 3)
    _, _, expected = np.linalg.svd((cells - cells.mean(0)).numpy(), full_matrices=False)
    assert torch.allclose(mean, cells.mean(0), atol=1e-5)
    assert np.allclose(np.abs(expected[:3] @ basis.numpy()), np.eye(3), atol=1e-4)
    with pytest.raises(UserError, match="at most the 6 channels of the teacher, got 7"):
        principal_components(cells, 7)


def test_the_cache_is_read_instead_of_running_the_teacher(recipe, tmp_path, monkeypatch):
    first = Run(recipe).task
    assert (tmp_path / "teacher").is_dir()
    monkeypatch.setattr(Teacher, "look", lambda *args: pytest.fail("the teacher runs again"))
    second = Run(recipe).task
    assert np.array_equal(first.targets[:], second.targets[:])
    assert np.array_equal(first.val_targets[:], second.val_targets[:])


def test_another_teacher_or_other_components_have_a_cache_of_their_own(recipe, tmp_path):
    Run(recipe)
    Run(replace(recipe, components=4))
    assert len(list((tmp_path / "teacher").iterdir())) == 2


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


def test_windows_first_then_whole_pictures_and_only_the_encoder_moves(recipe):
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
