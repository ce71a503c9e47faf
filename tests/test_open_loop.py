"""Open-loop errors against plain loops, baselines against brute force, and the tables of the report."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanochat.data.demonstrations import Demonstrations
from nanochat.data.lerobot import Episode
from nanochat.errors import UserError
from nanochat.evaluation.baselines import HOLD, LAST, MEAN, NEAREST, baselines, follows_state
from nanochat.evaluation.controls import CONDITIONS as CONTROLS
from nanochat.evaluation.open_loop import OpenLoop, frames_to_ask, run_open_loop
from nanochat.evaluation.open_loop_plot import Played, draw_open_loop, liveliest, typical_episode
from nanochat.evaluation.open_loop_report import number_table, row_table, summary, verdict
from tests.data_files import demonstrations, encode

SIZE = 32
CONDITIONS = ("policy", *CONTROLS)


def arm_episode(seed: int, length: int = 12, task: str = "lift", **changes) -> Episode:
    """A robot of absolute targets: each of 4 numbers of the action is where the state will be two frames later. Frame t of
    episode `seed` is a picture of the grey 20 * seed + t."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(0.1, 0.05, (length + 2, 4)), axis=0) + rng.uniform(0, 1, 4)
    columns = {"observation.state": path[:-2].astype(np.float32), "action": path[2:].astype(np.float32)}
    pictures = [encode(np.full((SIZE, SIZE, 3), 20 * seed + t, np.uint8)) for t in range(length)]
    return Episode(task, columns | changes, {"observation.images.front": pictures}, name=f"{task} {seed}")


def arm_data(*seeds: int, **changes) -> Demonstrations:
    return demonstrations((arm_episode(seed, **changes) for seed in seeds), SIZE, fps=10)


# ---- baselines


def test_hold_and_last_action_of_absolute_targets():
    data = arm_data(0, 1)
    frames = np.array([0, 5, 12, 23])
    found = baselines(data, frames, 3, "absolute", arm_data(2, 3))
    assert all(chunks.shape == (4, 3, 4) and chunks.dtype == np.float32 for chunks in found.values())
    for step in range(3):
        np.testing.assert_array_equal(found[HOLD][:, step], data.state[frames])
        np.testing.assert_array_equal(found[LAST][[1, 3], step], data.action[[4, 22]])
        # no action was sent before the first frame of an episode: the robot is where it is
        np.testing.assert_array_equal(found[LAST][[0, 2], step], data.state[[0, 12]])


def test_a_number_that_does_not_follow_the_state_is_held_as_it_was_sent():
    """The last number is a gripper in other units than the state's."""
    data, known = arm_data(0), arm_data(1)
    for part in (data, known):
        part.action[:, 3] += 50
    assert follows_state(known).tolist() == [True, True, True, False]
    found = baselines(data, np.array([7]), 2, "absolute", known)
    assert found[HOLD][0, 1].tolist() == [*data.state[7, :3].tolist(), data.action[6, 3]]
    first = baselines(data, np.array([0]), 1, "absolute", known)
    np.testing.assert_allclose(first[HOLD][0, 0, 3], known.action[:, 3].mean(), rtol=1e-6)


def test_hold_of_relative_actions_is_no_motion_and_the_gripper_as_it_was():
    data = arm_data(0, 1)
    found = baselines(data, np.array([0, 5]), 2, "relative", data)
    assert found[HOLD][1].tolist() == [[0, 0, 0, data.action[4, 3]]] * 2
    np.testing.assert_allclose(found[HOLD][0, 0], [0, 0, 0, data.action[:, 3].mean()], rtol=1e-5)


def test_an_action_longer_than_the_state():
    data = arm_data(0, 1, **{"observation.state": np.zeros((12, 2), np.float32)})
    assert not follows_state(data)[2:].any()
    found = baselines(data, np.array([3]), 2, "absolute", data)
    assert found[HOLD].shape == (1, 2, 4) and found[HOLD][0, 0, 2] == data.action[2, 2]


def test_the_nearest_state_is_found_by_brute_force_and_its_chunk_ends_with_its_episode():
    data, known = arm_data(0, 1), arm_data(*range(2, 12))
    frames = np.arange(len(data))
    found = baselines(data, frames, 4, "absolute", known)[NEAREST]
    low, high = np.quantile(known.state.astype(np.float64), (0.01, 0.99), axis=0)
    for frame in frames:
        distance = (((known.state - data.state[frame]) / (high - low)) ** 2).sum(1)
        np.testing.assert_array_equal(found[frame], known.chunks([distance.argmin()], 4)[0][0])


def test_the_nearest_state_is_of_the_same_task_where_training_has_it():
    known = demonstrations([arm_episode(0), arm_episode(1, task="push")], SIZE)
    near = demonstrations([arm_episode(0, task="push"), arm_episode(0, task="new")], SIZE)
    found = baselines(near, np.array([4, 16]), 1, "absolute", known)[NEAREST][:, 0]
    assert (found[0] == known.action[12:]).all(1).any()  # the state of "lift" is the same, but the task is "push"
    np.testing.assert_array_equal(found[1], known.action[4])


def test_a_frame_is_not_its_own_neighbour():
    data = arm_data(0, 1)
    found = baselines(data, np.arange(24), 1, "absolute", data)[NEAREST][:, 0]
    assert all((found[frame] == data.action[12 - 12 * (frame // 12) :][:12]).all(1).any() for frame in range(24))
    alone = baselines(arm_data(0), np.array([5]), 1, "absolute", arm_data(0))[NEAREST]
    assert alone.shape == (1, 1, 4)  # there is no other


def test_what_cannot_be_told_is_left_out():
    data = arm_data(0, 1)
    assert baselines(data, np.array([1]), 2, "absolute", None).keys() == {HOLD, LAST}
    stateless = arm_data(2, **{"observation.state": np.zeros((12, 0), np.float32)})
    assert baselines(data, np.array([1]), 2, "relative", stateless).keys() == {HOLD, LAST, MEAN}


# ---- errors


def random_report(seed: int, n: int = 7, steps: int = 3, width: int = 4, rows=("policy", HOLD)) -> OpenLoop:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, steps, width)).astype(np.float32)
    inside = np.arange(steps) < rng.integers(1, steps + 1, n)[:, None]
    chunks = {row: truth + rng.normal(size=truth.shape).astype(np.float32) for row in rows}
    high = np.arange(width, dtype=float)  # the first number does not move
    return OpenLoop(np.arange(n), np.sort(rng.integers(0, 3, n)), truth, inside, chunks, np.zeros(width), high)


@given(st.integers(0, 2**32 - 1))
def test_errors_are_those_of_plain_loops(seed):
    found = random_report(seed)
    n, steps, width = found.truth.shape
    by_number, by_step, ratio = [[] for _ in range(width)], [[] for _ in range(steps)], {"policy": 0.0, HOLD: 0.0}
    for i in range(n):
        for t in range(steps):
            if not found.inside[i, t]:
                continue
            for k in range(width):
                error = abs(float(found.chunks["policy"][i, t, k]) - float(found.truth[i, t, k]))
                by_number[k].append(error)
                if k:
                    by_step[t].append(error / k)
                    for row in ratio:
                        ratio[row] += abs(float(found.chunks[row][i, t, k]) - float(found.truth[i, t, k])) / k
    np.testing.assert_allclose(found.by_number("policy"), [np.mean(errors) for errors in by_number], rtol=1e-5)
    for t in range(steps):
        expected = np.mean(by_step[t]) if by_step[t] else np.nan
        np.testing.assert_allclose(found.by_step("policy")[t], expected, rtol=1e-5)
    np.testing.assert_allclose(found.share("policy"), np.mean(sum(by_step, [])), rtol=1e-5)
    estimate = found.compared("policy", HOLD)
    np.testing.assert_allclose(estimate.value, ratio["policy"] / ratio[HOLD], rtol=1e-5)
    assert estimate.low <= estimate.value * (1 + 1e-9) and estimate.value <= estimate.high * (1 + 1e-9)
    shares = found.by_episode("policy")
    weights = {episode: found.inside[found.episode == episode].sum() for episode in shares}
    mean = sum(shares[episode] * weights[episode] for episode in shares) / sum(weights.values())
    np.testing.assert_allclose(mean, found.share("policy"), rtol=1e-5)


def test_what_follows_the_end_of_an_episode_does_not_count():
    found = random_report(0)
    before = summary(found, list("abcd"), [""] * 4, 10.0)
    for chunks in found.chunks.values():
        chunks[~found.inside] += 1000
    assert summary(found, list("abcd"), [""] * 4, 10.0) == before


def test_actions_that_never_move_are_an_error():
    found = random_report(0)
    with pytest.raises(UserError, match="no number of the actions moves"):
        OpenLoop(found.frames, found.episode, found.truth, found.inside, found.chunks, np.zeros(4), np.full(4, 1e-5))


def test_a_chunk_longer_than_all_episodes_is_json(tmp_path):
    found = random_report(0)
    found.inside[:, 2] = False
    result = json.loads(json.dumps(summary(found, list("abcd"), [""] * 4, 0.0), allow_nan=False))
    assert result["rows"]["policy"]["share_by_step"][2] is None
    assert [len(row) for row in result["rows"]["policy"]["by_number_and_step"]] == [3] * 4
    cells = [list(column.cells) for column in row_table(found, 0.0).columns]
    assert cells[-1][0] == "" and [column.header for column in row_table(found, 0.0).columns][-1] == "step 3"


# ---- what is said about it


def report_of(**errors: float) -> OpenLoop:
    """Each row is off by one number everywhere; 3 episodes of 2 frames."""
    truth = np.zeros((6, 2, 1), np.float32)
    chunks = {row.replace("_", " "): truth + error for row, error in errors.items()}
    inside = np.ones((6, 2), bool)
    return OpenLoop(np.arange(6), np.repeat([0, 1, 2], 2), truth, inside, chunks, np.zeros(1), np.ones(1))


def test_a_policy_that_does_not_beat_hold_is_told_so():
    for error in (0.2, 0.3):
        (line, *_) = verdict(report_of(policy=error, hold=0.2))
        assert line.startswith("DOES NOT BEAT HOLD") and f"{error / 0.2:.2f} of the error" in line
    (line,) = verdict(report_of(policy=0.1, hold=0.2))
    assert line == "Better than hold: 0.50 of the error of a robot that holds still (95 %: 0.50 .. 0.50, 3 episodes)."


def test_an_interval_that_reaches_one_is_not_sure():
    found = report_of(policy=0.1, hold=0.2)
    found.chunks["policy"][:2] = 0.35
    assert verdict(found)[0].startswith("Not surely better than hold: 0.92")


def test_a_recorded_robot_that_stands_still():
    found = report_of(policy=0.1, hold=0.0)
    assert verdict(found)[0].startswith("DOES NOT BEAT HOLD: > 100 of the error")
    assert [list(column.cells) for column in row_table(found, 0.0).columns][2] == ["> 100", "0.00"]


def test_one_episode_has_no_interval():
    found = report_of(policy=0.1, hold=0.2)
    found.episode[:] = 4
    assert "(one episode, no interval)" in verdict(found)[0]


def test_the_verdict_names_baselines_and_conditions_that_are_as_good():
    lines = verdict(report_of(policy=0.1, shuffled=0.1, blind=0.101, hold=0.2, last_action=0.05, mean_action=0.3))
    assert lines[1:] == [
        "No better than last action: without any training.",
        "The picture adds nothing: the error is the same with pictures of another episode.",
    ]
    assert len(verdict(report_of(policy=0.1, shuffled=0.2, blind=0.1, hold=0.2))) == 1
    assert verdict(report_of(policy=0.1, blind=0.1, hold=0.2))[1].endswith("the same without a picture.")
    assert verdict(report_of(policy=0.1, other_task=0.1, hold=0.2))[1].startswith("The words add nothing")


def test_the_table_of_numbers_marks_those_that_hold_is_better_at():
    found = random_report(1)
    found.chunks[HOLD] = found.truth.copy()
    found.chunks[HOLD][..., 2] += 100
    table = number_table(found, ["still [x]", "a", "b", "c"], ["", "rad", "", ""])
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["number"] == [r"still \[x]", "a (rad)", "b", "c"] and cells["range"] == ["still", "1", "2", "3"]
    assert [cell.endswith("*") for cell in cells["policy"]] == [True, True, False, True]


# ---- predictions


class GreyAgent:
    """Acts with the grey that it is shown, its state and its words."""

    def __init__(self, cameras=(), state_dim=4):
        self.metadata = {
            "chunk": 2, "targets": "absolute", "state_dim": state_dim, "action_dim": 4, "cameras": list(cameras)
        }  # fmt: skip
        self.action_range = [0.0] * 4, [1.0] * 4

    def act(self, images, states, texts):
        greys = [-1 if image is None else self.grey(image) for image in images]
        states = np.zeros((len(images), 4)) if states is None else states
        rows = [[grey, state[0], len(text), 0] for grey, state, text in zip(greys, states, texts, strict=True)]
        return np.repeat(np.array(rows, np.float32)[:, None], 2, axis=1)

    def grey(self, image) -> float:
        assert isinstance(image, dict) == (len(self.metadata["cameras"]) > 1)
        return float(sum(picture[0, 0, 0] for picture in image.values()) if isinstance(image, dict) else image[0, 0, 0])


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_conditions_change_only_what_they_say(batch_size):
    data = demonstrations([arm_episode(seed, task="lift" + " it" * (seed % 2)) for seed in range(4)], SIZE)
    frames = frames_to_ask(data, 24)
    found = run_open_loop(GreyAgent(), data, frames, batch_size, data, lambda starts, description: starts)
    right, shuffled, blind, other = (found.chunks[row][:, 0] for row in ("policy", "shuffled", "blind", "other task"))
    greys = 20 * data.episode[frames] + (frames - data.first[frames])
    np.testing.assert_array_equal(right[:, 0], greys)
    np.testing.assert_array_equal(right[:, 1], data.state[frames, 0])
    assert (shuffled[:, 0] // 20 != data.episode[frames]).all() and (shuffled[:, 1:] == right[:, 1:]).all()
    assert (blind[:, 0] == -1).all() and (blind[:, 1:] == right[:, 1:]).all()
    assert (other[:, 2] == 11 - right[:, 2]).all() and (other[:, :2] == right[:, :2]).all()  # "lift" and "lift it"
    np.testing.assert_array_equal(found.truth, data.chunks(frames, 2)[0])


def test_one_episode_is_shuffled_with_a_training_episode():
    data = arm_data(0)
    for known in (None, arm_data(1, 2)):
        found = run_open_loop(GreyAgent(), data, np.arange(12), 5, known, lambda starts, description: starts)
        assert [row for row in found.chunks if row in CONDITIONS] == (
            ["policy", "blind"] if known is None else ["policy", "shuffled", "blind"]
        )
    assert found.chunks["shuffled"][:, 0, 0].tolist() == list(range(20, 32))  # of the training episodes


def test_several_cameras_are_shown_by_name():
    episode = arm_episode(1)
    episode.images["observation.images.wrist"] = arm_episode(2).images["observation.images.front"]
    data = demonstrations([episode], SIZE)
    run = [lambda starts, description: starts]
    found = run_open_loop(GreyAgent(["front", "wrist"]), data, np.array([3]), 4, None, *run)
    assert found.chunks["policy"][0, 0, 0] == (20 + 3) + (40 + 3)
    found = run_open_loop(GreyAgent(), data, np.array([3]), 4, None, *run)  # an older policy: the first camera
    assert found.chunks["policy"][0, 0, 0] == 20 + 3


def test_a_policy_of_another_robot_is_refused_and_one_without_a_state_is_not():
    run = lambda starts, description: starts  # noqa: E731
    with pytest.raises(UserError, match="states of 6 numbers, but this data has 4"):
        run_open_loop(GreyAgent(state_dim=6), arm_data(0), np.array([1]), 4, None, run)
    found = run_open_loop(GreyAgent(state_dim=0), arm_data(0), np.array([1]), 4, None, run)
    assert found.chunks["policy"][0, 0, 1] == 0


def test_actions_that_are_not_finite_are_an_error():
    agent = GreyAgent()
    agent.act = lambda images, states, texts: np.full((len(images), 2, 4), np.nan)
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        run_open_loop(agent, arm_data(0), np.array([1]), 4, None, lambda starts, description: starts)


def test_frames_are_evenly_spaced_and_none_comes_twice():
    data = arm_data(0, 1)
    assert frames_to_ask(data, 1000).tolist() == list(range(24))
    assert frames_to_ask(data, 3).tolist() == [0, 12, 23] and frames_to_ask(data, 1).tolist() == [0]


# ---- the plot


def test_the_plot_shows_an_episode_with_many_numbers(tmp_path):
    found = random_report(0, n=9, steps=4, width=40, rows=("policy", "blind", HOLD, NEAREST))
    played = Played(
        "episode 3", np.random.default_rng(0).normal(size=(10, 40)), np.array([0, 4, 8]), np.zeros((3, 4, 40))
    )
    names = [f"$joint_{number}" for number in range(40)]  # no formula
    draw_open_loop(found, played, names, ["rad"] * 40, 10.0, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_numbers_that_move_the_most_are_drawn():
    found = random_report(0, width=40)
    truth = np.zeros((5, 40))
    truth[0] = np.arange(40) ** 2  # of a range of k, number k moves k**2
    assert liveliest(truth, found) == list(range(8, 40))


def test_the_episode_that_is_drawn_is_neither_the_best_nor_the_worst():
    found = report_of(policy=0.1, hold=0.2)
    for episode, error in enumerate((0.3, 0.1, 0.2)):
        found.chunks["policy"][found.episode == episode] = error
    assert typical_episode(found) == 2
