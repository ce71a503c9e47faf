"""Closed-loop evaluation: the figures, the controls, and small rollouts with an untrained policy."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanochat.agent import Agent
from nanochat.checkpoint import save_checkpoint
from nanochat.evaluation.rollout import (
    PROTOCOLS,
    Job,
    Outcome,
    Settings,
    instruction_for,
    layout_seed,
    make_jobs,
    run_job,
    run_rollouts,
    summary,
)
from nanochat.evaluation.rollout_figures import MOTION_MM, jerk
from nanochat.metaworld.instructions import INSTRUCTIONS, MT10, TIERS
from nanochat.metaworld.simulator import CAMERA
from nanochat.robot_gpt import RobotGPT
from nanochat.workers import in_processes
from tests.test_simulator import needs_simulator
from tests.tiny_policy import make_policy, make_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer, folder = make_tokenizer(["open the door"]), tmp_path_factory.mktemp("policy") / "c"
    save_checkpoint(folder, make_policy(tokenizer), tokenizer, {})
    return str(folder)


def job_of(task, instruction, driver, seeds, execute, image_size, max_steps, cameras=(CAMERA,), **settings) -> Job:
    how = Settings(execute, max_steps=max_steps, **({"committed": 0} | settings))
    return Job(task, instruction, driver, seeds, how, image_size, cameras)


def outcome(task, seed, success, driver="policy"):
    return Outcome(task, driver, seed, success, 10, 2, 0.01, 1.0, {"not finite": 1})


def test_rates_of_tiers_weigh_tiers_alike_and_episodes_alike_within():
    tasks = list(INSTRUCTIONS)
    good = set(TIERS["very hard"]) | {TIERS["easy"][0]}
    outcomes = [outcome(task, seed, task in good) for task in tasks for seed in range(4)]
    row = summary(outcomes, tasks)["drivers"]["policy"]
    assert row["tiers"] == {"easy": pytest.approx(1 / 28), "medium": 0, "hard": 0, "very hard": 1}
    assert row["macro"] == pytest.approx((1 / 28 + 1) / 4)
    assert row["pooled"] == pytest.approx(6 / 50)
    assert row["warnings"] == 200 and row["ms_per_chunk"] == pytest.approx(5)
    low, high = row["macro_ci95"]
    assert low - 1e-9 <= row["macro"] <= high + 1e-9


def test_intervals_are_over_what_is_independent():
    """Ten layouts that all tasks share are ten draws, and not five hundred."""
    tasks, rng = list(INSTRUCTIONS), np.random.default_rng(0)
    lucky = rng.random(10) < 0.5  # a layout is easy for every task, or for none
    outcomes = [outcome(task, seed, bool(lucky[seed])) for task in tasks for seed in range(10)]
    own, shared = (summary(outcomes, tasks, own_layouts)["drivers"]["policy"] for own_layouts in (True, False))
    assert own["macro"] == shared["macro"] == pytest.approx(lucky.mean())
    for name in ("macro_ci95", "pooled_ci95"):
        assert shared[name][1] - shared[name][0] > 3 * (own[name][1] - own[name][0])
    se = (lucky.mean() * (1 - lucky.mean()) / 10) ** 0.5  # of ten independent draws
    assert shared["macro_ci95"][1] - shared["macro_ci95"][0] == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_tasks_have_layouts_of_their_own_far_from_training_seeds():
    seeds = [layout_seed(task, number) for task in INSTRUCTIONS for number in range(40)]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 2**31 and max(seeds) < 2**32
    assert layout_seed("door-open", 3) == layout_seed("door-open", 3)


@needs_simulator
def test_the_published_protocol_shares_seeds_and_begins_with_a_zero_action():
    from nanochat.metaworld.simulator import Arm

    first = {}

    def see(name):
        def act(images, states, instructions):
            first.setdefault(name, states[0])
            return np.zeros((len(states), 1, 4), np.float32)

        return act

    for protocol in ("standard", "published"):
        (found,) = run_job(job_of("reach", "reach", "policy", (4042,), 1, 32, 3, protocol=protocol), see(protocol))
        assert found.steps == found.looks == 3
    arm = Arm("reach", 32)
    arm.reset(4042)
    np.testing.assert_array_equal(first["published"], arm.step(np.zeros(4)).state)
    np.testing.assert_array_equal(first["standard"], arm.reset(layout_seed("reach", 4042)).state)
    assert PROTOCOLS["published"].max_steps == 400 and PROTOCOLS["published"].first_seed == 4042


def test_some_tasks_have_no_tiers():
    row = summary([outcome("reach", 0, True)], ["reach"])["drivers"]["policy"]
    assert "macro" not in row and row["tasks"] == {"reach": 1.0}


def test_shuffled_instructions_are_another_tasks():
    tasks = list(MT10)
    for names in (tasks, ["reach"], ["reach", "push"]):
        for task in names:
            assert instruction_for(names, task, "policy") == INSTRUCTIONS[task][0]
            assert instruction_for(names, task, "shuffled") != INSTRUCTIONS[task][0]
    assert len({instruction_for(tasks, task, "shuffled") for task in tasks}) == len(tasks)


def test_jobs_cover_every_episode_once_in_parts_of_ten():
    jobs = make_jobs(["reach", "push"], range(3, 15), ["policy", "blind"], Settings(5, max_steps=100), 32)
    assert [len(job.seeds) for job in jobs] == [10, 2] * 4
    asked = [(job.driver, job.task, seed) for job in jobs for seed in job.seeds]
    assert len(set(asked)) == len(asked) == 2 * 2 * 12
    assert {seed for *_, seed in asked} == set(range(3, 15))


@needs_simulator
def test_the_expert_succeeds_and_random_actions_do_not():
    expert = run_job(job_of("door-open", "open the door", "expert", (0, 1), 5, 32, 120))
    chance = run_job(job_of("door-open", "open the door", "random", (0, 1), 5, 32, 120))
    assert [o.success for o in expert] == [True, True] and [o.success for o in chance] == [False, False]
    assert [o.seed for o in expert] == [0, 1] and all(o.steps < 120 for o in expert)
    assert all(o.steps == 120 and o.looks == 24 for o in chance)


@needs_simulator
def test_a_policy_that_returns_nan_moves_nothing():
    """The arm holds, and every action is counted."""

    def broken(images, states, instructions):
        return np.full((len(states), 10, 4), np.nan, np.float32)

    (found,) = run_job(job_of("reach", "go", "policy", (0,), 5, 32, 10), broken)
    assert found.warnings == {"not finite": 10} and not found.success


@needs_simulator
def test_pictures_and_instructions_of_each_driver():
    seen = []

    def watched(images, states, instructions):
        seen.append((images, instructions))
        return np.zeros((len(states), 10, 4), np.float32)

    for driver in ("policy", "shuffled", "blind"):
        run_job(job_of("reach", instruction_for(list(MT10), "reach", driver), driver, (0, 1), 5, 32, 5), watched)
    (shown, right), (shown_too, wrong), (hidden, right_too) = seen
    assert hidden == [None, None] and right == right_too == [INSTRUCTIONS["reach"][0]] * 2
    assert wrong == [INSTRUCTIONS["push"][0]] * 2
    (one, other), (again, _) = ([row["corner2"] for row in rows] for rows in (shown, shown_too))
    np.testing.assert_array_equal(one, again)
    assert np.std(one) > 0 and (one != other).any()


@needs_simulator
def test_a_policy_with_two_cameras_acts_on_both(tmp_path):
    tokenizer = make_tokenizer(["reach"])
    one = make_policy(tokenizer, image_size=32)
    model = RobotGPT(replace(one.config, cameras=["gripperPOV", "corner2"]))
    model.init_weights()
    model.attach_encoder(one.vision_encoder)
    seen, agent = [], Agent(model, tokenizer)

    def watched(images, states, instructions):
        seen.extend(images)
        return agent.act(images, states, instructions)

    job = job_of("reach", "reach", "policy", (0,), 3, 32, 3, gifs=tmp_path, cameras=("gripperPOV", "corner2"))
    run_job(job, watched)
    assert list(seen[0]) == ["gripperPOV", "corner2"]
    (gif,) = tmp_path.glob("*.gif")
    assert Image.open(gif).size == (512, 256)  # both, side by side
    with pytest.raises(ValueError, match="Meta-World has no camera front: its cameras are topview, .*gripperPOV"):
        run_job(replace(job, cameras=("front",)), watched)


@needs_simulator
def test_a_blind_policy_sees_nothing_while_gifs_are_made(tmp_path):
    def watched(images, states, instructions):
        assert images == [None] * len(states)
        return np.zeros((len(states), 10, 4), np.float32)

    run_job(job_of("reach", "go", "blind", (0, 1), 5, 32, 5, gifs=tmp_path), watched)
    assert len(list(tmp_path.glob("blind-reach-*.gif"))) == 2


@needs_simulator
def test_an_episode_ends_within_a_chunk():
    """At the step of its success, or at max_steps."""
    (by_step,) = run_job(job_of("door-open", "open the door", "expert", (0,), 1, 32, 120))
    (by_chunk,) = run_job(job_of("door-open", "open the door", "expert", (0,), 7, 32, 120))
    assert by_step.success and by_chunk.success and by_step.steps == by_chunk.steps == by_step.looks
    assert by_chunk.looks == -(-by_chunk.steps // 7)
    (late,) = run_job(job_of("door-open", "open the door", "random", (0,), 5, 32, 12))
    assert (late.steps, late.looks, late.success) == (12, 3, False)


@needs_simulator
def test_only_running_episodes_are_in_the_batch():
    """Seed 0 and seed 1 need different numbers of steps; the network does not see the one that has finished."""
    from nanochat.metaworld.simulator import Arm

    arms, sizes = {}, []

    def expert(images, states, instructions):
        sizes.append(len(states))
        chunk = []
        for state in states:
            seed = next((s for s, arm in arms.items() if np.array_equal(arm.observation[:4].astype(np.float32), state)))
            action = arms[seed].expert_action()
            arms[seed].step(action)
            chunk.append([action])
        return np.array(chunk)

    for seed in (0, 1):
        arms[seed] = Arm("door-open", 32)
        arms[seed].reset(layout_seed("door-open", seed))
    found = run_job(job_of("door-open", "open the door", "policy", (0, 1), 1, 32, 120), expert)
    steps = [o.steps for o in found]
    assert [o.success for o in found] == [True, True] and steps[0] != steps[1]
    assert sizes == [2] * min(steps) + [1] * (max(steps) - min(steps))
    assert [o.looks for o in found] == steps


@needs_simulator
def test_twelve_episodes_are_run_by_two_processes(checkpoint, tmp_path):
    out = tmp_path / "figures.json"
    settings = Settings(execute=3, max_steps=3)
    found = run_rollouts(
        checkpoint, ["reach"], settings, episodes=12, seed=3, drivers=["blind", "blind"], processes=2, json_out=out
    )
    result = json.loads(out.read_text())
    assert result["drivers"] == found["drivers"] and result["peak_memory_mb"] > 50 and result["steps_per_s"] > 0
    assert sorted(outcome["seed"] for outcome in result["outcomes"]) == list(range(3, 15))
    assert {outcome["looks"] for outcome in result["outcomes"]} == {1}


def die(job):
    os._exit(1)


def test_a_process_that_dies_is_told_and_not_waited_for():
    with pytest.raises(MemoryError, match="fewer processes"):
        list(in_processes(die, [1, 2, 3], 2))


def refuse(job):
    raise ValueError(f"no {job}")


def test_what_a_process_raises_is_raised():
    with pytest.raises(ValueError, match="no job"):
        list(in_processes(refuse, ["job"] * 5, 2))
    assert sorted(in_processes(abs, [-1, 2, -3], 2)) == [1, 2, 3]


def test_who_stops_early_does_not_wait():
    results = in_processes(time.sleep, [0, 100, 100], 2)
    next(results)
    assert multiprocessing.active_children()
    results.close()
    until = time.monotonic() + 60
    while multiprocessing.active_children():
        assert time.monotonic() < until, "a process is still asleep"
        time.sleep(0.1)


PARENT = """
import time
from nanochat.workers import in_processes
from tests.test_rollout import process_id
results = in_processes(process_id, [0, 100], 2)
print(next(results), flush=True)
time.sleep(100)
"""


def process_id(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_processes_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < until, "the process outlives its parent"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # a zombie that nobody has collected yet has ended
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@needs_simulator
def test_a_rollout_from_a_checkpoint(checkpoint, tmp_path):
    out, gifs = tmp_path / "figures.json", tmp_path / "gifs"

    def rollouts(drivers, execute=3, episodes=2, max_steps=9, gifs=None, json_out=None):
        settings = Settings(execute, max_steps=max_steps, gifs=gifs)
        return run_rollouts(checkpoint, ["reach"], settings, episodes=episodes, drivers=drivers, json_out=json_out)

    rollouts(["policy", "shuffled", "blind"], gifs=gifs, json_out=out)
    result = json.loads(out.read_text())
    assert set(result["drivers"]) == {"policy", "shuffled", "blind"} and len(result["outcomes"]) == 6
    names = {path.name for path in gifs.iterdir()}
    assert names == {
        f"{driver}-reach-{seed}-failure.gif" for driver in ("policy", "shuffled", "blind") for seed in (0, 1)
    }
    with Image.open(gifs / "policy-reach-0-failure.gif") as film:
        assert film.n_frames == 4 and film.size == (256, 256)  # 3 observations, and the end
    with pytest.raises(ValueError, match="execute must be in 1..3"):
        rollouts(["policy"], execute=4)
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        rollouts(["policy"], episodes=0)
    with pytest.raises(ValueError, match="--max-steps must be in 1..500"):
        rollouts(["policy"], max_steps=501)


# ---- delays


def test_jerk_is_the_third_difference_of_the_path_that_is_sent():
    t = np.arange(10.0)
    path = np.stack([t**3, -2 * t**3, t**2], 1)  # in mm; third differences: 6, -12 and 0
    assert jerk(np.diff(path, axis=0) / MOTION_MM) == pytest.approx((6**2 + 12**2) ** 0.5)
    assert jerk(np.ones((5, 3))) == 0 and jerk(np.ones((2, 3))) == 0


@needs_simulator
def test_an_action_of_one_is_a_motion_of_ten_millimetres():
    from nanochat.metaworld.simulator import Arm

    arm = Arm("reach", 32)
    arm.reset(0)
    assert 1e3 * arm.env.action_scale == MOTION_MM


def counting(known):
    """A policy whose actions say when its observation was made: 0.01 times the number of the look. known: what it is shown."""

    def act(images, states, instructions, committed=None):
        known.append(committed)
        return np.full((len(states), 10, 4), len(known) / 100, np.float32)

    return act


@needs_simulator
def test_a_chunk_is_carried_out_after_its_delay(monkeypatch):
    from nanochat.metaworld.simulator import Arm

    sent, step = [], Arm.step
    monkeypatch.setattr(
        Arm, "step", lambda arm, action: (sent.append(round(float(action[0]) * 100)), step(arm, action))[1]
    )
    run_job(job_of("reach", "go", "policy", (0,), 4, 32, 12, delay=3), counting(known := []))
    assert sent == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]  # the arm rests until the first chunk is there
    assert known == [None] * 3
    sent.clear()
    run_job(job_of("reach", "go", "policy", (0,), 4, 32, 8), counting([]))
    assert sent == [1] * 4 + [2] * 4


@needs_simulator
def test_what_goes_on_meanwhile_is_shown_to_a_policy_that_can_use_it():
    found = run_job(job_of("reach", "go", "policy", (0, 1), 4, 32, 12, delay=3, committed=2), counting(known := []))
    np.testing.assert_array_equal(known[0], np.zeros((2, 2, 4)))  # both rest until their first chunk is there
    for look in (1, 2):
        np.testing.assert_array_equal(known[look], np.full((2, 2, 4), np.float32(look / 100)))
    assert all(0 < outcome.jerk < 1 for outcome in found)


@needs_simulator
def test_ensembling_is_the_mean_of_chunks(monkeypatch):
    from nanochat.metaworld.simulator import Arm

    sent, step = [], Arm.step
    monkeypatch.setattr(Arm, "step", lambda arm, action: (sent.append(float(action[0])), step(arm, action))[1])
    run_job(job_of("reach", "go", "policy", (0,), 1, 32, 4, ensemble=0.0), counting([]))
    np.testing.assert_allclose(sent, [0.01, 0.015, 0.02, 0.025], atol=1e-6)


def test_a_delay_that_the_chunk_cannot_bridge_is_refused(checkpoint):
    for delay, execute in ((1, 1), (2, 2), (1, 3), (-1, 2)):
        with pytest.raises(
            ValueError, match=f"with --execute {execute} and chunks of 3 actions, the delay must be in 0.."
        ):
            run_rollouts(checkpoint, ["reach"], Settings(execute, delay), episodes=1)


@needs_simulator
def test_a_rollout_with_delay_says_so(checkpoint, nanochat, tmp_path):
    out = tmp_path / "figures.json"
    printed, _ = nanochat(
        "rollout", checkpoint, "--tasks", "reach", "--episodes", "1", "--execute", "2", "--delay", "1", "--ensemble", "0.01",
        "--max-steps", "6", "--processes", "1", "--json", out, "--device", "cpu",
    )  # fmt: skip
    assert "jerk, mm/step" in printed
    figures = json.loads(out.read_text())
    assert (figures["delay"], figures["ensemble"], figures["committed"]) == (1, 0.01, 1)
    assert (
        figures["drivers"]["policy"]["jerk"] == pytest.approx(figures["outcomes"][0]["jerk"])
        and figures["outcomes"][0]["jerk"] > 0
    )
