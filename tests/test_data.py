"""Every source yields the same samples; bad rows are named, missing pictures counted, nothing is lost in between."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanochat.data import (
    CAPTION_PROMPT,
    DataError,
    image_key,
    jsonl,
    limit,
    load_dataset,
    one_per_reference,
)
from nanochat.data import easy_vqa as easy_vqa_source
from nanochat.data.image_files import find_image
from nanochat.data.sample import caption_sample, check_text, vqa_sample
from nanochat.data.splits import cut
from tests.conftest import REAL_DATA, needs_data
from tests.data_files import png, write_lines, write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path)


def vqa_rows(n=20, each=2):
    return [
        {"image": f"images/{i}.png", "question": f"what is {i}?", "answer": f"{j}"}
        for i in range(n)
        for j in range(each)
    ]


# ---- samples ----


def test_vqa_sample_has_the_common_form():
    sample = vqa_sample("a.png", "What colour?", "red")
    assert sample.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": "red"},
    )
    assert (sample.images, sample.references) == (("a.png",), ("red",))
    assert (sample.question, sample.answer) == ("What colour?", "red")


def test_one_per_reference_trains_on_every_caption():
    sample = caption_sample("a.png", ["one", "two", "three"])
    assert sample.answer == "one" and sample.question == CAPTION_PROMPT
    expanded = one_per_reference([sample])
    assert [s.answer for s in expanded] == ["one", "two", "three"]
    assert all(s.references == ("one", "two", "three") and s.question == CAPTION_PROMPT for s in expanded)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3))
def test_limit_is_a_seeded_subset_in_order(total, n, seed):
    samples = list(range(total))
    chosen = limit(samples, n, seed)
    assert len(chosen) == min(n, total) and chosen == sorted(set(chosen)) and chosen == limit(samples, n, seed)


def test_limit_draws_at_random_and_refuses_zero():
    assert limit(range(1000), 10, seed=0) != limit(range(1000), 10, seed=1)
    assert max(limit(range(1000), 10)) > 500  # not simply the first ten
    with pytest.raises(ValueError, match="at least 1, got 0"):
        limit([1], 0)


def test_image_key_is_the_same_for_the_same_picture_only():
    red, blue = png(), png((0, 0, 255))
    assert image_key(red) == image_key({"bytes": red, "path": "x"}) != image_key(blue)
    assert image_key("a/b.png") == image_key(Path("a/b.png")) == image_key({"bytes": None, "path": "a/b.png"})
    opened = [Image.open(io.BytesIO(data)) for data in (red, red, blue)]
    assert image_key(opened[0]) == image_key(opened[1]) != image_key(opened[2])
    zeros = np.zeros((4, 4, 3), np.uint8)
    assert image_key(zeros) == image_key(zeros.copy()) != image_key(zeros + 1) != image_key(zeros.reshape(2, 8, 3))
    assert image_key(torch.zeros(3, 4, 4)) != image_key(torch.ones(3, 4, 4, dtype=torch.bfloat16))


def test_cut_is_by_image_complete_and_independent_of_order_and_place(tmp_path):
    def samples(root):
        return [vqa_sample(root / f"{i}.png", str(j), "yes") for i in range(50) for j in range(3)]

    here = samples(tmp_path / "a")
    fit, val = cut(here, "fit", tmp_path / "a"), cut(here, "val", tmp_path / "a")
    assert len(val) == 5 * 3 and len(fit) == 45 * 3
    names = [{sample.images[0].name for sample in part} for part in (fit, val)]
    assert not names[0] & names[1]
    moved = cut(samples(tmp_path / "b")[::-1], "val", tmp_path / "b")
    assert {sample.images[0].name for sample in moved} == names[1]
    assert cut(here, None, tmp_path) == here


# ---- names of pictures ----


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", "", " ", None, 3, ["a.png"], {"a": 1}, "\ud800.png"],
)
def test_image_names_that_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="^rows:7: "):
        find_image(tmp_path, name, "rows:7", strict=False)


@given(st.text(max_size=300))
def test_no_image_name_leads_out_of_the_folder(name):
    folder = Path(__file__).parent
    try:
        path = find_image(folder, name, "x", strict=False)
    except DataError:
        return
    assert path is None or path.resolve().is_relative_to(folder.resolve())


@pytest.mark.parametrize("name", ["none.png", "images", "a" * 5000, "nul\0.png"])
def test_missing_pictures_are_none_or_refused_when_strict(pictures, name):
    assert find_image(pictures, name, "x:1", strict=False) is None
    with pytest.raises(DataError, match="x:1: the image .* does not exist"):
        find_image(pictures, name, "x:1", strict=True)


def test_dots_inside_the_folder_are_fine(pictures):
    assert find_image(pictures, "./images/../images/3.png", "x", strict=True) == pictures / "images/3.png"


@pytest.mark.parametrize("value", ["", "  \n", None, 1, [], "\udfff"])
def test_texts_that_are_refused(value):
    with pytest.raises(DataError, match="f:1: 'answer'"):
        check_text(value, "answer", "f:1")


# ---- JSON lines ----


def test_jsonl_questions(pictures):
    file = write_lines(pictures / "train.jsonl", *vqa_rows())
    data = load_dataset(file)
    assert (data.task, len(data.samples), data.skipped) == ("vqa", 40, 0)
    assert data.samples[3].images == (pictures / "images/1.png",)
    assert (data.samples[3].question, data.samples[3].answer) == ("what is 1?", "1")
    assert load_dataset(str(pictures)).samples == data.samples


def test_jsonl_captions(pictures):
    rows = [{"image": "images/0.png", "captions": [" A dog . ", "Dog"]}, {"image": "images/1.png", "caption": "A cat"}]
    data = load_dataset(write_lines(pictures / "dev.jsonl", *rows), "dev")
    assert data.task == "caption"
    assert [sample.references for sample in data.samples] == [("A dog .", "Dog"), ("A cat",)]


def test_jsonl_splits_of_a_folder(pictures):
    write_lines(pictures / "train.jsonl", *vqa_rows())
    train, fit, val = (load_dataset(pictures, split).samples for split in ("train", "fit", "val"))
    assert len(val) == 4 and len(fit) == 36  # a tenth of 20 images, two questions each
    assert sorted(map(repr, fit + val)) == sorted(map(repr, train))
    with pytest.raises(DataError, match="no split 'test'; it has: train, and fit and val from train"):
        load_dataset(pictures, "test")
    write_lines(pictures / "val.jsonl", *vqa_rows(3))
    assert len(load_dataset(pictures, "val").samples) == 6
    assert len(load_dataset(pictures, "fit").samples) == 40


def test_jsonl_file_is_read_whole_unless_cut(pictures):
    file = write_lines(pictures / "held_back.jsonl", *vqa_rows())
    sizes = {split: len(jsonl.load(file, split).samples) for split in (None, "all", "held_back", "fit", "val")}
    assert sizes == {None: 40, "all": 40, "held_back": 40, "fit": 36, "val": 4}
    assert len(jsonl.load(file.rename(pictures / "val.jsonl"), "val").samples) == 40


def test_jsonl_missing_pictures_are_counted_or_refused(pictures):
    rows = vqa_rows(2, 1)
    rows.insert(1, {"image": "images/gone.png", "question": "q", "answer": "a"})
    file = write_lines(pictures / "train.jsonl", *rows)
    data = load_dataset(file)
    assert (len(data.samples), data.skipped) == (2, 1)
    with pytest.raises(DataError, match=r"train.jsonl:2: the image .*gone.png does not exist"):
        load_dataset(file, strict=True)
    with pytest.raises(
        DataError, match="no usable rows: 1 row left out: their picture is missing .first: .*gone.jsonl:1"
    ):
        load_dataset(write_lines(pictures / "gone.jsonl", rows[1]))


BAD_LINES = [
    '{"image": "images/0.png", "question": "q", "ans',
    "[1, 2]",
    "null",
    "[" * 100_000,
    '{"image": "images/0.png"}',
    "{}",
    '{"question": "q", "answer": "a"}',
    '{"image": "images/0.png", "question": "q"}',
    '{"image": "images/0.png", "question": "q", "answer": ""}',
    '{"image": "images/0.png", "question": "q", "answer": 3}',
    '{"image": "images/0.png", "question": ["q"], "answer": "a"}',
    '{"image": "images/0.png", "question": "q", "answer": "\\ud800"}',
    '{"image": "../images/0.png", "question": "q", "answer": "a"}',
    '{"image": "/etc/passwd", "question": "q", "answer": "a"}',
    '{"image": "images/0.png", "captions": []}',
    '{"image": "images/0.png", "captions": ["a", " "]}',
    '{"image": "images/0.png", "captions": {"a": 1}}',
    '{"image": "images/0.png", "captions": ["a caption among questions"]}',
    '{"image": "gone.png", "question": "q"}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_jsonl_malformed_rows_are_named(pictures, line):
    good = json.dumps(vqa_rows()[0])
    file = pictures / "train.jsonl"
    file.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl:3: ") as caught:
        load_dataset(file)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_jsonl_encoding(pictures):
    row = json.dumps({"image": "images/0.png", "question": "was ist\u2028grün?", "answer": "日本"}, ensure_ascii=False)
    file = pictures / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    assert load_dataset(file).samples[0].answer == "日本"
    file.write_bytes(row.encode() + b'\n{"image": "\xff"}\n')
    with pytest.raises(DataError, match="train.jsonl:2: expected a JSON object: .*utf-8"):
        load_dataset(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="no usable rows"):
        load_dataset(file)


# ---- easy-VQA ----


def test_easy_vqa_splits():
    pytest.importorskip("easy_vqa")
    parts = {split: load_dataset("easy_vqa", split) for split in ("train", "fit", "val", "test")}
    assert len(parts["test"].samples) == 9_673  # its published number
    images = {split: {sample.images[0] for sample in data.samples} for split, data in parts.items()}
    assert [len(images[split]) for split in parts] == [4000, 3600, 400, 1000]
    assert images["fit"] | images["val"] == images["train"] and not images["fit"] & images["val"]
    sample = parts["test"].samples[0]
    assert sample.images[0].is_file() and sample.question and sample.references == (sample.answer,)
    with pytest.raises(DataError, match="there is no 'dev'"):
        load_dataset("easy_vqa", "dev")


def test_easy_vqa_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[train\]"'):
        easy_vqa_source.load("train")


# ---- folders ----


def captions_csv(folder, text, encoding="utf-8"):
    (folder / "captions.csv").write_bytes(text.encode(encoding))
    return folder


def test_folder_of_captions(pictures):
    text = 'file,caption\r\nimages/1.png,"A ""red"" dog,\nrunning"\r\nimages/0.png,Grün\r\nimages/1.png,Another\r\n'
    data = load_dataset(captions_csv(pictures, text, "utf-8-sig"))
    assert (data.task, data.skipped) == ("caption", 0)
    assert [s.references for s in data.samples] == [('A "red" dog,\nrunning', "Another"), ("Grün",)]
    assert data.samples[0].images == (pictures / "images/1.png",)


def test_folder_of_questions(pictures):
    rows = "".join(f"images/{i}.png,q,a{i}\n" for i in range(20))
    data = load_dataset(captions_csv(pictures, f"file,question,answer\n{rows}images/gone.png,q,a\n\n"))
    assert (data.task, len(data.samples), data.skipped, data.samples[2].answer) == ("vqa", 20, 1, "a2")
    assert [len(load_dataset(pictures, split).samples) for split in ("fit", "val")] == [18, 2]
    with pytest.raises(DataError, match="captions.csv:22: the image .*gone.png does not exist"):
        load_dataset(pictures, strict=True)


@pytest.mark.parametrize(
    "text,line",
    [
        ("", 1),
        ("images/0.png,a caption\n", 1),
        ("file,caption\nimages/0.png\n", 2),
        ("file,caption\nimages/0.png,a,b\n", 2),
        ("file,caption\nimages/0.png,\n", 2),
        ("file,caption\n../x.png,a\n", 2),
        ('file,caption\nimages/0.png,"a"b\n', 2),
        ('file,caption\nimages/0.png,"never closed\n', 2),
        ("file,caption\nimages/0.png," + "x" * 200_000 + "\n", 2),
        ("file,question,answer\ngone.png,q,\n", 2),
    ],
)
def test_folder_malformed_rows_are_named(pictures, text, line):
    with pytest.raises(DataError, match=f"captions.csv:{line}: "):
        load_dataset(captions_csv(pictures, text))


def test_folder_in_another_encoding(pictures):
    with pytest.raises(DataError, match="not CSV in UTF-8"):
        load_dataset(captions_csv(pictures, "file,caption\nimages/0.png,Grün\n", "latin-1"))


# ---- by name ----


def test_unknown_datasets_say_what_can_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    (tmp_path / "a.zip").write_text("hi")
    for name, reason in (
        ("easyvqa", "there is no such file or folder"),
        (tmp_path / "a.txt", "unknown kind of file"),
        (tmp_path / "a.zip", "an archive: unpack it"),
        (tmp_path / "gone.jsonl", "there is no such file or folder"),
        ("https://example.org/data.json", "URLs are not fetched: download"),
    ):
        with pytest.raises(DataError, match=f"cannot read the dataset .*{reason}.*; readable are: easy_vqa"):
            load_dataset(name)
    with pytest.raises(DataError, match="cannot read the dataset .*: unknown kind of folder"):
        load_dataset(tmp_path)
    (tmp_path / "b.PNG").write_bytes(png())
    with pytest.raises(DataError, match="1 pictures but no text about them: write captions.csv"):
        load_dataset(tmp_path)
    write_lines(tmp_path / "frames.jsonl", *vqa_rows(1))
    with pytest.raises(DataError, match="there is no split 'train'; it has: frames"):
        load_dataset(tmp_path)


# ---- the real thing, where it is ----


@needs_data
def test_daquar():
    train, fit, val = (load_dataset(REAL_DATA / "daquar", split, strict=True) for split in ("train", "fit", "val"))
    assert (train.task, len(train.samples), train.skipped) == ("vqa", 6795, 0)
    assert len({image_key(sample.images[0]) for sample in val.samples}) == 79
    assert len(fit.samples) + len(val.samples) == 6795


@needs_data
def test_flickr8k():
    dev = load_dataset(REAL_DATA / "flickr8k", "dev", strict=True)
    assert (dev.task, len(dev.samples)) == ("caption", 1000)
    assert all(len(sample.references) == 5 for sample in dev.samples)


def test_long_names_of_fields_are_quoted_in_part(tmp_path):
    with pytest.raises(DataError, match="found the fields") as error:
        load_dataset(write_lines(tmp_path / "a.jsonl", {"x" * 100_000: 1, "image": "a.png"}))
    assert len(str(error.value)) < 600
