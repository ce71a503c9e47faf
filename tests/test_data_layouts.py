"""The habits of the field: every layout, header and field that is read, or refused by name with the way out."""

import base64
import json
import os

import pytest

from nanochat.data import DataError, image_key, load_dataset, one_per_reference, own_splits, picture_groups
from nanochat.data.sample import Sample, vqa_sample
from nanochat.data.splits import connected, cut
from tests.data_files import png, write_lines, write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path)


def turns(question="<image>What?", answer="red", names=("role", "content"), roles=("user", "assistant")):
    return [{names[0]: roles[0], names[1]: question}, {names[0]: roles[1], names[1]: answer}]


def write_json(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


# ---- rows: the same fields in every kind of file ----

IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}
ROWS = {
    "LLaMA-Factory": {"messages": turns(), "images": ["images/0.png"]},
    "ms-swift, picture without a place": {"messages": turns("What?"), "images": ["images/0.png"]},
    "ShareGPT": {"conversations": turns(names=("from", "value"), roles=("human", "gpt")), "images": ["images/0.png"]},
    "LLaVA": {"conversations": turns(names=("from", "value"), roles=("human", "gpt")), "image": "images/0.png"},
    "TRL": {"messages": turns("What?"), "images": [{"path": "images/0.png"}]},
    "TRL, parts": {"messages": turns([IMAGE, WHAT], [{"type": "text", "text": "red"}]), "images": ["images/0.png"]},
    "TRL, prompt and completion": {"prompt": turns()[:1], "completion": turns()[1:], "images": ["images/0.png"]},
    "Qwen": {"messages": turns([{"type": "image", "image": "images/0.png"}, WHAT])},
    "query and response": {"query": "<image>What?", "response": "red", "images": ["images/0.png"]},
    "Alpaca": {"instruction": "<image>What?", "input": "", "output": "red", "images": ["images/0.png"]},
    "question and answer": {"image": "images/0.png", "question": "What?", "answer": "red"},
    "images, one of them": {"images": ["images/0.png"], "question": "What?", "answer": "red"},
    "images, a text": {"images": "images/0.png", "question": "What?", "answer": "red"},
    "file_name": {"file_name": "images/0.png", "question": "What?", "answer": "red"},
    "image_path, and nulls": {"image_path": "images/0.png", "question": "What?", "answer": "red", "video": None},
    "Windows": {"image": "images\\0.png", "question": "What?", "answer": "red"},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".JSON"])
def test_habits_of_rows(pictures, row, kind):
    file = pictures / f"a{kind}"
    file.write_text(json.dumps(row) if kind == ".jsonl" else json.dumps([row]))
    (sample,) = load_dataset(file).samples
    assert sample == vqa_sample(pictures / "images/0.png", "What?", "red")
    assert sample.where == f"{file}:1" if kind == ".jsonl" else f"{file}: row 0"


def test_a_system_field_comes_before_the_messages(pictures):
    row = {"system": "Be brief.", "messages": turns(), "images": ["images/0.png"]}
    (sample,) = load_dataset(write_lines(pictures / "a.jsonl", row)).samples
    assert sample.messages[0] == {"role": "system", "content": "Be brief."} and len(sample.messages) == 3


def test_several_images_without_a_place_come_first(pictures):
    row = {"messages": turns("Same?"), "images": ["images/0.png", "images/1.png"]}
    data = load_dataset(write_lines(pictures / "a.jsonl", row))
    assert data.samples[0].messages[0]["content"] == [IMAGE, IMAGE, {"type": "text", "text": "Same?"}]
    assert any("1 rows do not say where their pictures stand" in note for note in data.notes)


def test_a_question_about_several_images(pictures):
    row = {"images": ["images/0.png", "images/1.png"], "question": "Same?", "answer": "no"}
    (sample,) = load_dataset(write_lines(pictures / "a.jsonl", row)).samples
    assert sample.messages[0]["content"] == [IMAGE, IMAGE, {"type": "text", "text": "Same?"}] and sample.answer == "no"


def test_a_missing_picture_is_named_with_the_folder(pictures):
    row = {"image": "train2017/0.jpg", "question": "q", "answer": "a"}
    with pytest.raises(DataError, match=f"a.jsonl:1: 'train2017/0.jpg' below {pictures}"):
        load_dataset(write_lines(pictures / "a.jsonl", row))


def test_encoded_images_in_the_rows(pictures):
    text = base64.b64encode(png()).decode()
    rows = [
        {"image": f"data:image/png;base64,{text}", "question": "q", "answer": "a"},
        {"image": text, "question": "q", "answer": "a"},
        {"messages": turns([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}, WHAT])},
    ]
    for row in rows:
        (sample,) = load_dataset(write_lines(pictures / "a.jsonl", row)).samples
        assert sample.images == (png(),)


REFUSED = {
    "a URL": ({"image": "https://x.org/a.png", "question": "q", "answer": "a"}, "URLs are not fetched: download"),
    "a URL in a part": (
        {"messages": turns([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}, WHAT])},
        "URLs",
    ),
    "no base64": ({"image": "data:image/png;base64,@@@", "question": "q", "answer": "a"}, "not valid base64"),
    "a file outside": ({"image": "/etc/hostname", "question": "q", "answer": "a"}, "move the pictures there"),
    "both fields": (
        {"image": "images/0.png", "images": ["images/0.png"], "messages": turns()},
        "both 'image' and 'images'",
    ),
    "no image": ({"question": "q", "answer": "a"}, "found no image in the fields 'question', 'answer'"),
    "null image": ({"image": None, "question": "q", "answer": "a"}, "'image' .null."),
    "a number as image": ({"image": 3, "question": "q", "answer": "a"}, "'image' must be non-empty text, found 3"),
    "no answer": ({"image": "images/0.png", "question": "q"}, "expected the field 'answer', found the fields"),
    "a number as answer": ({"image": "images/0.png", "question": "q", "answer": 3}, "'answer' must be .* found 3"),
    "too many tags": ({"messages": turns("<image><image>?"), "images": ["images/0.png"]}, "2 image parts, .* 1 images"),
    "a tool": ({"messages": turns(roles=("user", "tool")), "images": ["images/0.png"]}, "system, user or assistant"),
    "history": ({"query": "q", "response": "a", "history": [["a", "b"]], "images": ["images/0.png"]}, "'history'"),
    "deep": ({"image": "images/0.png", "question": "q", "answer": None}, "'answer' .null.|expected the field 'answer'"),
}


@pytest.mark.parametrize("row,message", REFUSED.values(), ids=REFUSED)
def test_rows_that_are_refused_say_what_to_do(pictures, row, message):
    good = {"image": "images/1.png", "question": "q", "answer": "a"}
    good = {"messages": turns(), "images": ["images/0.png"]} if "messages" in row or "query" in row else good
    with pytest.raises(DataError, match=f"a.jsonl:2: .*({message})"):
        load_dataset(write_lines(pictures / "a.jsonl", good, row))


@pytest.mark.parametrize("depth", [900, 20_000, 100_000])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_deeply_nested_json(pictures, depth, kind):
    row = '{"image": "images/0.png", "question": "q", "answer": ' + "[" * depth + "]" * depth + "}"
    (pictures / f"a{kind}").write_text(row if kind == ".jsonl" else f"[{row}]")
    with pytest.raises(DataError, match=f"a{kind}:.*(nested|must be non-empty text)"):
        load_dataset(pictures / f"a{kind}")


VIDEOS = [
    {"messages": turns("<video>What?"), "videos": ["a.mp4"]},
    {"conversations": turns("<video>What?", names=("from", "value"), roles=("human", "gpt")), "video": "a.mp4"},
    {"messages": turns([{"type": "video", "video": "a.mp4"}, WHAT])},
    {"messages": turns([{"type": "audio", "audio": "a.wav"}, WHAT])},
]


@pytest.mark.parametrize("row", VIDEOS)
def test_rows_with_a_video_are_left_out_and_counted(pictures, row):
    good = {"messages": turns(), "images": ["images/0.png"], "id": 7, "source": "x"}
    file = write_lines(pictures / "a.jsonl", good, row, row)
    data = load_dataset(file)
    assert (len(data.samples), data.skipped) == (1, 2)
    assert any("2 rows left out: they have a" in n and "not read" in n and "a.jsonl:2" in n for n in data.notes)
    assert "not read: id, source" in data.notes[0]
    with pytest.raises(DataError, match="a.jsonl:2: the row cannot be used"):
        load_dataset(file, strict=True)
    with pytest.raises(DataError, match="no usable rows: 1 row left out: they have a"):
        load_dataset(write_lines(pictures / "b.jsonl", row))


def test_an_image_with_the_name_of_its_video_is_read(pictures):
    row = {"image": "images/0.png", "question": "q", "answer": "a", "video": "trip.mp4"}
    data = load_dataset(write_lines(pictures / "a.jsonl", row))
    assert len(data.samples) == 1 and "not read: video" in data.notes[0]


def test_absolute_paths_below_the_folder(pictures, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(pictures)
    for base in (pictures, link):
        row = {"image": str(base / "images/3.png"), "question": "q", "answer": "a"}
        file = write_lines(pictures / "a.jsonl", row)
        for place in (file, link / "a.jsonl"):
            (sample,) = load_dataset(place, strict=True).samples
            assert sample.images[0].read_bytes() == png((3, 0, 0))


# ---- tables ----

HEADERS = [
    "image,caption",
    "filename,text",
    "file_name,text",
    "FILE , Caption",
    "image_path;description",
    "image\tcaption",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", ["captions.csv", "Captions.CSV", "mine.csv"])
def test_headers_of_tables(pictures, header, name):
    between = next(c for c in ";\t," if c in header)
    file = pictures / name
    file.write_text(f'{header}\nimages/0.png{between} "a, ""red"" one"\nimages/0.png{between}another\n')
    for place in (pictures, file):
        data = load_dataset(place)
        assert [sample.references for sample in data.samples] == [('a, "red" one', "another")]
        assert data.task == "caption" and [s.where for s in one_per_reference(data.samples)] == [
            f"{file}:2",
            f"{file}:3",
        ]


def test_columns_that_are_not_read_are_named(pictures):
    (pictures / "captions.csv").write_text("id,file,caption,split\n1,images/0.png,a,train\n")
    assert load_dataset(pictures).notes == ["fields read: file, caption; not read: id, split"]


@pytest.mark.parametrize("text", ["file,caption,caption\n", "file,name\n", "caption\n", "question,answer\n", "\n"])
def test_headers_that_are_refused(pictures, text):
    (pictures / "captions.csv").write_text(text)
    with pytest.raises(
        DataError, match="captions.csv:1: the (header must be file,caption|column 'caption' is there twice)"
    ):
        load_dataset(pictures)


# ---- folders ----


def test_text_files_beside_the_pictures(pictures):
    for i in range(3):
        (pictures / f"images/{i}.txt").write_text(f"number {i}\n\nanother text\n")
    (pictures / "images/99.TXT").write_text("no picture")
    data = load_dataset(pictures)
    assert (data.task, len(data.samples), data.skipped) == ("caption", 3, 18)
    assert data.samples[1].references == ("number 1", "another text")
    assert any("17 rows left out: there is no .txt file" in note for note in data.notes)
    with pytest.raises(DataError, match="there is no .txt file"):
        load_dataset(pictures, strict=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "CSV"])
def test_image_folders_of_hugging_face(pictures, kind):
    def write(folder, n):
        folder.mkdir(exist_ok=True)
        lines = "".join(f"{i}.png,number {i}\n" for i in range(n))
        rows = "".join(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) + "\n" for i in range(n))
        (folder / f"metadata.{kind}").write_text(rows if kind == "jsonl" else f"file_name,text\n{lines}")
        for i in range(n):
            (folder / f"{i}.png").write_bytes(png((i, 0, 0)))

    write(pictures / "images", 20)
    for source in (pictures / "images", f"hf:{pictures / 'images'}"):
        assert [len(load_dataset(source, split).samples) for split in ("train", "fit", "val")] == [20, 18, 2]
    write(pictures / "train", 4)
    write(pictures / "test", 2)
    (pictures / "images" / f"metadata.{kind}").unlink()
    assert [len(load_dataset(pictures, split).samples) for split in ("train", "test")] == [4, 2]
    assert own_splits(pictures) == ["test", "train"]


def coco(folder, n=3, prefix="", **changes):
    images = [{"id": 10 + i, "file_name": f"{prefix}{i}.png", "width": 4} for i in range(n)]
    annotations = [{"id": i, "image_id": 10 + i % n, "caption": f"caption {i}"} for i in range(2 * n)]
    folder.mkdir(exist_ok=True)
    return write_json(folder / "captions.json", {"info": {}, "images": images, "annotations": annotations} | changes)


def test_coco_captions(pictures):
    for file in (coco(pictures), coco(pictures, prefix="images/"), coco(pictures / "annotations")):
        data = load_dataset(file)
        assert (data.task, [s.references for s in data.samples][0]) == ("caption", ("caption 0", "caption 3"))
        assert data.samples[0].images == (pictures / "images/0.png",)
        assert one_per_reference(data.samples)[1].where == f"{file}: annotation 3"


def test_coco_pictures_in_several_folders(pictures):
    file = coco(pictures)
    (pictures / "other").mkdir()
    (pictures / "other/0.png").write_bytes(png())
    with pytest.raises(DataError, match="annotation 0: found both images/0.png and other/0.png"):
        load_dataset(file)
    file = file.rename(pictures / "captions_other.json")  # its name says which
    assert load_dataset(file).samples[0].images == (pictures / "other/0.png",)
    with pytest.raises(DataError, match="expected a list of rows, or captions as in COCO"):
        load_dataset(write_json(pictures / "b.json", {"data": []}))


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": [{"image_id": 10, "bbox": [1, 2, 3, 4]}]},
        {"annotations": [{"image_id": 99, "caption": "a"}]},
        {"images": [{"id": 10}]},
        {"images": None},
    ],
)
def test_other_coco_files_are_refused(pictures, changes):
    with pytest.raises(DataError, match="captions.json: "):
        load_dataset(coco(pictures, **changes))


def test_names_are_not_patterns(tmp_path):
    """A folder named set[1] is not a pattern for set1."""
    import pyarrow as pa
    import pyarrow.parquet

    for name in ("set1", "set[1]", "my [data]", "a*", "a?", "ab", "{a,b}", "a::b"):
        (tmp_path / name).mkdir()
        table = pa.table({"image": [png((i, 0, 0)) for i in range(3)], "caption": [name] * 3})
        pyarrow.parquet.write_table(table, tmp_path / name / "train.parquet")
    for name in os.listdir(tmp_path):
        for source in (tmp_path / name, tmp_path / name / "train.parquet", f"hf:{tmp_path / name}"):
            assert {sample.answer for sample in load_dataset(source).samples} == {name}


def test_parquet_folders_have_their_splits_in_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    for i, name in enumerate(
        ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/dev-00000-of-00001", "x/test/0000"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": [png((i, 0, 0))], "question": ["q"], "answer": [str(i)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    answers = {split: [s.answer for s in load_dataset(tmp_path, split).samples] for split in ("train", "dev", "test")}
    assert answers == {"train": ["0", "1"], "dev": ["2"], "test": ["3"]}
    assert (
        load_dataset(tmp_path).notes[-1].startswith("2 files read: data/train-00000-of-00002.parquet, data/train-00001")
    )


def test_a_folder_without_a_usual_file_names_those_that_it_has(pictures):
    coco(pictures / "annotations")
    with pytest.raises(DataError, match="name one of its files, such as annotations/captions.json"):
        load_dataset(pictures)


def test_other_layouts_in_a_folder_are_named(pictures):
    write_lines(pictures / "train.jsonl", {"image": "images/0.png", "question": "q", "answer": "a"})
    (pictures / "captions.csv").write_text("file,caption\nimages/0.png,a\n")
    assert any("not read: captions.csv" in note for note in load_dataset(pictures).notes)


def test_other_tables_in_a_folder_are_named(pictures):
    (pictures / "captions.csv").write_text("file,caption\nimages/0.png,a\n")
    (pictures / "captions.tsv").write_text("file\tcaption\nimages/0.png\ta\n")
    (pictures / "questions.csv").write_text("file,question,answer\nimages/0.png,q,a\n")
    notes = [note for note in load_dataset(pictures).notes if note.startswith("also in")]
    assert [note.rpartition(" ")[2] for note in notes] == ["captions.tsv", "questions.csv"]


# ---- splits ----


def test_val_is_dev_where_there_is_no_val(pictures):
    for name in ("train", "dev"):
        write_lines(pictures / f"{name}.jsonl", {"image": "images/0.png", "question": "q", "answer": name})
    for split, answer in (("val", "dev"), ("validation", "dev"), ("dev", "dev"), ("fit", "train"), ("train", "train")):
        assert [sample.answer for sample in load_dataset(pictures, split).samples] == [answer]
    write_lines(pictures / "valid.jsonl", {"image": "images/0.png", "question": "q", "answer": "valid"})
    for split, answer in (("val", "valid"), ("dev", "dev"), ("fit", "train")):
        assert [sample.answer for sample in load_dataset(pictures, split).samples] == [answer]


@pytest.mark.parametrize("split", ["vall", "test", "dev", "TRAIN", ""])
def test_a_split_that_is_not_there_is_an_error(pictures, split):
    row = {"image": "images/0.png", "question": "q", "answer": "a"}
    (pictures / "captions.csv").write_text("file,caption\nimages/0.png,a\n")
    write_json(pictures / "a.json", [row])
    write_lines(pictures / "b.jsonl", row)
    if split:
        for source in ("captions.csv", "a.json", "b.jsonl", "."):
            with pytest.raises(DataError, match=f"no split '{split}'; it has: all, and fit and val"):
                load_dataset(pictures / source, split)


def test_connected():
    assert connected([["b"], ["a", "c"], ["c", "d"], ["e"], []]) == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}


def pair(*names):
    content = [*[IMAGE] * len(names), WHAT]
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "x"})
    return Sample(tuple(f"{name}.png" for name in names), messages)


@pytest.mark.parametrize(
    "samples",
    [
        [pair(i, i + 1) for i in range(0, 40, 2)] + [pair(i + 1, i) for i in range(0, 40, 2)],
        [pair(i, i + 1) for i in range(0, 40) if i % 4 != 3],  # chains of four
        [pair(0, i) for i in range(1, 30)] + [pair(100 + i) for i in range(5)],  # one large group, five single ones
        [pair(*range(i, i + 5)) for i in range(0, 30, 5)],
    ],
)
def test_pictures_that_share_a_row_are_in_one_split(samples):
    fit, val = cut(samples, "fit"), cut(samples, "val")
    assert fit and val and len(fit) + len(val) == len(samples)
    shown = [{image_key(image) for sample in part for image in sample.images} for part in (fit, val)]
    assert not shown[0] & shown[1] and len(shown[1]) <= len(shown[0])
    assert cut(samples[::-1], "val") == val[::-1]
    assert len(set(picture_groups(samples).values())) > 1


def test_nothing_can_be_held_out():
    with pytest.raises(DataError, match="connect all 21 pictures, so none can be held out"):
        cut([pair(i, i + 1) for i in range(20)], "val")
    for split in ("fit", "val"):
        with pytest.raises(DataError, match="found 1 usable picture, but training needs at least 2"):
            cut([pair(1)], split)
