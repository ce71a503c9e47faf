"""Training on several cameras, on the toy robot of test_robot_train with a second camera."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.agent import Agent
from nanochat.cli import main as cli
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.metaworld.questions import positions_from_hand, task_name
from nanochat.training.fingerprint import changes, demonstrations_fingerprint
from nanochat.training.recipes import Robot
from nanochat.training.resuming import out_folder, started_recipe
from nanochat.training.robot_batches import camera_pictures, join_cameras, mask_cameras
from nanochat.training.robot_models import new_cameras, of_cameras
from nanochat.training.robots import RobotTask
from nanochat.training.run import Run
from nanochat.training.task import set_training
from tests.data_files import demonstrations
from tests.test_robot_train import SIZE, TINY, toy_episode

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
FAST = TINY | dict(images_per_step=4, questions_per_step=2, steps=2)


def two_cameras(number: int, **options):
    """A toy episode; the wrist sees the inverted picture."""
    episode = toy_episode(number, **options)
    (pictures,) = episode.images.values()
    image = np.asarray(Image.open(io.BytesIO(pictures[0])))
    return replace(episode, images={FRONT: pictures, WRIST: [encode_png(255 - image)] * len(pictures)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cameras") / "demos"
    write_dataset(path, (two_cameras(n, length=4) for n in range(12)), 10, "toy", (SIZE, SIZE, 3))
    return path


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cameras") / "run"
    return Run(Robot(data=str(folder), out=str(out), units="metres", **FAST)).train()


def test_pictures_come_camera_by_camera():
    data = demonstrations([two_cameras(n, length=3) for n in range(2)], SIZE, task_name)
    images, counts = camera_pictures(data, [0, 4], about=[5])
    assert counts == [3, 2]
    np.testing.assert_array_equal(images[:3], data.images([0, 4, 5]))
    np.testing.assert_array_equal(images[3:], 255 - data.images([0, 4]))
    assert camera_pictures(data, [0, 4], n_cameras=1)[1] == [2]


def test_vectors_of_a_frame_are_joined_in_the_order_of_the_cameras():
    vectors = torch.arange(5.0)[:, None, None].expand(
        5, 3, 2
    )  # 3 pictures of the first camera, 2 of the second; N 3, D 2
    joined = join_cameras(vectors, [3, 2], 2)
    assert joined.shape == (2, 6, 2)
    assert joined[:, :, 0].tolist() == [[0, 0, 0, 3, 3, 3], [1, 1, 1, 4, 4, 4]]


def test_dropout_hides_single_cameras():
    vectors = torch.ones(2000, 6, 2)
    hidden = (mask_cameras(vectors, 2, np.random.default_rng(0), 0.3) == 0).unflatten(1, (2, 3))  # (n, K, N, D)
    whole = hidden.all(-1).all(-1)
    assert (hidden.any(-1).any(-1) == whole).all()  # a picture is hidden completely or not at all
    assert 0.27 < whole.float().mean() < 0.33 and 0.07 < whole.all(1).float().mean() < 0.11  # each by its own chance
    assert mask_cameras(vectors, 2, None, 0.0) is not None


def test_a_step_teaches_every_camera_and_shows_all_in_one_pass(folder, tmp_path):
    recipe = Robot(data=str(folder), out=str(tmp_path / "run"), decoder_gradient=1.0, scene_loss=0.0, **FAST)
    run = Run(recipe)
    set_training(run.model, run.task.recipe)
    passes, maps = [], run.model.vision_encoder.maps
    run.model.vision_encoder.maps = lambda pixels, layers: passes.append(len(pixels)) or maps(pixels, layers)
    torch.nn.init.normal_(run.model.action_head.weight)  # it starts at zero, and lets no gradient pass
    for block in run.model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1)
    result = run.task.backward(0)
    assert len(passes) == 1 and result.images == passes[0] >= 4 + 4 + 2  # two cameras, and pictures of two questions
    front, wrist = run.model.glances.linear.weight.grad.chunk(2)
    assert front.abs().sum() > 0 and wrist.abs().sum() > 0


def test_the_auxiliary_head_has_targets_for_each_camera(folder, tmp_path):
    run = Run(Robot(data=str(folder), out=str(tmp_path / "run"), **FAST))
    head, data = run.task.auxiliary, run.task.data
    assert [own.shape[1] for own in head.targets] == [12, 9]
    vectors = torch.randn(2, 4, 64)
    predicted = vectors.flatten(1) @ head.linear.weight[12:].T + head.linear.bias[12:]
    plain = (predicted - torch.from_numpy(head.targets[1][[0, 5]])).abs().mean(1).sum()
    torch.testing.assert_close(head.loss(vectors, [0, 5], 1), plain)
    state = data.columns["observation.environment_state"][0]
    np.testing.assert_allclose(positions_from_hand(data)[0, :3], state[4:7] - state[:3], rtol=1e-5)


def test_a_policy_knows_its_cameras_names_rate_and_unit(trained):
    agent = Agent.load(str(trained))
    told = {key: agent.metadata[key] for key in ("cameras", "camera_dropout", "fps", "units", "state_names")}
    expected = {"cameras": ["front", "wrist"], "camera_dropout": 0.0, "fps": 10.0, "units": "metres", "state_names": []}
    assert told == expected
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    with pytest.raises(UserError, match="no picture of the camera wrist"):
        agent.act([picture], np.zeros((1, 4)), ["go"])


def test_a_policy_gets_further_cameras(folder, trained, tmp_path):
    one = Run(Robot(data=str(folder), out=str(tmp_path / "one"), cameras=("wrist",), **FAST)).train()
    before = Agent.load(str(one)).model
    task = RobotTask(Robot(data=str(folder), start_from=str(one), **FAST))
    after = task.adopt(before)
    assert before.config.cameras == ["wrist"] and after.config.cameras == ["front", "wrist"]
    for part in after.glances.linear.weight.chunk(2):  # the new camera begins with those of the one that there was
        torch.testing.assert_close(part, before.glances.linear.weight)
    for name, value in before.state_dict().items():
        assert name.startswith("glances.") or torch.equal(value, after.state_dict()[name]), name
    exchanged = RobotTask(Robot(data=str(folder), cameras=("wrist", "front"), **FAST)).adopt(
        Agent.load(str(trained)).model
    )
    ours = Agent.load(str(trained)).model.glances.linear.weight.chunk(2)
    torch.testing.assert_close(exchanged.glances.linear.weight, torch.cat(ours[::-1]))


def test_new_cameras_are_named():
    assert new_cameras(["front"], ["front"]) == new_cameras([], ["front"]) == ""
    assert (
        new_cameras([], ["front", "wrist"])
        == "the model does not know the camera wrist: begins with the weights of the one that there was"
    )
    assert (
        new_cameras(["a", "b"], ["c", "a", "d"])
        == "the model does not know the cameras c, d: begins with the weights of a"
    )


def test_weights_go_to_the_camera_of_their_name():
    rows = torch.arange(6)
    assert of_cameras(rows, ["a", "b", "c"], ["c", "new", "a"]).tolist() == [4, 5, 0, 1, 0, 1]
    assert of_cameras(rows, [], ["a", "b"]).tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert of_cameras(rows, ["a", "b"], ["b"]).tolist() == [3, 4, 5]


def test_a_run_goes_on_with_its_own_cameras(folder, trained, tmp_path):
    recipe = Robot(**FAST | dict(data=str(folder), out=str(trained), units="metres", resume=True))
    assert Run(recipe).step == 2
    other = tmp_path / "other"
    write_dataset(
        other,
        (replace(e, images={FRONT: e.images[FRONT]}) for e in (two_cameras(n, length=4) for n in range(12))),
        10, "toy", (SIZE, SIZE, 3),
    )  # fmt: skip
    with pytest.raises(
        UserError, match="trained with the cameras front, wrist, but the data has the camera front: resume"
    ):
        Run(replace(recipe, data=str(other)))


def test_another_picture_of_the_second_camera_is_other_data():
    episodes = [two_cameras(n, length=3) for n in range(2)]
    one = {"training": demonstrations_fingerprint(demonstrations(episodes, SIZE))}
    episodes[1].images[WRIST][2] = episodes[1].images[FRONT][2]
    other = {"training": demonstrations_fingerprint(demonstrations(episodes, SIZE))}
    assert changes(one, other) == ["other pictures in the training data"]


def test_dropout_needs_several_cameras(folder):
    with pytest.raises(UserError, match="--camera-dropout hides some of several cameras, but one is read"):
        RobotTask(Robot(data=str(folder), cameras=("front",), camera_dropout=0.1, **FAST))


def test_the_old_flag_names_one_camera(capsys, trained):
    words = ["robot", "--camera", "front", "--data=x", "--camera=wrist"]
    assert cli.with_new_flags(words) == ["robot", "--cameras", "front", "--data=x", "--cameras=wrist"]
    assert capsys.readouterr().err.count("`--camera` is deprecated, use `--cameras`") == 2
    path = out_folder(Robot(out=str(trained))) / "training.json"
    saved = path.read_text()
    try:
        path.write_text(saved.replace('"cameras": []', '"camera": "observation.images.front"'))
        assert started_recipe(Robot(out=str(trained))).cameras == ("observation.images.front",)
    finally:
        path.write_text(saved)
