"""Demonstrations, batches and training of policies, on a toy robot: its action is the direction to a bright square."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.agent import Agent
from nanochat.checkpoint import load_resume
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.gpt import IGNORE_INDEX
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.questions import draw_asked, task_name
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import action_batch, check_wrong_words, question_batch, shift_pictures
from nanochat.training.robots import RobotTask, read_data
from nanochat.training.run import Run
from nanochat.training.task import set_training
from tests.data_files import demonstrations
from tests.test_train import interrupt_at

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
    direction = (np.array([x, y]) + 4) / SIZE * 2 - 1
    columns = {
        "observation.state": rng.uniform(0, 1, (length, 4)).astype(np.float32),
        "action": np.tile([*direction, 0.5, -0.5], (length, 1)).astype(np.float32),
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


def train_robot(recipe):
    return Run(recipe).train()


@pytest.fixture(scope="module")
def built(folder):
    """(data, tokenizer, {action head: model})."""
    task = RobotTask(Robot(data=str(folder), **TINY))
    torch.manual_seed(0)
    models = {}
    for head in ("continuous", "bins"):
        task.recipe = replace(task.recipe, action_head=head)
        models[head], tokenizer = task.new_model()
    return task.data, tokenizer, models


def test_validation_episodes_are_of_every_task_and_not_trained_on(folder):
    data, val = read_data(Robot(data=str(folder), **TINY))
    assert len(data) == 154 * 6 and len(val) == 6 * 6
    assert set(val.by_task) == set(data.by_task) == {"reach", "push"}
    seen = {data.state[frame].tobytes() for frame in range(len(data))}
    assert not seen & {val.state[frame].tobytes() for frame in range(len(val))}


@pytest.mark.parametrize("lengths, share", [([60, 60, 60], 1 / 2), ([60, 60, 20], 1 / 4)])
def test_tasks_are_drawn_as_often_as_their_episodes_are_long_however_many_they_are(lengths, share):
    episodes = [toy_episode(n, length=length) for n, length in zip((0, 2, 1), lengths, strict=True)]
    data = demonstrations(episodes, SIZE, task_name)
    drawn = data.draw(4000, np.random.default_rng(0))
    assert np.mean([data.task(frame) == "push" for frame in drawn]) == pytest.approx(share, abs=0.05)
    assert all(data.end[frame] - frame <= 5 for frame in data.draw(100, np.random.default_rng(0), last=5))


def test_chunks_stop_at_the_episodes_end():
    episodes = [toy_episode(0), toy_episode(1)]
    data = demonstrations(episodes, SIZE)
    chunks, inside = data.chunks([0, 10, 12], 4)
    assert inside.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    assert (chunks[1] == episodes[0].columns["action"][0]).all()  # nothing of the next episode
    assert (chunks[2] == episodes[1].columns["action"][0]).all()


def test_rows_hold_the_instruction_the_state_and_the_actions(built):
    data, tokenizer, models = built
    model = models["continuous"]
    batch = action_batch(data, [0, 5], model, tokenizer, None)
    assert tokenizer.decode(batch.inputs.idx[0].tolist()).startswith(INSTRUCTIONS[data.task(0)][0])
    assert (batch.inputs.idx == model.config.act_token_id).sum(1).tolist() == [1, 1]
    assert batch.inputs.places.sum(1).tolist() == [4, 4]
    np.testing.assert_allclose(model.state_scale.restore(batch.inputs.states.numpy()), data.state[[0, 5]], atol=1e-5)
    assert (batch.targets == IGNORE_INDEX).all()
    np.testing.assert_allclose(model.action_scale.restore(batch.chunks.numpy())[0, 0], data.action[0], atol=1e-5)
    assert batch.inside[1].tolist() == [True, False, False]


def test_bins_behind_the_end_are_not_learnt(built):
    data, tokenizer, models = built
    model = models["bins"]
    batch = action_batch(data, [0, 5], model, tokenizer, None)
    learnt = (batch.targets != IGNORE_INDEX).sum(1)
    assert learnt.tolist() == [3 * 4, 1 * 4]
    bins = batch.targets[0][batch.targets[0] != IGNORE_INDEX].numpy() - model.config.bin_token_id
    np.testing.assert_array_equal(bins.reshape(3, 4), model.action_scale.to_bins(data.action[:3]))


def test_only_answers_are_learnt_of_questions(built):
    data, tokenizer, models = built
    batch = question_batch(data, draw_asked(data, 200, np.random.default_rng(0)), models["continuous"], tokenizer,
                           np.random.default_rng(0))  # fmt: skip
    assert len(batch.frames) > 200 and batch.inputs.places.sum() == 4 * len(batch.frames)  # some compare two frames
    for idx, targets in zip(batch.inputs.idx, batch.targets, strict=True):
        text = tokenizer.decode([t for t in targets.tolist() if t != IGNORE_INDEX])
        assert text and not text.endswith("?")
        asked = tokenizer.decode(idx.tolist()).split(text)[0]
        assert len(asked) > 10  # the question is in the row, but not learnt


def test_every_paraphrase_is_used(built):
    data, tokenizer, models = built
    batch = action_batch(data, [0] * 60, models["continuous"], tokenizer, np.random.default_rng(0))
    texts = {tokenizer.decode(row[: (row == models["continuous"].config.act_token_id).nonzero()[0, 0]].tolist())
             for row in batch.inputs.idx}  # fmt: skip
    assert texts == set(INSTRUCTIONS[data.task(0)])


def test_wrong_words_are_of_another_scene_and_move_nothing(built):
    _, tokenizer, models = built
    names = ("reach", "push", "door-open", "window-close")
    episodes = [replace(toy_episode(n), extra={"name": name}) for n, name in enumerate(names)]
    data = demonstrations(episodes, SIZE, task_name)
    frames = list(range(len(data))) * 8
    batch = action_batch(data, frames, models["continuous"], tokenizer, np.random.default_rng(0), 0.5)
    chunks = models["continuous"].action_scale.restore(batch.chunks.numpy())
    still, told = np.abs(chunks).max((1, 2)) < 1e-6, []
    for frame, row, zero in zip(frames, batch.inputs.idx.tolist(), still, strict=True):
        text = tokenizer.decode(row)
        task = max(names, key=lambda name: max(text.startswith(words) for words in INSTRUCTIONS[name]))
        own = data.task(frame)
        assert (task != own) == zero and {task, own} != {"reach", "push"}  # these share a scene
        told.append(task)
    assert 0.4 < still.mean() < 0.6 and set(told) == set(names)


def test_wrong_words_need_motions_and_other_scenes():
    data = demonstrations([toy_episode(0), toy_episode(1)], SIZE, task_name)
    with pytest.raises(UserError, match="relative actions"):
        check_wrong_words(data, "absolute")
    with pytest.raises(UserError, match="none for 'reach' \\(2 tasks\\)"):
        check_wrong_words(data, "relative")


def test_shifted_pictures_are_moved_and_not_changed():
    images = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    shifted = shift_pictures(images, 2, np.random.default_rng(0))
    assert shifted.shape == images.shape
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for old, new in zip(padded, shifted, strict=True):
        assert sum((old[y : y + 6, x : x + 6] == new).all() for y in range(5) for x in range(5)) == 1
    np.testing.assert_array_equal(shift_pictures(images, 0, np.random.default_rng(0)), images)


@pytest.mark.parametrize("head, worse", [("continuous", 0.15), ("bins", 0.3)])
def test_it_learns_to_use_the_picture(folder, tmp_path, head, worse):
    """Only the picture tells the direction to the square, so the right picture must beat another one and none."""
    out = tmp_path / head
    train_robot(Robot(data=str(folder), out=str(out), action_head=head, steps=260, **TINY))
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "aligned" in line][-1]
    assert last["aligned"] < min(last["shuffled"], last["blind"]) - worse, last
    assert {"aligned_accuracy", "shuffled_accuracy", "blind_accuracy"} <= last.keys()
    agent = Agent.load(str(out))
    episode = toy_episode(101)
    image = np.asarray(Image.open(io.BytesIO(episode.images["observation.images.camera"][0])))
    chunk = agent.act([image], episode.columns["observation.state"][:1], [episode.task])
    assert chunk.shape == (1, 3, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, dtype):
    settings = TINY | {"save_every": 3, "steps": 6, "dtype": dtype, "shift": 2}
    whole = train_robot(Robot(data=str(folder), out=str(tmp_path / "a"), **settings))
    recipe = Robot(data=str(folder), out=str(tmp_path / "b"), **settings)
    run = Run(recipe)
    interrupt_at(run, 3)
    with pytest.raises(
        KeyboardInterrupt, match="stopped at step 4 of 6 and saved; resume with: nanochat train robot --out"
    ):
        run.train()
    again = train_robot(replace(recipe, resume=True))
    one, two = Agent.load(str(whole)).model.state_dict(), Agent.load(str(again)).model.state_dict()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    expected, found = load_resume(whole), load_resume(again)
    assert expected.keys() == found.keys() and "helper.linear.weight" in found
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_short_run_acts_as_saved_as_it_did_in_training(folder, tmp_path):
    """BatchNorm's running averages would still be far off after so few steps."""
    recipe = Robot(**TINY | dict(data=str(folder), out=str(tmp_path / "run"), layer="4", steps=40, blind_share=0.0))
    run = Run(recipe)
    model = Agent.load(str(run.train())).model
    frames = run.task.data.draw(64, np.random.default_rng(1))
    batch = action_batch(run.task.data, frames, model, run.tokenizer, None)
    losses = []
    for training in (False, True):  # the saved statistics, those of the batch
        model.train(training)
        run.task.model = model
        with torch.no_grad():
            losses.append(run.task.action_loss(batch, run.task.see(run.task.data.images(frames))).item())
    assert losses[0] < 1.2 * losses[1], losses


def test_a_robots_run_is_not_resumed_with_other_data(tmp_path):
    def written(name, numbers):
        write_dataset(tmp_path / name, (toy_episode(n, length=3) for n in numbers), 10, "toy", (SIZE, SIZE, 3))
        return str(tmp_path / name)

    numbers = list(range(8))
    recipe = Robot(data=written("first", numbers), out=str(tmp_path / "run"), steps=1, **TINY)
    train_robot(recipe)
    with pytest.raises(UserError, match="18 training frames then, .* now"):
        Run(replace(recipe, data=written("fewer", numbers[:-1]), resume=True))
    with pytest.raises(UserError, match="other .*actions.* in the training data"):
        Run(replace(recipe, data=written("other", [0, 1, 202, *numbers[3:]]), resume=True))
    assert Run(replace(recipe, data=written("moved", numbers), resume=True)).step == 1


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_parameters_have_the_optimiser_that_suits_them(folder, tmp_path, head):
    run = Run(Robot(data=str(folder), out=str(tmp_path / "run"), action_head=head, **TINY))
    names = {id(p): name for name, p in run.model.named_parameters()}
    names |= {id(p): f"auxiliary.{name}" for name, p in run.task.auxiliary.named_parameters()}
    muon, adamw = ([[names[id(p)] for p in g["params"]] for g in o.param_groups] for o in run.optimizers)
    (matrices,), (embeddings, outputs, encoder, auxiliary) = muon, adamw
    block = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices == [
        *(f"transformer.h.0.{name}.weight" for name in block),
        "vision_projector.c_fc.weight", "vision_projector.c_proj.weight", "state_projector.weight",
    ]  # fmt: skip
    assert embeddings == ["transformer.wte.weight"]
    own = ["action_head.weight"] if head == "continuous" else []
    assert outputs == ["lm_head.weight", "vision_projector.position", *own]
    of_encoder = [f"vision_encoder.{name}" for name, _ in run.model.vision_encoder.named_parameters()]
    assert sorted(encoder) == sorted([*of_encoder, "glances.linear.weight", "glances.linear.bias"])
    assert auxiliary == ["auxiliary.linear.weight", "auxiliary.linear.bias"]
    assert adamw and {g["peak_lr"] for g in run.optimizers[1].param_groups[2:]} == {run.recipe.encoder_lr}


def test_the_positions_of_objects_teach_the_encoder(folder, tmp_path):
    """With no gradient from the decoder, the encoder learns from the auxiliary loss alone."""
    gradients = []
    for scene_loss in (1.0, 0.0):
        recipe = Robot(data=str(folder), out=str(tmp_path / "run"), scene_loss=scene_loss, decoder_gradient=0.0, **TINY)
        run = Run(recipe)
        set_training(run.model, run.task.recipe)
        run.task.backward(0)
        gradients.append(
            sum(p.grad.abs().sum().item() for p in run.model.vision_encoder.parameters() if p.grad is not None)
        )
        assert run.model.transformer.wte.weight.grad is not None
    assert gradients[0] > 0 == gradients[1]


def test_shuffled_pictures_are_of_another_episode(folder, tmp_path):
    run = Run(Robot(data=str(folder), out=str(tmp_path / "run"), **TINY))
    frames = [[0, 1, 2], [3, 12]]  # of episodes 0, 0, 0, 0 and 2
    run.model.eval()
    with torch.no_grad():
        vectors = run.task.condition_vectors(frames)
        of_frame = {frame: run.task.see(run.task.val.images([frame]))[0] for frame in (0, 12)}
    assert [part.shape[0] for part in vectors["shuffled"]] == [3, 2]
    torch.testing.assert_close(vectors["shuffled"][0], of_frame[12].expand(3, -1, -1))
    torch.testing.assert_close(vectors["shuffled"][1], torch.stack([of_frame[12], of_frame[0]]))
    assert not torch.cat(vectors["blind"]).any()


def test_starting_from_a_checkpoint_takes_the_scales_of_the_new_data(folder, tmp_path):
    first = train_robot(Robot(data=str(folder), out=str(tmp_path / "a"), steps=2, **TINY))
    other = tmp_path / "other"
    episodes = [toy_episode(n) for n in range(4)]
    for episode in episodes:
        episode.columns["action"] *= 3
    write_dataset(other, episodes, 10, "toy", (SIZE, SIZE, 3))
    second = train_robot(Robot(data=str(other), out=str(tmp_path / "b"), start_from=str(first), steps=2, **TINY))
    tables = [Agent.load(str(run)).model.transformer.wte.weight for run in (first, second)]
    assert (tables[0] - tables[1]).abs().max() < 0.1  # the same weights, and two steps
    third = train_robot(
        Robot(data=str(other), out=str(tmp_path / "c"), start_from=str(first), action_head="bins", steps=1, **TINY)
    )
    assert Agent.load(str(third)).metadata["action_head"] == "bins"  # the same weights, another head
    fourth = train_robot(
        Robot(**TINY | dict(data=str(other), out=str(tmp_path / "d"), start_from=str(first), chunk=7, steps=1))
    )
    saved = json.loads((fourth / "training.json").read_text())["recipe"]
    assert (
        saved["chunk"] == Agent.load(str(fourth)).metadata["chunk"] == 3
    )  # the shape of the checkpoint, also on record
    (run,) = json.loads((third / "training.json").read_text())["earlier"]
    assert (run["step"], run["data"]) == (2, str(folder)) and run["seconds"] > 0
    high = [Agent.load(str(run)).model.config.action_scale["high"] for run in (first, second)]
    assert high[1][2] == pytest.approx(3 * high[0][2])


def test_data_without_a_simulators_state_trains_actions_alone(tmp_path):
    folder = tmp_path / "real"
    write_dataset(folder, (toy_episode(n, scene=False) for n in range(6)), 10, "toy", (SIZE, SIZE, 3))
    out = train_robot(Robot(data=str(folder), out=str(tmp_path / "run"), steps=2, **TINY))
    assert Agent.load(str(out)).metadata["action_dim"] == 4
    learnt = json.loads((out / "training.json").read_text())["learnt"]
    assert learnt == {"questions": False, "captions": False, "actions": True}


def test_cameras_are_chosen_by_name(tmp_path):
    folder, episodes = tmp_path / "two", [toy_episode(n) for n in range(3)]
    cameras = {"observation.images.left": (200, 0, 0), "observation.images.right": (0, 200, 0)}
    for episode in episodes:
        episode.images = {
            name: [encode_png(np.full((SIZE, 2 * SIZE, 3), colour, np.uint8))] * 12 for name, colour in cameras.items()
        }
    write_dataset(folder, episodes, 10, "toy", (SIZE, 2 * SIZE, 3))
    left, right = cameras
    for asked, names in (((), [left, right]), (("right",), [right]), ((right, "left"), [right, left])):
        data, _ = read_data(Robot(data=str(folder), cameras=asked, **TINY))
        assert list(data.cameras) == names
        for number, name in enumerate(names):
            (picture,) = data.images([0], number)
            assert tuple(picture[SIZE // 2, SIZE // 2]) == cameras[name]
        assert picture.shape == (SIZE, SIZE, 3)
        assert tuple(picture[0, 0]) == (114, 114, 114)  # letterboxed
    with pytest.raises(ValueError, match="has no camera front: its cameras are left, right"):
        read_data(Robot(data=str(folder), cameras=("front",), **TINY))


def test_data_without_actions_is_refused(tmp_path):
    episodes = [toy_episode(n, scene=False) for n in range(2)]
    for episode in episodes:
        episode.columns["torque"] = episode.columns.pop("action")
    write_dataset(tmp_path / "mute", episodes, 10, "toy", (SIZE, SIZE, 3))
    with pytest.raises(ValueError, match='column "action" .--action-key .*the data has observation.state, torque'):
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


def test_a_policy_starts_only_from_a_policy(folder, tmp_path):
    with pytest.raises(ValueError, match="is a MultimodalGPT, not a robot policy"):
        Run(Robot(**TINY | dict(data=str(folder), out=str(tmp_path / "run"), start_from="shapes")))


def test_one_validation_episode_has_no_shuffled_score(tmp_path):
    write_dataset(tmp_path / "two", (toy_episode(2 * n) for n in range(2)), 10, "toy", (SIZE, SIZE, 3))
    out = train_robot(Robot(data=str(tmp_path / "two"), out=str(tmp_path / "run"), steps=1, **TINY))
    last = json.loads((out / "training.json").read_text())["history"][-1]
    assert {"aligned", "blind", "aligned_accuracy"} <= last.keys() and "shuffled" not in last
