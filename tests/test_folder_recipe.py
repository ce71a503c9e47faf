"""nanochat train folder: it starts from `photos`, unless a flag asks for random weights."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from nanochat.checkpoint import CheckpointError, load_checkpoint
from nanochat.cli.main import train
from nanochat.errors import UserError
from nanochat.training.folder import folder_from_photos, other_shape
from nanochat.training.recipes import Folder, Photos
from nanochat.training.run import Run


@pytest.fixture
def parsed(monkeypatch):
    """A function: words of the command line -> the recipe that would be trained."""
    started = []

    class Recorded:
        def __init__(self, recipe):
            started.append(recipe)

        def train(self):
            pass

    monkeypatch.setattr("nanochat.training.run.Run", Recorded)

    def parse(*words):
        train(["folder", "--data", "d", *words])
        return started[-1]

    return parse


def changed(recipe: Folder, default: Folder) -> dict:
    return {k: v for k, v in asdict(recipe).items() if v != asdict(default)[k]}


def test_it_starts_from_photos(parsed, capsys):
    assert changed(parsed(), folder_from_photos()) == {"data": "d"}
    recipe = parsed("--train-encoder", "--encoder-lr", "1e-4", "--dropout", "0", "--steps", "7")
    expected = {"data": "d", "train_encoder": True, "encoder_lr": 1e-4, "dropout": 0.0, "steps": 7}
    assert changed(recipe, folder_from_photos()) == expected
    assert parsed("--start-from", "runs/mine").start_from == "runs/mine"
    assert capsys.readouterr().err == ""


def test_nothing_of_random_weights_spoils_a_trained_model():
    recipe = folder_from_photos()
    assert (
        not recipe.train_encoder
        and recipe.batchnorm == "frozen"
        and recipe.word_loss == 0
        and recipe.decoder_gradient == 1
    )
    assert recipe.encoder_lr < Folder().encoder_lr and recipe.dropout == Photos().dropout


@pytest.mark.parametrize("none", ["none", ""])
def test_random_weights_have_their_own_defaults(parsed, none, capsys):
    assert changed(parsed("--start-from", none), Folder()) == {"data": "d"}
    assert changed(parsed("--start-from", none, "--n-layer", "2", "--train-encoder"), Folder()) == {
        "data": "d",
        "n_layer": 2,
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--encoder", "yolov9t.pt", "--layer", "p4"], {"encoder": "yolov9t.pt", "layer": "p4"}),
        (["--n-layer", "2"], {"n_layer": 2}),
        (["--tokenizer", "t.json"], {"tokenizer": "t.json"}),
        (["--sequence-len", "64", "--dropout", "0.1"], {"sequence_len": 64, "dropout": 0.1}),
    ],
)
def test_another_shape_asks_for_random_weights(parsed, capsys, words, fields):
    assert changed(parsed(*words), Folder()) == {"data": "d"} | fields
    note = capsys.readouterr().err
    assert note.startswith("note: the model starts from random weights") and note.count("\n") == 1
    assert (
        all(word in note for word in words if word.startswith("--") and word != "--dropout") and "--dropout" not in note
    )
    assert other_shape(Folder(**fields)) == [name for name in fields if name != "dropout"]


def test_a_shape_does_not_replace_another_checkpoint(parsed):
    """As everywhere, the shape of a checkpoint that is named replaces the fields for it."""
    assert parsed("--start-from", "runs/mine", "--n-layer", "2").start_from == "runs/mine"


def test_none_means_random_weights_in_every_recipe():
    assert Photos(start_from="none").start_from == "" == Photos().start_from


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve pictures in two colours, each with its caption."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["file,caption"]
    for number in range(12):
        noise = rng.integers(0, 60, (40, 50, 3))
        noise[..., number % 2] += 190
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a wall of {('crimson', 'emerald')[number % 2]} bricks")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def test_few_pictures_teach_photos_new_words(pictures, tmp_path, capsys):
    words = "--steps 6 --images-per-step 6 --warmup-steps 1 --threads 1 --flip none --eval-every 6".split()
    words += "--matrix-lr 0.01 --embedding-lr 5e-3 --head-lr 1e-3".split()  # higher ones, for so few steps
    train(["folder", "--data", str(pictures), "--out", str(tmp_path / "mine"), *words])
    printed = capsys.readouterr().out
    assert "starting from the checkpoint photos" in printed
    before, after = load_checkpoint("photos"), load_checkpoint(tmp_path / "mine")
    assert before[0].config == after[0].config and before[1].to_json() == after[1].to_json()
    moved = {
        name for name, new in after[0].state_dict().items() if not new.equal(before[0].state_dict()[name])
    }  # fmt: skip
    assert moved and not any(name.startswith("vision_encoder.") for name in moved)
    checks = [line["aligned"] for line in after[2]["history"] if "aligned" in line]
    assert checks[-1] < checks[0] - 1
    assert after[2]["recipe"]["start_from"] == "photos" and len(after[2]["earlier"]) == len(before[2]["earlier"]) + 1
    assert after[2]["images"] == max(1, before[2].get("images", 1)) and after[2]["learnt"]["questions"]


def test_a_text_that_does_not_fit_and_a_checkpoint_that_is_not_there(pictures, tmp_path):
    recipe = folder_from_photos()
    recipe.data, recipe.out = str(pictures), str(tmp_path / "run")
    recipe.start_from = str(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no such folder"):
        Run(recipe)
    assert isinstance(CheckpointError("x"), UserError) and not (tmp_path / "run").exists()
