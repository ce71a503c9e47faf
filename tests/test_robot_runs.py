"""What a robot run says about its data, what it refuses, and what its checkpoint knows."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.agent import Agent
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.pictures import encode_png
from nanochat.errors import UserError
from nanochat.evaluation.rollout import acting
from nanochat.files import short_repr
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.serving.policy import SafePolicy
from nanochat.training.recipes import Robot
from nanochat.training.robot_batches import action_batch, action_prompt, question_batch
from nanochat.training.robots import RobotTask
from nanochat.training.run import Run
from tests.test_robot_train import SIZE, TINY, toy_episode, train_robot


def real_episode(number: int, absolute: bool = True, state: str = "observation.state", width: int = 4) -> Episode:
    """Joints that move smoothly to a place near 2; the actions are their next angles, or how far they move."""
    rng, length = np.random.default_rng(number), 30
    path = 2 + np.sin(rng.uniform(0, 6, width) + 0.1 * np.arange(length + 1)[:, None])
    columns = {"action": (path[1:] if absolute else np.diff(path, axis=0)).astype(np.float32)}
    columns |= {"torque": np.zeros((length, 2), np.float32), state: path[:-1].astype(np.float32)}
    black = encode_png(np.zeros((SIZE, SIZE, 3), np.uint8))
    images = {f"observation.images.{name}": [black] * length for name in ("front", "wrist")}
    return Episode(("lift", "drop")[number % 2], columns, images)


def real_folder(folder, n: int = 4, **options):
    write_dataset(folder, (real_episode(number, **options) for number in range(n)), 10, "toy", (SIZE, SIZE, 3))
    return folder


def screen(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_run_says_what_it_reads_and_leaves_out(tmp_path, capsys):
    data = real_folder(tmp_path / "real")
    out = train_robot(Robot(data=str(data), out=str(tmp_path / "run"), steps=1, **TINY))
    said = screen(capsys)
    assert (
        "reads camera observation.images.front, camera observation.images.wrist, observation.state (4 numbers), action "
        "(4 numbers); leaves out torque (2 numbers)" in said
    )
    assert (
        "actions are absolute (4 of 4 numbers follow observation.state); if that is wrong: --targets relative" in said
    )
    agent = Agent.load(str(out))
    assert (agent.metadata["state_dim"], agent.metadata["targets"]) == (4, "absolute")
    policy = SafePolicy(agent)
    assert policy.hold == "last"
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    observation = {"observation/image": image, "observation/wrist": image, "prompt": "lift"}
    assert policy.session()(observation | {"observation/state": [2.0] * 4})["actions"].shape == (3, 4)
    with pytest.raises(
        UserError, match=r'"observation/state": number 1 of 4 is 114.592, but lay between .* in the training data'
    ):
        policy.session()(observation | {"observation/state": np.rad2deg([2.0] * 4)})


def test_the_users_word_about_targets_counts(tmp_path, capsys):
    data = real_folder(tmp_path / "real", absolute=False)
    out = train_robot(Robot(data=str(data), out=str(tmp_path / "found"), steps=1, **TINY))
    assert Agent.load(str(out)).metadata["targets"] == "relative" and "actions are relative" in screen(capsys)
    out = train_robot(Robot(data=str(data), out=str(tmp_path / "said"), steps=1, targets="absolute", **TINY))
    assert Agent.load(str(out)).metadata["targets"] == "absolute"
    assert "actions are absolute (--targets); if that is wrong: --targets relative" in screen(capsys)


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_data_without_a_state_makes_a_policy_that_asks_for_none(tmp_path, capsys, head):
    data = real_folder(tmp_path / "real", state="observation.joint_positions")
    recipe = Robot(data=str(data), out=str(tmp_path / "run"), steps=1, action_head=head, **TINY)
    out = train_robot(recipe)
    said = screen(capsys)
    assert "has no column observation.state or state: the policy reads no state" in said
    assert "torque (2 numbers), observation.joint_positions (4 numbers)" in said
    agent = Agent.load(str(out))
    assert agent.metadata["state_dim"] == 0 and agent.metadata["targets"] == "absolute"
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert agent.act([{"front": image, "wrist": image}], None, ["lift"]).shape == (1, 3, 4)
    seen = {"observation.images.front": image, "observation.images.wrist": image}
    sent = SafePolicy(agent).session()(seen | {"prompt": "lift"})
    assert np.isfinite(sent["actions"]).all()
    Run(replace(recipe, resume=True))


def test_data_of_another_robot_is_one_line(tmp_path):
    data, other = real_folder(tmp_path / "real"), real_folder(tmp_path / "other", width=6)
    stateless = real_folder(tmp_path / "stateless", state="observation.joints")
    out = train_robot(Robot(data=str(data), out=str(tmp_path / "run"), steps=1, **TINY))
    for wrong, found in ((other, 6), (stateless, 0)):
        message = f"has a state of 4 numbers, but that of the data in {wrong} has {found}: "
        with pytest.raises(UserError, match=message + "resume it with its own data, or choose another --out"):
            Run(Robot(**TINY | dict(data=str(wrong), out=str(out), steps=3, resume=True)))
        with pytest.raises(UserError, match=message + "train a new model without --start-from"):
            Run(Robot(**TINY | dict(data=str(wrong), out=str(tmp_path / "new"), start_from=str(out))))


def test_frames_learn_the_instruction_of_their_task(tmp_path, capsys):
    episodes = [real_episode(n) for n in range(4)]
    for episode in episodes:
        episode.frame_tasks = ["lift"] * 10 + ["drop"] * 20
    write_dataset(tmp_path / "real", episodes, 10, "toy", (SIZE, SIZE, 3))
    run = Run(Robot(data=str(tmp_path / "real"), out=str(tmp_path / "run"), steps=1, **TINY))
    assert "of 2 tasks" in screen(capsys)
    batch = action_batch(run.task.data, [0, 9, 10, 29], run.model, run.tokenizer, None)
    texts = [run.tokenizer.decode(row.tolist()) for row in batch.inputs.idx]
    assert [next(task for task in ("lift", "drop") if task in text) for text in texts] == ["lift"] * 2 + ["drop"] * 2
    assert batch.inside.tolist() == [[True] * 3, [True, False, False], [True] * 3, [True, False, False]]


@pytest.mark.parametrize("head, own", [("continuous", 1), ("bins", 3 * 4)])
def test_an_instruction_that_does_not_fit_the_context_is_found_before_the_first_step(tmp_path, head, own):
    """The longest instruction is that of some frames of the one episode to validate with."""
    episodes, long = [real_episode(2 * n) for n in range(3)], "put the blue cube on the shelf behind the door" * 2
    episodes[-1].frame_tasks = ["lift"] * 25 + [long] * 5
    write_dataset(tmp_path / "real", episodes, 10, "toy", (SIZE, SIZE, 3))
    settings = TINY | dict(data=str(tmp_path / "real"), out=str(tmp_path / "run"), steps=1, action_head=head)
    run = Run(Robot(**settings | dict(sequence_len=512)))
    assert long in run.task.val.by_task and long not in run.task.data.by_task
    n = len(action_prompt(run.tokenizer, long, run.model)) + own
    with pytest.raises(UserError) as raised:
        Run(Robot(**settings | dict(out=str(tmp_path / "short"), sequence_len=n - 1)))
    said = str(raised.value)
    assert f"the instruction {short_repr(long)} takes {n} tokens" in said and f"the context has {n - 1}" in said
    assert f"--sequence-len {n}," in said and "--vision-tokens" in said and ("--chunk" in said) is (head == "bins")
    assert not (tmp_path / "short").exists()
    train_robot(Robot(**settings | dict(out=str(tmp_path / "fits"), sequence_len=n)))


def test_every_paraphrase_and_question_must_fit_the_context(tmp_path):
    write_dataset(tmp_path / "toy", (toy_episode(n) for n in range(4)), 10, "toy", (SIZE, SIZE, 3))
    settings = TINY | dict(data=str(tmp_path / "toy"), out=str(tmp_path / "run"), steps=1)
    run = Run(Robot(**settings))
    texts = INSTRUCTIONS["reach"] + INSTRUCTIONS["push"]
    n, text = max((len(action_prompt(run.tokenizer, text, run.model)) + 1, text) for text in texts)
    with pytest.raises(UserError, match=f"the instruction '.*' takes {n} tokens"):
        Run(Robot(**settings | dict(out=str(tmp_path / "action"), sequence_len=n - 1)))
    # the instructions fit, but the description of the scene does not; a validation asks even where training does not
    for questions in (4, 0):
        changed = dict(out=str(tmp_path / f"asks{questions}"), sequence_len=n, questions_per_step=questions)
        with pytest.raises(UserError, match=r"the question '.*' with its answer takes \d+ tokens.*--sequence-len"):
            Run(Robot(**settings | changed))


def test_a_row_that_is_too_long_for_the_context_is_a_users_error(tmp_path):
    """Should the checks before the first step have missed it."""
    write_dataset(tmp_path / "toy", (toy_episode(n) for n in range(4)), 10, "toy", (SIZE, SIZE, 3))
    run = Run(Robot(**TINY | dict(data=str(tmp_path / "toy"), out=str(tmp_path / "run"), steps=1)))
    model, tokenizer, rng = run.model, run.tokenizer, np.random.default_rng(0)
    model.config.sequence_len = 9
    for batch, what in ((action_batch, "instruction"), (question_batch, "question")):
        with pytest.raises(UserError, match=f"the {what} .* tokens, .* but the context has 9"):
            batch(run.task.data, [0], model, tokenizer, rng)


def test_a_broken_state_of_the_simulator_is_named(tmp_path):
    episodes = [toy_episode(n) for n in range(4)]
    write_dataset(tmp_path / "toy", episodes, 10, "toy", (SIZE, SIZE, 3))
    path = next((tmp_path / "toy/data").rglob("*.parquet"))
    table, name = pq.read_table(path), "observation.environment_state"
    values = np.array(table[name].to_pylist())
    values[13, 5] = np.nan
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values.tolist())), path)
    with pytest.raises(UserError, match=f"episode 1: '{name}' of frame 1 has nan as number 6 of 39"):
        RobotTask(Robot(data=str(tmp_path / "toy"), **TINY))


def test_rollouts_give_no_state_to_a_policy_without_one():
    class Fake:
        metadata = {"state_dim": 0}

        def act(self, images, states, instructions):
            return images, states, instructions

    agent = Fake()
    assert acting(agent)(["frame"], np.zeros((1, 4)), ["go"]) == (["frame"], None, ["go"])
    agent.metadata = {"state_dim": 4}
    assert acting(agent) == agent.act


def test_a_run_learns_from_several_folders(tmp_path, capsys):
    days = [str(real_folder(tmp_path / name, n)) for name, n in (("monday", 4), ("tuesday", 6))]
    recipe = Robot(data=days[0], also=(days[1],), out=str(tmp_path / "run"), steps=2, **TINY)
    out = train_robot(replace(recipe, steps=1))
    said = screen(capsys)
    assert all(f"{day}: reads camera" in said for day in days)
    assert "180 frames of 2 tasks, 120 to validate" in said  # of each task of each folder the last episode is held out
    assert Agent.load(str(out)).training["recipe"]["also"] == [days[1]]
    with pytest.raises(UserError, match="have different cameras"):
        RobotTask(replace(recipe, also=(str(real_cameras(tmp_path / "other")),)))


def real_cameras(folder):
    episodes = (real_episode(number) for number in range(4))
    one = [replace(each, images=dict(list(each.images.items())[:1])) for each in episodes]
    write_dataset(folder, one, 10, "toy", (SIZE, SIZE, 3))
    return folder
