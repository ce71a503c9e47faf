"""Questions about recorded camera pictures: the scores, the control conditions, and the command from a checkpoint on."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.checkpoint import save_checkpoint
from nanochat.data.lerobot import Episode
from nanochat.data.lerobot_writer import write_dataset
from nanochat.errors import UserError
from nanochat.evaluation.questions import answer_questions, balanced, evaluate_questions, open_source, score, table
from nanochat.gpt import GPT, GPTConfig
from nanochat.metaworld.instructions import INSTRUCTIONS
from nanochat.metaworld.scene import Question
from nanochat.tokenizer import Tokenizer
from tests.data_files import demonstrations
from tests.tiny_policy import make_policy, make_tokenizer

SIZE = 32


def grey(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def toy_episode(number: int, length: int = 6) -> Episode:
    """Frame t of the episode is a picture of the grey 10 * number + t."""
    rng = np.random.default_rng(number)
    task = ("reach", "push")[number % 2]
    columns = {
        "observation.state": rng.uniform(0, 1, (length, 4)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        "observation.environment_state": np.tile(rng.uniform(0, 0.6, 39), (length, 1)).astype(np.float32),
        "observation.success": np.arange(length) >= length - 2,
        "observation.held": np.zeros(length, bool),
    }
    pictures = [grey((10 * number + t) % 256) for t in range(length)]
    return Episode(INSTRUCTIONS[task][0], columns, {"observation.images.camera": pictures}, {"name": task})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "demos"
    write_dataset(path, (toy_episode(n) for n in range(60)), 10, "toy", (SIZE, SIZE, 3))
    return path


def save_policy(path, recipe, earlier=()) -> str:
    tokenizer = make_tokenizer([text for texts in INSTRUCTIONS.values() for text in texts], 600)
    save_checkpoint(
        path,
        make_policy(tokenizer, image_size=SIZE, sequence_len=160),
        tokenizer,
        {"recipe": recipe, "earlier": list(earlier)},
    )
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("run") / "c", {"data": str(folder)})


def evaluate(checkpoint, folder, split="all", n_frames=8, batch_size=16, json_out=None):
    return evaluate_questions(
        checkpoint, str(folder), split, n_frames=n_frames, batch_size=batch_size, json_out=json_out
    )


# ---- conditions ----


class GreyAgent:
    """Answers with the greys that it sees; without a picture 0."""

    def look(self, images):
        return torch.stack([torch.full((2, 3), float(image[0, 0, 0])) for image in images])

    def answer_all(self, conversations, vectors, max_new_tokens):
        shown = [sum(part["type"] == "image" for part in messages[0]["content"]) for messages in conversations]
        assert shown == [len(v) for v in vectors]
        return [" ".join(f"{v[0, 0].item():.0f}" for v in own) for own in vectors]


def ask_greys(n_episodes, batch_size):
    data = demonstrations([toy_episode(n + 1) for n in range(n_episodes)], SIZE)
    asked = [([frame], Question("task", "?", "!")) for frame in range(len(data))]
    asked += [([frame - 1, frame], Question("change", "?", "!", 2)) for frame in range(1, 6)]
    answers = answer_questions(GreyAgent(), data, asked, batch_size)
    return {condition: [list(map(int, a.split())) for a in found] for condition, found in answers.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_shuffled_shows_another_episode_whatever_the_batch(batch_size):
    """Fails if pictures are exchanged inside an episode, or inside a batch: most batches of 4 are of one episode."""
    answers = ask_greys(5, batch_size)
    assert answers["aligned"][:7] == [[10], [11], [12], [13], [14], [15], [20]]
    assert answers["aligned"][30:] == [[10 + t, 11 + t] for t in range(5)]
    for own, other in zip(answers["aligned"], answers["shuffled"], strict=True):
        episode, partners = own[0] // 10, {grey // 10 for grey in other}
        assert len(own) == len(other) and len(partners) == 1 and episode not in partners
        assert [grey % 10 for grey in own] == [grey % 10 for grey in other]  # the same position in the other episode
    assert {grey for found in answers["blind"] for grey in found} == {0}
    assert answers == ask_greys(5, 7)


def test_one_episode_has_no_shuffled_condition():
    answers = ask_greys(1, 4)
    assert answers.keys() == {"aligned", "blind"}
    questions = [Question("task", "?", "yes")] * 11
    result = score(questions, [0] * 11, {name: ["yes"] * 11 for name in answers})
    assert result["task"]["shuffled"] is None and result["task"]["balanced"]["shuffled"] is None
    cells = {column.header: list(column.cells) for column in table(result, 6, 1).columns}
    assert cells["shuf"] == cells["bal\nshuf"] == [""] and cells["right"] == cells["blind"] == ["100.0%"]


# ---- scores ----


def test_balanced_accuracy_of_one_answer_is_a_half():
    truths = ["no"] * 90 + ["yes"] * 10
    assert balanced(truths, [truth == "no" for truth in truths]) == 0.5
    asked = [Question("done", "done?", truth) for truth in truths]
    row = score(asked, list(range(100)), {"aligned": ["no"] * 95 + ["yes"] * 5, "blind": ["no"] * 100})["done"]
    assert row["aligned"] == 0.95 and row["majority"] == 0.9
    assert row["balanced"] == {"aligned": pytest.approx(0.75), "blind": 0.5, "shuffled": None}


def test_intervals_are_over_episodes():
    """Ten equal answers in each of 10 episodes are worth one: the interval is that of 10 answers, not of 100."""
    asked = [Question("done", "done?", "yes")] * 100
    answers = {"aligned": (["yes"] * 10 + ["no"] * 10) * 5}
    low, high = score(asked, [i // 10 for i in range(100)], answers)["done"]["ci95"]
    assert high - low > 0.5
    low, high = score(asked, list(range(100)), answers)["done"]["ci95"]
    assert high - low < 0.25


# ---- from a checkpoint on ----


def test_only_held_out_episodes_are_asked_about(checkpoint, folder, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    found = evaluate(checkpoint, folder, "val", 200, json_out=figures)
    assert json.loads(figures.read_text()) == found
    # 2 episodes of 6 frames are held out, one of each task, and no frame is asked about twice
    assert 8 < found["task"]["n"] <= 2 * 6
    for row in found.values():
        assert {"n", "aligned", "shuffled", "blind", "majority", "ci95", "balanced"} == row.keys()
        assert 0 <= row["ci95"][0] <= row["aligned"] <= row["ci95"][1] <= 1
    assert "was trained on" not in capsys.readouterr().out
    evaluate(checkpoint, folder, "all")
    assert "was trained on these episodes" in capsys.readouterr().out
    assert evaluate(checkpoint, folder, None, 200).keys() == found.keys()
    text = " ".join(capsys.readouterr().out.split())
    assert "split val, the part that training held out" in text and "was trained on" not in text
    with pytest.raises(UserError, match="no split 'vall'; demonstrations have: all, fit, val"):
        evaluate(checkpoint, folder, "vall")


def test_every_folder_of_every_run_was_trained_on(folder, tmp_path, capsys):
    there, name = {"data": str(tmp_path / "other")}, str(folder)
    assert open_source(name, None, there)[1] == "all"
    also = there | {"also": [name]}
    for recipe, earlier in ((also, ()), (there, [{"data": name}]), (there, [there, also])):
        capsys.readouterr()
        assert open_source(name, None, recipe, earlier=earlier)[1] == "val"
        open_source(name, "fit", recipe, earlier=earlier)
        text = " ".join(capsys.readouterr().out.split())
        assert "split val, the part that training held out" in text and "was trained on these episodes" in text
    evaluate(save_policy(tmp_path / "run", there, [{"data": name}]), folder, None)
    assert "split val, the part that training held out" in " ".join(capsys.readouterr().out.split())


def test_pictures_are_of_the_camera_that_was_trained_with(tmp_path, capsys):
    episodes = [toy_episode(n + 1) for n in range(4)]
    for episode in episodes:
        (pictures,) = episode.images.values()
        episode.images = {"observation.images.dark": [grey(0)] * 6, "observation.images.toy": pictures}
    write_dataset(tmp_path / "two", episodes, 10, "toy", (SIZE, SIZE, 3))
    recipe = dict(data=str(tmp_path / "two"), camera="observation.images.toy")
    data = open_source(str(tmp_path / "two"), "all", recipe)[0].read("all", SIZE)
    assert data.images(range(6))[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 14, 15]
    data = open_source(str(tmp_path / "two"), "all", {})[0].read("all", SIZE)
    assert data.images(range(6)).max() == 0
    capsys.readouterr()
    evaluate(save_policy(tmp_path / "run", recipe), tmp_path / "two", n_frames=4)
    assert "camera observation.images.toy; the data also has observation.images.dark" in capsys.readouterr().out


def test_text_models_are_refused(folder, tmp_path):
    tokenizer = Tokenizer.train(["open the door"], 300)
    config = GPTConfig(sequence_len=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    save_checkpoint(tmp_path / "text", GPT(config), tokenizer, {})
    with pytest.raises(ValueError, match="text model and cannot see"):
        evaluate(str(tmp_path / "text"), folder)


def test_data_without_the_simulators_state_is_refused(checkpoint, tmp_path):
    episodes = [toy_episode(n) for n in range(3)]
    for episode in episodes:
        del episode.columns["observation.environment_state"]
    write_dataset(tmp_path / "real", episodes, 10, "toy", (SIZE, SIZE, 3))
    with pytest.raises(ValueError, match="no simulator state.*nanochat record"):
        evaluate(checkpoint, tmp_path / "real")
