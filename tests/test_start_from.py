"""benchmarks/start_from.py: the pictures that it chooses, its rows, and that it resumes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanochat.data import load_dataset
from nanochat.errors import UserError
from nanochat.training.recipes import Folder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import start_from

SMALL = Folder(
    encoder="yolov9t.yaml", layer="2", image_size=32, vision_tokens=1, n_layer=1, n_head=2, n_embd=32, sequence_len=32,
    images_per_step=2, warmup_steps=1, device="cpu",
)  # fmt: skip


@pytest.fixture
def args(tmp_path):
    """Ten pictures, each with two questions."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(10):
        Image.new("RGB", (40, 30), (25 * number, 0, 0)).save(folder / f"{number}.png")
        rows += [{"image": f"{number}.png", "question": f"question {i}?", "answer": f"{number} {i}"} for i in range(2)]
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return start_from.Args(data=str(folder), pictures=4, test=3, steps=1, threads=1, device="cpu", out=tmp_path / "out")


@pytest.fixture
def rows(monkeypatch):
    """The rows with models that cost nothing: one is not trained, one is."""
    monkeypatch.setattr(start_from, "ROWS", {"photos": None, "random weights": SMALL})
    scored, run = [], start_from.evaluate_dataset

    def evaluate(checkpoint, *words, **options):
        scored.append(checkpoint)
        return run("shapes" if checkpoint == "photos" else checkpoint, *words, **options)

    monkeypatch.setattr(start_from, "evaluate_dataset", evaluate)
    return scored


def test_the_mean_is_that_of_photos_and_what_it_became(args, rows, monkeypatch):
    averaged = []
    monkeypatch.setattr(start_from, "ROWS", {"photos": None, "from photos": SMALL, start_from.MEAN: None})
    monkeypatch.setattr(start_from, "average_checkpoints", lambda *words: averaged.append(words))
    evaluate = start_from.evaluate_dataset
    monkeypatch.setattr(
        start_from, "evaluate_dataset",
        lambda checkpoint, *words, **options: evaluate("photos" if "mean" in checkpoint else checkpoint, *words, **options),
    )  # fmt: skip
    start_from.main(args)
    assert averaged == [(["photos", str(args.out / "from-photos")], args.out / "mean-of-both")]
    found = json.loads((args.out / "mean-of-both.json").read_text())
    assert found["row"] == "mean of both" and "minutes" not in found and found["accuracy"]["aligned"] == 0


def test_pictures_to_train_on_and_to_score_are_others(args):
    start_from.write_pictures(args, args.out / "pictures")
    parts = [load_dataset(str(args.out / "pictures"), split) for split in ("train", "val")]
    assert [len(part.samples) for part in parts] == [8, 6]
    shown = [{np.asarray(Image.open(sample.images[0]))[0, 0, 0] for sample in part.samples} for part in parts]
    assert len(shown[0]) == 4 and len(shown[1]) == 3 and not shown[0] & shown[1]
    for part in parts:  # each with its own questions
        for sample in part.samples:
            assert int(sample.answer.split()[0]) * 25 == np.asarray(Image.open(sample.images[0]))[0, 0, 0]
    with pytest.raises(UserError, match="has 10 pictures in val, expected 12 or more"):
        start_from.write_pictures(replace(args, test=8), args.out / "more")


def test_a_table_with_controls_and_no_row_twice(args, rows, capsys):
    start_from.main(args)
    first = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table[0].startswith("| start | steps | minutes | accuracy | 95 % | shuffled | blind |") and len(table) == 4
    assert table[2].startswith("| photos | - | - | **") and table[3].startswith("| random weights | 1 |")
    assert rows == ["photos", str(args.out / "random-weights")]
    (args.out / "photos.json").unlink()
    start_from.main(args)
    assert rows[2:] == ["photos"]  # only what is missing
    assert [line.split("|")[1:6] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-1] == [
        *table[3].split("|")[1:6]
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "name the data"),
        ({"pictures": 1}, "must be at least 2, got 1 and 3"),
        ({"seed": 5}, "other settings"),
    ],
)
def test_wrong_flags(args, rows, changes, message):
    args.out.mkdir()
    chosen = {name: getattr(args, name) for name in ("data", "split", "pictures", "test", "steps", "seed")}
    (args.out / "settings.json").write_text(json.dumps(chosen))
    with pytest.raises(UserError, match=message):
        start_from.main(replace(args, **changes))
    assert rows == []
