"""Closed loop: the figures, the controls, and a small rollout with a policy that knows nothing."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.evaluation import rollout
from nanochat.evaluation.metrics import wilson
from nanochat.evaluation.questions import balanced, score
from nanochat.evaluation.rollout import Job, Outcome, drive, run, summary, told
from nanochat.metaworld.instructions import INSTRUCTIONS, MT10, TIERS
from nanochat.metaworld.scene import Question
from nanochat.metaworld.workers import in_processes
from tests.test_robot_model import make_model
from tests.test_robot_model import tokenizer as tokenizer  # a fixture
from tests.test_simulator import needs_simulator

ROOT = Path(__file__).parents[1]


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
    assert low <= row["macro"] <= high


def test_some_tasks_have_no_tiers():
    row = summary([outcome("reach", 0, True)], ["reach"])["drivers"]["policy"]
    assert "macro" not in row and row["tasks"] == {"reach": 1.0}


def test_intervals_of_rates():
    assert wilson(80, 100) == pytest.approx(
        [0.711, 0.867], abs=2e-3
    )  # Newcombe 1998's form, by an independent calculator
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(10, 10)[0] > 0.6


def test_shuffled_instructions_are_another_tasks():
    tasks = list(MT10)
    for names in (tasks, ["reach"], ["reach", "push"]):
        for task in names:
            assert told(names, task, "policy") == INSTRUCTIONS[task][0]
            assert told(names, task, "shuffled") != INSTRUCTIONS[task][0]
    assert len({told(tasks, task, "shuffled") for task in tasks}) == len(tasks)


def test_balanced_accuracy_of_one_answer_is_a_half():
    truths = ["no"] * 90 + ["yes"] * 10
    assert balanced(truths, [truth == "no" for truth in truths]) == 0.5
    asked = [Question("done", "done?", truth) for truth in truths]
    row = score(asked, list(range(100)), {"aligned": ["no"] * 95 + ["yes"] * 5, "blind": ["no"] * 100})["done"]
    assert row["aligned"] == 0.95 and row["majority"] == 0.9
    assert row["balanced"] == {"aligned": pytest.approx(0.75), "blind": 0.5}


@needs_simulator
def test_the_expert_drives_and_chance_does_not():
    expert = drive(Job("door-open", "open the door", "expert", (0, 1), 5, 32, 120))
    chance = drive(Job("door-open", "open the door", "random", (0, 1), 5, 32, 120))
    assert [o.success for o in expert] == [True, True] and [o.success for o in chance] == [False, False]
    assert [o.seed for o in expert] == [0, 1] and all(o.steps == 120 and o.looks == 24 for o in chance)


@needs_simulator
def test_a_policy_whose_head_has_gone_mad_moves_nothing(monkeypatch):
    """NaN from the network: the arm holds, and every action is counted."""

    def broken(images, states, instructions):
        return np.full((len(states), 10, 4), np.nan, np.float32)

    monkeypatch.setattr(rollout, "policy", broken, raising=False)
    (found,) = drive(Job("reach", "go", "policy", (0,), 5, 32, 10))
    assert found.warnings == {"not finite": 10} and not found.success


@needs_simulator
def test_what_the_policy_is_shown_and_told(monkeypatch):
    seen = []

    def watched(images, states, instructions):
        seen.append((images, instructions))
        return np.zeros((len(states), 10, 4), np.float32)

    monkeypatch.setattr(rollout, "policy", watched, raising=False)
    for driver in ("policy", "shuffled", "blind"):
        drive(Job("reach", told(list(MT10), "reach", driver), driver, (0, 1), 5, 32, 5))
    (shown, right), (shown_too, wrong), (hidden, right_too) = seen
    assert hidden == [None, None] and right == right_too == [INSTRUCTIONS["reach"][0]] * 2
    assert wrong == [INSTRUCTIONS["push"][0]] * 2
    np.testing.assert_array_equal(shown, shown_too)
    assert np.std(shown[0]) > 0 and (shown[0] != shown[1]).any()


@needs_simulator
def test_many_episodes_are_driven_a_few_at_a_time(tokenizer, tmp_path):
    save_checkpoint(tmp_path / "c", make_model(tokenizer, "continuous", state_dim=4), tokenizer, {})
    out = tmp_path / "figures.json"
    run(str(tmp_path / "c"), ["reach"], 12, 3, ["blind", "blind"], 3, 3, 2, None, out, torch.device("cpu"))
    result = json.loads(out.read_text())
    assert sorted(outcome["seed"] for outcome in result["outcomes"]) == list(range(3, 15))
    assert {outcome["looks"] for outcome in result["outcomes"]} == {1}


def die(job):
    os._exit(1)


def test_a_process_that_dies_is_told_and_not_waited_for():
    with pytest.raises(MemoryError, match="fewer --processes"):
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
from nanochat.metaworld.workers import in_processes
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
def test_a_rollout_from_a_checkpoint(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = make_model(tokenizer, "continuous", state_dim=4)
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    out, films = tmp_path / "figures.json", tmp_path / "films"
    run(str(tmp_path / "c"), ["reach"], 2, 0, ["policy", "shuffled", "blind"], 3, 9, 1, films, out, torch.device("cpu"))
    result = json.loads(out.read_text())
    assert set(result["drivers"]) == {"policy", "shuffled", "blind"} and len(result["outcomes"]) == 6
    assert len(list(films.glob("*.gif"))) == 6
    with pytest.raises(ValueError, match="execute must lie in 1..3"):
        run(str(tmp_path / "c"), ["reach"], 2, 0, ["policy"], 4, 9, 1, None, None, torch.device("cpu"))
