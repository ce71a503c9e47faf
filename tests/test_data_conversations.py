"""LLaVA files and Hugging Face datasets: conversations with any number of images; bad rows are named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import DataError, Sample, llava, load_dataset
from nanochat.data.sample import caption_sample, vqa_sample
from tests.data_files import png, write_lines, write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path)


# ---- LLaVA ----


def llava_row(value="<image>\nWhat is it?", image="images/0.png", answer="a dog"):
    row = {"id": "7", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}
    return row if image is None else {**row, "image": image}


def llava_file(folder, *rows):
    file = folder / "conversations.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_llava_tags_become_parts_in_place(pictures):
    rows = [
        llava_row(),
        llava_row("Compare\n<image>\n<image> now", ["images/0.png", "images/1.png"]),
        llava_row("Hello", image=None),
    ]
    data = load_dataset(llava_file(pictures, *rows))
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    contents = [sample.messages[0]["content"] for sample in data.samples]
    assert contents == [[image, text("What is it?")], [text("Compare"), image, image, text("now")], "Hello"]
    assert [len(sample.images) for sample in data.samples] == [1, 2, 0]
    assert data.task == "vqa"


def test_llava_image_folder_and_missing(pictures):
    (pictures / "json").mkdir()
    file = llava_file(pictures / "json", llava_row(), llava_row(image="images/gone.png"))
    data = llava.load(file, image_folder=pictures)
    assert (len(data.samples), data.skipped) == (1, 1)
    with pytest.raises(DataError, match="row 1: the image"):
        llava.load(file, image_folder=pictures, strict=True)


BAD_LLAVA = [
    llava_row("<image>\n<image>"),
    llava_row(image=None),
    llava_row(image="../0.png"),
    llava_row(answer=""),
    llava_row(answer="an <image> in the answer"),
    {"image": "images/0.png"},
    {"conversations": []},
    {"conversations": [{"from": "human", "value": "hi"}]},
    {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "hi"}]},
    {"conversations": [{"from": "robot", "value": "hi"}, {"from": "gpt", "value": "hi"}]},
    {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "hi"}]},
    {"conversations": ["hi"]},
    "hi",
]


@pytest.mark.parametrize("row", BAD_LLAVA, ids=range(len(BAD_LLAVA)))
def test_llava_malformed_rows_are_named(pictures, row):
    with pytest.raises(DataError, match="conversations.json: row 1: "):
        load_dataset(llava_file(pictures, llava_row(), row))


@pytest.mark.parametrize("text", ["{", "{}", "3", "[" * 100_000])
def test_llava_malformed_files(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="a.json: "):
        load_dataset(tmp_path / "a.json")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)


@st.composite
def conversations(draw, picture):
    """A sample in the normal form, with any number of turns, images and texts."""
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    n_images = 0
    for _ in range(draw(st.integers(1, 3))):
        texts = draw(st.lists(words | st.none(), min_size=1, max_size=4))
        parts = []
        for text in texts:
            if text is None:
                parts.append({"type": "image"})
            elif not parts or parts[-1]["type"] == "image":
                parts.append({"type": "text", "text": text})
        n_images += sum(part["type"] == "image" for part in parts)
        content = parts[0]["text"] if [part["type"] for part in parts] == ["text"] else parts
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": draw(words)}]
    references = (messages[-1]["content"], *draw(st.lists(words, max_size=2)))
    return Sample((picture,) * n_images, tuple(messages), references)


def without_paths(samples):
    """Comparable samples, whatever the pictures are held as."""

    def contents(image):
        return image if isinstance(image, bytes) else Path(image).read_bytes()

    return [(sample.messages, sample.references, [contents(image) for image in sample.images]) for sample in samples]


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    (folder / "a b").mkdir()
    (folder / "a b/ü.png").write_bytes(png())
    return folder


def llava_row_of(sample: Sample, number: int, folder: Path) -> dict:
    """A sample in LLaVA's format."""
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = []
    for message in sample.messages:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", **{"text": message["content"]}}]
        )
        value = "\n".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
        turns.append({"from": speakers[message["role"]], "value": value})
    images = [str(image.relative_to(folder)) for image in sample.images]
    row = {"id": str(number), "conversations": turns, "references": list(sample.references)}
    return row | ({"image": images[0] if len(images) == 1 else images} if images else {})


@given(st.data())
def test_llava_conversations_of_any_form(album, data):
    samples = data.draw(st.lists(conversations(album / "a b/ü.png"), min_size=1, max_size=3))
    file = llava_file(album, *(llava_row_of(sample, i, album) for i, sample in enumerate(samples)))
    assert llava.load(file).samples == samples


# ---- Hugging Face ----


@pytest.fixture
def quiet_hub(monkeypatch, tmp_path):
    """No network and no use of the home folder, also if the library was imported before."""
    import datasets

    cache = tmp_path / "hf_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_parquet(samples: list[Sample], file: Path) -> None:
    """Samples as the datasets library stores messages and images in parquet."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    text = datasets.Value("string")
    messages = [{"role": text, "content": [{"type": text, "text": text}]}]
    features = datasets.Features({"messages": messages, "images": [datasets.Image()], "references": [text]})
    rows = []
    for sample in samples:
        turns = []
        for message in sample.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append({"role": message["role"], "content": parts})
        images = [{"bytes": Path(image).read_bytes(), "path": None} for image in sample.images]
        rows.append({"messages": turns, "images": images, "references": list(sample.references)})
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), file)


@given(st.data())
def test_parquet_conversations_of_any_form(album, data):
    samples = data.draw(st.lists(conversations(album / "a b/ü.png"), min_size=1, max_size=3))
    write_parquet(samples, album / "out.parquet")
    assert without_paths(load_dataset(album / "out.parquet").samples) == without_paths(samples)


def test_parquet_splits_and_references(pictures):
    samples = [caption_sample(pictures / f"images/{i}.png", [f"number {i}", "a square"]) for i in range(20)]
    write_parquet(samples, pictures / "train.parquet")
    data = load_dataset(pictures / "train.parquet")
    assert data.task == "caption" and data.samples[3].references == ("number 3", "a square")
    assert data.samples[3].images[0] == png((3, 0, 0))
    sizes = [len(load_dataset(pictures / "train.parquet", split).samples) for split in ("fit", "val", "all", "train")]
    assert sizes == [18, 2, 20, 20]


def test_parquet_with_question_columns_and_paths(pictures):
    import pyarrow as pa
    import pyarrow.parquet

    images = [{"bytes": png(), "path": "x"}, *({"bytes": None, "path": name} for name in ("images/1.png", "gone.png"))]
    table = {"image": images, "question": ["q1", "q2", "q3"], "answer": ["a1", "a2", "a3"]}
    pyarrow.parquet.write_table(pa.table(table), pictures / "a.parquet")
    data = load_dataset(pictures / "a.parquet")
    assert [sample.answer for sample in data.samples] == ["a1", "a2"] and data.skipped == 1
    assert data.samples[0].images == (png(),) and data.samples[1].images == (pictures / "images/1.png",)
    with pytest.raises(DataError, match="row 2: the image"):
        load_dataset(pictures / "a.parquet", strict=True)
    images[1]["path"] = "../../etc/passwd"
    pyarrow.parquet.write_table(pa.table(table), pictures / "a.parquet")
    with pytest.raises(DataError, match="row 1: expected the path of a file below .*, found '../../etc/passwd'"):
        load_dataset(pictures / "a.parquet")


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["no image"]},
        {"image": ["images/0.png"], "question": ["q"]},
        {"image": ["images/0.png"], "question": ["q"], "answer": [""]},
        {"images": [["images/0.png"]], "messages": [[{"role": "user", "content": "no answer"}]]},
        {"images": [[]], "messages": [[{"role": "user", "content": [{"type": "table", "text": None}]}]]},
        {"images": [[None]], "messages": [[{"role": "user", "content": [{"type": "image", "text": None}]}]]},
    ],
)
def test_hf_malformed_rows_are_named(pictures, columns):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), pictures / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: row 0: "):
        load_dataset(pictures / "a.parquet")


def test_hf_json_and_saved_datasets(pictures, quiet_hub):
    import datasets

    def row(i):
        user = [{"type": "image", "text": None}, {"type": "text", "text": f"q{i}"}]
        answer = [{"type": "text", "text": f"a{i}"}]
        return {
            "images": [f"images/{i}.png"],
            "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        }

    expected = [vqa_sample(pictures / f"images/{i}.png", f"q{i}", f"a{i}") for i in range(20)]
    file = write_lines(pictures / "messages.jsonl", *map(row, range(20)))
    assert load_dataset(f"hf:{file}").samples == expected

    paths = [{**row(i), "images": [str(pictures / f"images/{i}.png")]} for i in range(20)]
    table = datasets.Dataset.from_list(paths).cast_column("images", [datasets.Image()])
    table.save_to_disk(pictures / "one", max_shard_size="1GB")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(pictures / "many")
    saved = load_dataset(pictures / "one").samples
    assert without_paths(saved) == without_paths(expected)
    sizes = [len(load_dataset(pictures / "many", split).samples) for split in ("train", "fit", "val", "test")]
    assert sizes == [20, 18, 2, 1]
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        load_dataset(pictures / "many", "dev")


def test_hf_folder_of_parquet_files(pictures, quiet_hub):
    (pictures / "hub/data").mkdir(parents=True)
    for split, n in (("train", 10), ("validation", 2)):
        samples = [vqa_sample(pictures / f"images/{i}.png", "q", "a") for i in range(n)]
        write_parquet(samples, pictures / f"hub/data/{split}-00000-of-00001.parquet")
    sizes = [len(load_dataset(pictures / "hub", split).samples) for split in ("train", "fit", "val", "validation")]
    assert sizes == [10, 10, 2, 2]


def test_hf_image_folder_also_behind_a_link(tmp_path, quiet_hub):
    folder = tmp_path / "photos/train"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png((i, 0, 0)))
    rows = ({"file_name": f"{i}.png", "question": "q", "answer": str(i)} for i in range(3))
    write_lines(folder / "metadata.jsonl", *rows)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for source in (tmp_path / "photos", tmp_path / "link"):
        samples = load_dataset(f"hf:{source}").samples
        assert [(s.images[0].read_bytes(), s.answer) for s in samples] == [(png((i, 0, 0)), str(i)) for i in range(3)]


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet", "png"])
def test_hf_broken_files(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(png() if content == "png" else content)
    with pytest.raises(DataError, match="a.parquet: cannot be read as parquet: "):
        load_dataset(tmp_path / "a.parquet")


def test_hf_not_on_the_hub(quiet_hub):
    with pytest.raises(DataError, match="nobody/nothing: the datasets library cannot read it"):
        load_dataset("hf:nobody/nothing")
