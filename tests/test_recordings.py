"""`nanochat eval` of a policy on recorded episodes: which are read, what it learnt from, and the report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nanochat.checkpoint import save_checkpoint
from nanochat.cli.main import is_recording
from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.data.lerobot_writer import write_dataset
from nanochat.evaluation.baselines import HOLD, LAST, MEAN, NEAREST
from nanochat.evaluation.recordings import learnt_from
from nanochat.training.recipes import Robot
from nanochat.training.robots import RobotTask
from tests.data_files import write_lines
from tests.test_open_loop import SIZE, arm_data, arm_episode
from tests.tiny_policy import make_policy, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("arm") / "demos"
    write_dataset(
        path, (arm_episode(n, task=("lift", "put down")[n % 2]) for n in range(8)), 10, "arm", (SIZE, SIZE, 3),
        {"action": ["base", "elbow", "wrist", "jaw"]},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def tuesday(tmp_path_factory):
    path = tmp_path_factory.mktemp("arm") / "tuesday"
    write_dataset(path, (arm_episode(n, task="lift") for n in range(8, 11)), 10, "arm", (SIZE, SIZE, 3))
    return path


def save_policy(path, data: str, also=(), earlier=(), **config) -> str:
    tokenizer = make_tokenizer(["lift", "put down"], 500)
    model = make_policy(tokenizer, image_size=SIZE)
    for name, value in config.items():
        setattr(model.config, name, value)
    save_checkpoint(path, model, tokenizer, {"recipe": {"data": data, "also": list(also)}, "earlier": list(earlier)})
    return str(path)


def test_eval_reports_and_draws_the_episodes_that_training_held_out(nanochat, folder, tmp_path):
    checkpoint = save_policy(tmp_path / "c", str(folder))
    out = nanochat("eval", checkpoint, folder, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png").out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["split"], result["episodes"], result["frames"], result["fps"]) == ("val", 2, 24, 10)
    assert [number["name"] for number in result["numbers"]] == ["base", "elbow", "wrist", "jaw"]
    rows = ["policy", "shuffled", "blind", "other task", HOLD, LAST, MEAN, NEAREST]
    assert list(result["rows"]) == rows and all(row in out for row in rows)
    assert result["rows"][HOLD]["of_hold"] == 1 and result["verdict"][0] in " ".join(out.split())
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_frames_are_read_at_the_rate_of_the_policy(nanochat, folder, tmp_path):
    named = {"action_names": list("abcd"), "units": "rad"}
    checkpoint = save_policy(tmp_path / "c", str(folder), fps=5.0, **named)
    assert "base (rad)" in nanochat("eval", checkpoint, folder, "--json", tmp_path / "a.json").out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["fps"], result["frames"]) == (5, 12)
    checkpoint = save_policy(tmp_path / "fast", str(folder), fps=30.0)
    assert "chooses 30 actions per second, but" in nanochat("eval", checkpoint, folder, code=2).err


def test_without_the_training_data_two_rows_are_left_out_and_that_is_said(nanochat, folder, tmp_path):
    checkpoint = save_policy(tmp_path / "c", "somewhere/else")
    out = " ".join(nanochat("eval", checkpoint, folder, "--limit", 5, "--json", tmp_path / "a.json").out.split())
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["split"], result["frames"]) == ("all", 5) and not {MEAN, NEAREST} & result["rows"].keys()
    said = "the rows mean action and nearest state are left out, which need the training data: somewhere/else must be"
    assert said in out and "no such folder exists" in out


def test_all_folders_that_were_trained_on_are_known(nanochat, folder, tuesday, tmp_path):
    """The last episode of each task of a folder is held out, whichever run of the checkpoint read the folder."""
    both = save_policy(tmp_path / "both", str(folder), also=[str(tuesday)])
    later = save_policy(tmp_path / "later", str(folder), earlier=[{"data": str(tuesday)}])
    for checkpoint in (both, later):
        out = nanochat("eval", checkpoint, tuesday, "--json", tmp_path / "a.json").out
        result = json.loads((tmp_path / "a.json").read_text())
        assert (result["split"], result["episodes"]) == ("val", 1) and NEAREST in result["rows"]
        assert "the part that training held out" in " ".join(out.split())
        assert "was trained on these" in nanochat("eval", checkpoint, tuesday, "--split", "all").out


AGENT = SimpleNamespace(metadata={"cameras": [], "image_size": SIZE})


@pytest.mark.parametrize("evaluated", ["monday", "tuesday", "other"])
@pytest.mark.parametrize("with_pictures", [False, True])
def test_the_baselines_learn_from_all_folders_of_the_run(folder, tuesday, tmp_path, evaluated, with_pictures):
    recipe = {"data": str(folder), "also": [str(tuesday)]}
    write_dataset(tmp_path / "other", (arm_episode(n) for n in range(2)), 10, "arm", (SIZE, SIZE, 3))
    source = open_demonstrations({"monday": folder, "tuesday": tuesday}.get(evaluated, tmp_path / "other"))
    known = learnt_from(AGENT, source, recipe, with_pictures)
    parts = [open_demonstrations(each).read("fit", SIZE) for each in (folder, tuesday)]
    assert np.array_equal(known.action, np.concatenate([part.action for part in parts]))
    assert [*parts[0].names, *parts[1].names] == known.names
    assert bool(known.cameras) is (with_pictures and evaluated != "other")
    if known.cameras:
        shown = np.concatenate([part.images(range(len(part))) for part in parts])
        assert np.array_equal(known.images(np.arange(len(known))), shown)


def test_baselines_of_a_part_of_the_training_data_are_left_out(folder, capsys):
    recipe = {"data": str(folder), "also": ["wednesday"]}
    assert learnt_from(AGENT, open_demonstrations(folder), recipe, False) is None
    assert "need the training data: wednesday must be" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_without_a_recipe_did_not_learn_from_the_current_folder(folder, tuesday, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert learnt_from(AGENT, open_demonstrations(tuesday), {}, False) is None
    assert "the checkpoint does not name it" in " ".join(capsys.readouterr().out.split())


def test_a_run_on_a_recording_leads_to_the_report():
    task = SimpleNamespace(val=arm_data(0), recipe=Robot(data="my arm"))
    commands = RobotTask.next_commands(task, Path("runs/a"))
    assert commands == ["nanochat eval runs/a 'my arm'", "nanochat policy-server runs/a"]


def test_data_of_another_robot_is_refused_before_it_is_decoded(nanochat, folder, tmp_path):
    tokenizer = make_tokenizer(["lift"], 500)
    save_checkpoint(tmp_path / "c", make_policy(tokenizer, 6, SIZE), tokenizer, {})
    out, err = nanochat("eval", tmp_path / "c", folder, code=2)
    assert "states of 6 numbers, but this data has 4" in err and "reading" not in out + err


def test_a_model_that_cannot_act_and_a_plot_of_pictures_are_refused(nanochat, folder, tmp_path):
    assert "without an action head" in nanochat("eval", "shapes", folder, code=2).err
    assert (
        "--plot draws a robot's actions"
        in nanochat("eval", "shapes", "easy_vqa", "--plot", tmp_path / "a.png", code=2).err
    )


def test_frames_of_bridge_data_are_told_from_other_rows(tmp_path):
    for name, row in {
        "bridge": {"image": "0.png", "action": [0] * 7},
        "vqa": {"image": "0.png", "question": "?"},
    }.items():
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "frames.jsonl", row)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/frames.jsonl").write_text("{")
    found = [name for name in ("bridge", "vqa", "broken", "none") if is_recording(str(tmp_path / name))]
    assert found == ["bridge"]


def test_numbers_are_read_without_pictures(folder):
    data = open_demonstrations(folder).read_numbers("val")
    assert len(data) == 24 and data.cameras == () and data.names_of["action"] == ["base", "elbow", "wrist", "jaw"]
