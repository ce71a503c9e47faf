"""Frames, batches and training of policies, on a toy robot: a bright square in the picture, and the way to it is the action."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.agent import Agent
from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.gpt import IGNORE_INDEX
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.questions import draw_asked, task_name
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import action_batch, question_batch, shift_pictures
from nanochat.training.robots import RobotRun, build_robot, make_tokenizer, read_data, train_robot

SIZE = 32
TINY = dict(
    layer="1", image_size=SIZE, vision_tokens=4, n_layer=1, n_head=2, n_embd=32, vocab_size=600, dtype="float32", chunk=3,
    images_per_step=16, questions_per_step=4, shift=0, eval_every=1000, save_every=1000, warmup_steps=5, device="cpu",
)  # fmt: skip


def toy_episode(number: int, scene: bool = True, length: int = 12) -> Episode:
    rng = np.random.default_rng(number)
    x, y = rng.integers(2, SIZE - 10, 2)
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[y : y + 8, x : x + 8] = 255
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    way = (np.array([x, y]) + 4) / SIZE * 2 - 1
    columns = {
        "observation.state": rng.uniform(0, 1, (length, 4)).astype(np.float32),
        "action": np.tile([*way, 0.5, -0.5], (length, 1)).astype(np.float32),
    }
    if scene:
        environment = np.tile(rng.uniform(0, 0.6, 39), (length, 1)).astype(np.float32)
        columns |= {
            "observation.environment_state": environment,
            "observation.success": np.arange(length) >= length - 3,
            "observation.held": np.zeros(length, bool),
        }
    task = ("reach", "push")[number % 2]
    return Episode(
        INSTRUCTIONS[task][0], columns, {"observation.images.camera": [file.getvalue()] * length}, {"name": task}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "demos"
    write_dataset(path, (toy_episode(n, length=6) for n in range(160)), 10, "toy", (SIZE, SIZE, 3))
    return path


@pytest.fixture(scope="module")
def built(folder):
    data, _ = read_data(Robot(data=str(folder), **TINY))
    recipe = Robot(data=str(folder), **TINY)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(recipe, data)
    return data, tokenizer, {
        head: build_robot(Robot(data=str(folder), action_head=head, **TINY), tokenizer, data)
        for head in ("continuous", "bins")
    }  # fmt: skip


def test_validation_episodes_are_of_every_task_and_not_trained_on(folder):
    data, val = read_data(Robot(data=str(folder), **TINY))
    assert len(data) == 154 * 6 and len(val) == 6 * 6
    assert set(val.by_task) == set(data.by_task) == {"reach", "push"}
    seen = {data.state[frame].tobytes() for frame in range(len(data))}
    assert not seen & {val.state[frame].tobytes() for frame in range(len(val))}


def test_tasks_are_drawn_alike_however_many_frames_they_have():
    data = Demonstrations(
        [toy_episode(0, length=60), toy_episode(2, length=60), toy_episode(1, length=3)], SIZE, task_name
    )
    drawn = data.draw(4000, np.random.default_rng(0))
    share = np.mean([data.task(frame) == "push" for frame in drawn])
    assert 0.45 < share < 0.55
    assert all(data.end[frame] - frame <= 5 for frame in data.draw(100, np.random.default_rng(0), last=5))


def test_chunks_stop_at_the_episodes_end():
    episodes = [toy_episode(0), toy_episode(1)]
    data = Demonstrations(episodes, SIZE)
    chunks, inside = data.chunks([0, 10, 12], 4)
    assert inside.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    assert (chunks[1] == episodes[0].columns["action"][0]).all()  # nothing of the next episode
    assert (chunks[2] == episodes[1].columns["action"][0]).all()


def test_rows_carry_the_words_the_state_and_the_actions(built):
    data, tokenizer, models = built
    model = models["continuous"]
    batch = action_batch(data, [0, 5], model, tokenizer, None)
    assert tokenizer.decode(batch.idx[0].tolist()).startswith(INSTRUCTIONS[data.task(0)][0])
    assert (batch.idx == model.config.act_token_id).sum(1).tolist() == [1, 1]
    assert (batch.targets == IGNORE_INDEX).all()
    np.testing.assert_allclose(model.action_scale.restore(batch.chunks.numpy())[0, 0], data.action[0], atol=1e-5)
    assert batch.inside[1].tolist() == [True, False, False]


def test_bins_behind_the_end_are_not_learnt(built):
    data, tokenizer, models = built
    model = models["bins"]
    batch = action_batch(data, [0, 5], model, tokenizer, None)
    learnt = (batch.targets != IGNORE_INDEX).sum(1)
    assert learnt.tolist() == [3 * 4, 1 * 4]
    spoken = batch.targets[0][batch.targets[0] != IGNORE_INDEX].numpy() - model.config.bin_token_id
    np.testing.assert_array_equal(spoken.reshape(3, 4), model.action_scale.to_bins(data.action[:3]))


def test_only_answers_are_learnt_of_questions(built):
    data, tokenizer, models = built
    batch = question_batch(data, draw_asked(data, 16, np.random.default_rng(0)), models["continuous"], tokenizer,
                           np.random.default_rng(0))  # fmt: skip
    assert sum(batch.counts) == len(batch.frames)
    for idx, targets in zip(batch.idx, batch.targets, strict=True):
        text = tokenizer.decode([t for t in targets.tolist() if t != IGNORE_INDEX])
        assert text and not text.endswith("?")
        asked = tokenizer.decode(idx.tolist()).split(text)[0]
        assert len(asked) > 10  # the question stands in the row, and is not learnt


def test_every_paraphrase_is_used(built):
    data, tokenizer, models = built
    batch = action_batch(data, [0] * 60, models["continuous"], tokenizer, np.random.default_rng(0))
    texts = {tokenizer.decode(row[: (row == models["continuous"].config.act_token_id).nonzero()[0, 0]].tolist())
             for row in batch.idx}  # fmt: skip
    assert texts == set(INSTRUCTIONS[data.task(0)])


def test_shifted_pictures_are_moved_and_not_changed():
    images = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    shifted = shift_pictures(images, 2, np.random.default_rng(0))
    assert shifted.shape == images.shape
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for old, new in zip(padded, shifted, strict=True):
        assert sum((old[y : y + 6, x : x + 6] == new).all() for y in range(5) for x in range(5)) == 1
    np.testing.assert_array_equal(shift_pictures(images, 0, np.random.default_rng(0)), images)


@pytest.mark.parametrize("head, worse", [("continuous", 0.15), ("bins", 0.3)])
def test_it_learns_to_look(folder, tmp_path, head, worse):
    """The way to the square can be read off the picture alone, so the right picture must beat another one and none."""
    out = tmp_path / head
    train_robot(Robot(data=str(folder), out=str(out), action_head=head, steps=200, **TINY))
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "aligned" in line][-1]
    assert last["aligned"] < min(last["shuffled"], last["blind"]) - worse, last
    assert {"aligned_accuracy", "shuffled_accuracy", "blind_accuracy"} <= last.keys()
    agent = Agent.load(str(out))
    episode = toy_episode(101)
    image = np.asarray(Image.open(io.BytesIO(episode.images["observation.images.camera"][0])))
    chunk = agent.act([image], episode.columns["observation.state"][:1], [episode.task])
    assert chunk.shape == (1, 3, 4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder, tmp_path):
    settings = TINY | {"save_every": 3}
    whole = train_robot(Robot(data=str(folder), out=str(tmp_path / "a"), steps=6, **settings))
    real, calls = RobotRun.train_step, []

    def stops(self):
        calls.append(1)
        if len(calls) == 4:
            self.stopping = True
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RobotRun, "train_step", stops)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            train_robot(Robot(data=str(folder), out=str(tmp_path / "b"), steps=6, **settings))
    again = train_robot(Robot(data=str(folder), out=str(tmp_path / "b"), steps=6, resume=True, **settings))
    one, two = Agent.load(str(whole)).model.state_dict(), Agent.load(str(again)).model.state_dict()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


def test_going_on_from_a_checkpoint_takes_the_new_datas_scales(folder, tmp_path):
    first = train_robot(Robot(data=str(folder), out=str(tmp_path / "a"), steps=2, **TINY))
    other = tmp_path / "other"
    episodes = [toy_episode(n) for n in range(4)]
    for episode in episodes:
        episode.columns["action"] *= 3
    write_dataset(other, episodes, 10, "toy", (SIZE, SIZE, 3))
    second = train_robot(Robot(data=str(other), out=str(tmp_path / "b"), start_from=str(first), steps=2, **TINY))
    tables = [Agent.load(str(run)).model.transformer.wte.weight for run in (first, second)]
    assert (tables[0] - tables[1]).abs().max() < 0.1  # the weights were taken over, two steps ago
    third = train_robot(
        Robot(data=str(other), out=str(tmp_path / "c"), start_from=str(first), action_head="bins", steps=1, **TINY)
    )
    assert Agent.load(str(third)).metadata["action_head"] == "bins"  # the same eyes and words, another head
    fourth = train_robot(
        Robot(**TINY | dict(data=str(other), out=str(tmp_path / "d"), start_from=str(first), chunk=7, steps=1))
    )
    said = json.loads((fourth / "training.json").read_text())["recipe"]
    assert (
        said["chunk"] == Agent.load(str(fourth)).metadata["chunk"] == 3
    )  # its shape is the old one's, and so it says
    (run,) = json.loads((third / "training.json").read_text())["earlier"]
    assert (run["step"], run["data"]) == (2, str(folder)) and run["seconds"] > 0
    high = [Agent.load(str(run)).model.config.action_scale["high"] for run in (first, second)]
    assert high[1][2] == pytest.approx(3 * high[0][2])


def test_data_without_a_simulators_state_trains_actions_alone(tmp_path):
    folder = tmp_path / "real"
    write_dataset(folder, (toy_episode(n, scene=False) for n in range(6)), 10, "toy", (SIZE, SIZE, 3))
    out = train_robot(Robot(data=str(folder), out=str(tmp_path / "run"), steps=2, **TINY))
    assert Agent.load(str(out)).metadata["action_dim"] == 4


def test_one_of_several_cameras_is_chosen(tmp_path):
    folder, episodes = tmp_path / "two", [toy_episode(n) for n in range(3)]
    cameras = {"observation.images.left": (200, 0, 0), "observation.images.right": (0, 200, 0)}
    for episode in episodes:
        episode.images = {
            name: [encode_png(np.full((SIZE, 2 * SIZE, 3), colour, np.uint8))] * 12 for name, colour in cameras.items()
        }
    write_dataset(folder, episodes, 10, "toy", (SIZE, 2 * SIZE, 3))
    for asked, name in (("", "observation.images.left"), ("observation.images.right",) * 2):
        data, _ = read_data(Robot(data=str(folder), camera=asked, **TINY))
        (picture,) = data.images([0])
        assert picture.shape == (SIZE, SIZE, 3) and tuple(picture[SIZE // 2, SIZE // 2]) == cameras[name]
        assert tuple(picture[0, 0]) == (114, 114, 114)  # letterboxed
    with pytest.raises(ValueError, match="has no camera front: its cameras are observation.images.left, observation"):
        read_data(Robot(data=str(folder), camera="front", **TINY))


def test_data_that_nobody_can_act_on_is_refused(tmp_path):
    episodes = [toy_episode(n, scene=False) for n in range(2)]
    for episode in episodes:
        episode.columns["torque"] = episode.columns.pop("action")
    write_dataset(tmp_path / "mute", episodes, 10, "toy", (SIZE, SIZE, 3))
    with pytest.raises(ValueError, match='column "action"; the data has observation.state, torque'):
        train_robot(Robot(data=str(tmp_path / "mute"), out=str(tmp_path / "run"), **TINY))


def test_a_robot_with_a_single_joint(tmp_path):
    episodes = [toy_episode(n, scene=False) for n in range(4)]
    for episode in episodes:
        episode.columns["action"] = episode.columns["action"][:, :1]
    write_dataset(tmp_path / "one", episodes, 10, "toy", (SIZE, SIZE, 3))
    out = train_robot(Robot(data=str(tmp_path / "one"), out=str(tmp_path / "run"), steps=1, **TINY))
    assert Agent.load(str(out)).metadata["action_dim"] == 1


def test_a_frozen_encoder_stays_as_it_is(folder, tmp_path):
    first = train_robot(Robot(data=str(folder), out=str(tmp_path / "a"), steps=1, **TINY))
    settings = dict(data=str(folder), start_from=str(first), steps=2, **TINY)
    before = Agent.load(str(first)).model.vision_encoder.state_dict()
    for train_encoder in (False, True):
        out = train_robot(Robot(out=str(tmp_path / str(train_encoder)), train_encoder=train_encoder, **settings))
        after = Agent.load(str(out)).model.vision_encoder.state_dict()
        same = all(torch.equal(value, after[name]) for name, value in before.items())
        assert same is not train_encoder
