"""What a user sees of the data when training and evaluating: notes, the held-out part, errors that name the row."""

import json
from pathlib import Path

import pytest

from nanochat.data import DataError, load_dataset
from nanochat.errors import UserError
from nanochat.evaluation.pictures import evaluate_dataset
from nanochat.training.batches import Rows
from nanochat.training.pictures import PictureTask
from nanochat.training.recipes import Folder
from nanochat.training.run import Run
from tests.data_files import png, write_lines, write_pictures

SMALL = dict(
    encoder="yolov9t.yaml", layer="2", image_size=32, vision_tokens=1, vocab_size=280, n_layer=1, n_head=2, n_embd=32,
    sequence_len=48, images_per_step=8, steps=2, eval_every=1000, save_every=1000, device="cpu", word_loss=0.0,
)  # fmt: skip


def turn(question, answer, *images):
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return row | ({"image": list(images)} if images else {})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows with no, one and two pictures, a video and a missing picture; and a model that was trained on them."""
    folder = write_pictures(tmp_path_factory.mktemp("mixed"))
    rows = [turn("<image>\nWhat?", f"a{i % 2}", f"images/{i}.png") for i in range(12)]
    rows += [turn("<image><image> Same?", "no", f"images/{i}.png", f"images/{i + 1}.png") for i in range(12, 20, 2)]
    rows += [turn("Say hello", "hello"), {**turn("<video>What?", "x"), "video": "a.mp4"}]
    rows += [turn("<image>What?", "x", "images/gone.png")]
    (folder / "mixed.json").write_text(json.dumps([row | {"id": i} for i, row in enumerate(rows)]))
    out = Run(Folder(**SMALL, data=str(folder / "mixed.json"), out=str(folder / "run"))).train()
    return folder, out


def run_eval(out, data, split=None, json_out=None):
    return evaluate_dataset(str(out), str(data), split, json_out=json_out, batch_size=8)


def test_eval_of_mixed_rows_takes_what_it_can_and_says_the_rest(mixed, capsys):
    folder, out = mixed
    result = run_eval(out, folder / "mixed.json", "all")
    text = capsys.readouterr().out
    assert (result["n"], result["n_images"], result["without_picture"], result["skipped"]) == (16, 20, 1, 2)
    for note in (
        "fields read: conversations, image; not read: id, video", "1 row left out: they have a video, which is not read",
        "1 row left out: their picture is missing (first: ", "1 of 17 samples have no picture: not evaluated",
        "4 samples have several pictures", "of these 20 pictures are training pictures",
    ):  # fmt: skip
        assert note in text, note


def test_eval_of_the_own_data_takes_the_held_out_part(mixed, capsys):
    folder, out = mixed
    result = run_eval(out, folder / "mixed.json")
    text = capsys.readouterr().out
    assert result["split"] == "val" and result["training_pictures"] == 0 and result["n_images"] == 2
    assert "split val, the part that training held out" in text and "training pictures" not in text
    with pytest.raises(DataError, match="no split 'vall'; it has: all, and fit and val"):
        run_eval(out, folder / "mixed.json", "vall")


def test_eval_of_text_alone_is_refused(mixed):
    folder, out = mixed
    (folder / "text.json").write_text(json.dumps([turn("Say hello", "hello")]))
    with pytest.raises(UserError, match="none of the 1 samples has a picture"):
        run_eval(out, folder / "text.json")


def test_training_says_what_is_read_and_left_out(mixed, capsys):
    folder, _ = mixed
    PictureTask(Folder(**SMALL, data=str(folder / "mixed.json"), out=str(folder / "other")))
    text = capsys.readouterr().out
    assert text.count("fields read: conversations, image; not read: id, video") == 1
    assert text.count("1 row left out: they have a video") == text.count("their picture is missing") == 1


def test_validation_exchanges_no_pictures_of_one_row(mixed):
    folder, out = mixed
    from nanochat.checkpoint import load_checkpoint

    model, tokenizer, _ = load_checkpoint(out)
    rows = Rows(load_dataset(folder / "mixed.json").samples, tokenizer, model.config)
    assert len(rows.images) == len(rows.image_groups) == len(rows.image_rows) == 20
    assert len(set(rows.image_groups)) == 16 and rows.image_groups[12] == rows.image_groups[13]
    assert rows.image_rows[13] == f"{folder / 'mixed.json'}: row 12"


@pytest.mark.parametrize("train_encoder", [True, False])
def test_a_damaged_picture_in_a_row_is_named(tmp_path, train_encoder):
    import pyarrow as pa
    import pyarrow.parquet

    images = [png((i, 0, 0)) for i in range(6)]
    images[4] = images[4][:40]
    table = pa.table({"image": images, "question": ["q"] * 6, "answer": ["a"] * 6})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    recipe = Folder(**SMALL, train_encoder=train_encoder, data=str(tmp_path / "a.parquet"), out=str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"a.parquet: row 4: the image bytes"):
        Run(recipe).train()


@pytest.mark.parametrize("kind", ["captions.csv", "a.jsonl", "a.json"])
def test_a_text_that_is_too_long_is_named(tmp_path, kind):
    folder, text = write_pictures(tmp_path), "word " * 200
    rows = [{"file": f"images/{i}.png", "caption": "short"} for i in range(20)]
    rows.insert(7, {"file": "images/3.png", "caption": text})
    if kind == "captions.csv":
        lines = "".join(f"{row['file']},{row['caption']}\n" for row in rows)
        (folder / kind).write_text(f"file,caption\n{lines}")
    elif kind == "a.json":
        (folder / kind).write_text(json.dumps(rows))
    else:
        write_lines(folder / kind, *rows)
    where = {"captions.csv": "captions.csv:9", "a.jsonl": "a.jsonl:8", "a.json": "a.json: row 7"}[kind]
    with pytest.raises(DataError, match=f"{where}: .*word word"):
        Run(Folder(**SMALL, data=str(folder / kind), out=str(folder / "run"))).train()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pictures(tmp_path, n):
    folder = write_pictures(tmp_path)
    (folder / "captions.csv").write_text("file,caption\n" + "images/1.png,a\nimages/1.png,b\n" * n)
    with pytest.raises(DataError, match=["no usable rows: there are none", "found 1 usable picture, .* at least 2"][n]):
        PictureTask(Folder(**SMALL, data=str(folder), out=str(folder / "run")))


def test_extensions_of_encoders_are_case_blind(tmp_path):
    import ultralytics

    from nanochat.vision.encoder import open_encoder

    text = (Path(ultralytics.__file__).parent / "cfg/models/v9/yolov9t.yaml").read_text()
    (tmp_path / "MINE.YAML").write_text(text)
    assert open_encoder(str(tmp_path / "MINE.YAML"), image_size=64).channels("p3") == 64
